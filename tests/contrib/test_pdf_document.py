"""``pdf-document``: what the pages say and show, what the text cannot do, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pypdfium2
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

import jobkit
from jobkit import cli
from jobkit.contrib.renderers import _markdown, pdf_document
from jobkit.contrib.renderers._markdown import MAX_CHARACTERS, MAX_COLUMNS, MAX_DEPTH
from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import Registration, RenderEnvironment
from tests.support.pdf import RENDERERS, read, render

# What the pages say


def test_a_document_has_pages_with_numbers_a_running_title_an_outline_and_metadata() -> None:
    sections = "\n\n".join(f"## Part {number}\n\n" + "Some words to fill the page. " * 120 for number in range(4))
    pdf = render(f"# The year *in* numbers\n\n{sections}", author=["Ada Lovelace", "Mary Somerville"])
    assert pdf.filename == "The year in numbers.pdf"
    assert len(pdf.pages) >= 3
    for number, page in enumerate(pdf.pages, 1):
        assert page.rstrip().endswith(f"{number} / {len(pdf.pages)}")
        assert page.count("The year in numbers") == 1
    assert "Ada Lovelace, Mary Somerville" in pdf.pages[0]
    assert pdf.outline == [(0, "The year in numbers"), *((1, f"Part {number}") for number in range(4))]
    assert pdf.metadata["Title"] == "The year in numbers"
    assert pdf.metadata["Author"] == "Ada Lovelace, Mary Somerville"
    assert pdf.metadata["CreationDate"] == ""


@pytest.mark.parametrize(
    ("fields", "title", "outline", "filename"),
    [
        ({}, "", ["Own"], "document.pdf"),
        ({"title": "Given"}, "Given", ["Given", "Own"], "Given.pdf"),
        ({"title": "Own"}, "Own", ["Own", "Own"], "Own.pdf"),
        ({"title": 'A/B: "c"?'}, 'A/B: "c"?', ['A/B: "c"?', "Own"], "A B c.pdf"),
        ({"title": "T", "filename": "umsätze.PDF"}, "T", ["T", "Own"], "umsätze.PDF"),
        ({"title": "T", "filename": "sales"}, "T", ["T", "Own"], "sales.pdf"),
    ],
)
def test_the_title_is_the_given_one_or_the_heading_that_opens_the_text(
    fields: dict[str, str], title: str, outline: list[str], filename: str
) -> None:
    pdf = render("Words first.\n\n# Own", **fields)
    assert (pdf.metadata["Title"], [text for _, text in pdf.outline], pdf.filename) == (title, outline, filename)


def test_a_given_title_that_opens_the_text_is_printed_once() -> None:
    pdf = render("# Own\n\nWords.", title="Own")
    assert pdf.text == "Own Words. 1 / 1"


@pytest.mark.parametrize(
    ("markdown", "shown"),
    [
        ("**bold** *it* ~~gone~~ `x = 1`", "bold it gone x = 1"),
        ("line\\\nnext\nsame", "line next same"),
        ("1. one\n2. two\n   - in\n     1. deep", "1. one 2. two • in 1. deep"),
        ("7. seven\n8. eight", "7. seven 8. eight"),
        ("- [ ] open\n- [x] closed\n- none", "open closed • none"),
        ("> said\n> > again", "said again"),
        ("above\n\n---\n\nbelow", "above below"),
        ("![a *red* kite](kite.png) ![](only.png)", "[a red kite] [only.png]"),
        ("| a | b |\n|:-:|--:|\n| `1` | **2** |", "a b 1 2"),
        ("<b>tag</b> &amp; &copy; <script>x()</script>", "<b>tag</b> & © <script>x()</script>"),
        ("<div>\n<p>block</p>\n</div>", "<div> <p>block</p> </div>"),
        ("    indented\n\n```\nfenced\n```", "indented fenced"),
        ("```nonsense-language\ncode\n```\n\n```python\ndef f(): ...\n```", "code def f(): ..."),
        ("# ", ""),
        ("Ελληνικά, русский, français, Tiếng Việt", "Ελληνικά, русский, français, Tiếng Việt"),
    ],
)
def test_markdown_is_shown_as_it_means(markdown: str, shown: str) -> None:
    assert render(markdown).text == f"{shown} 1 / 1".strip()


def test_links_to_the_web_to_mail_and_to_headings_work_and_others_are_text() -> None:
    pdf = render(
        "# Top\n\n[web](https://example.org/a?b=c&d) <mailto:a@example.org> [in](#a-part-1) [none](#nowhere) "
        "[file](file:///etc/passwd) [relative](other.md) [script](javascript:x) [data](data:text/html,x)\n\n"
        "## A part\n\n## A *part*"
    )
    assert pdf.links == ["https://example.org/a?b=c&d", "mailto:a@example.org", "inside"]
    assert "none" in pdf.text
    assert "relative" in pdf.text


@pytest.mark.parametrize(("paper", "size"), [("a4", (595, 842)), ("us-letter", (612, 792))])
def test_the_paper_is_the_one_asked_for(paper: str, size: tuple[int, int]) -> None:
    with pypdfium2.PdfDocument(render("x", paper=paper).body) as document:
        assert tuple(round(side) for side in document[0].get_size()) == size


def test_a_language_hyphenates_and_is_told_to_screen_readers() -> None:
    text = "Die Dampfschifffahrtsgesellschaft und ihre Rechtsschutzversicherung. " * 6
    assert "-" in render(text, language="de").text
    assert "-" not in render(text).text
    assert b"/Lang(de)" in render(text, language="de").body


# What the text cannot do

HOSTILE = [
    '#read("/etc/passwd")',
    '#import "@preview/cetz:0.3.0": *',
    '#include "/etc/passwd"',
    '#image("/etc/passwd")',
    '#eval("1+1")',
    "#panic()",
    "#{ while true {} }",
    "#sys.inputs",
    "$ x^2 sum $",
    "= Heading",
    "/ Term: x",
    "@label <label>",
    '"quoted" \\u{1F600} \\n \\" \\\\',
    "]]] }}} ))) [[[ {{{ (((",
    "#set page(width: 1pt)",
    "#let doc = none; #show: none",
    "/* comment */ // comment",
    "'); DROP TABLE content_jobs; --",
    "%s %n {0} ${x} {{x}}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_that_would_be_code_in_the_typesetter_is_only_text(text: str) -> None:
    fenced = f"````{text.split(maxsplit=1)[0]}\n{text}\n````"
    escaped = re.sub(r"([^\w\s])", r"\\\1", text)
    cell = escaped.replace("|", "\\|")
    markdown = f"# {escaped}\n\n{escaped}\n\n{fenced}\n\n`` {text} ``\n\n| {cell} |\n|--|\n| {cell} |"
    pdf = render(markdown, title=text, author=text)
    shown = re.sub(r"\s", "", pdf.text)
    assert shown.count(re.sub(r"\s", "", text)) == 7
    assert pdf.metadata["Title"] == text


ANY_GLYPH = st.text(
    st.characters(
        codec="utf-8", max_codepoint=0x4FF, categories=("L", "N", "P", "S"), exclude_characters="\u0488\u0489"
    ),
    min_size=1,
    max_size=60,
)


def _has_glyphs(text: str) -> bool:
    return not re.search("[\u0180-\u036f\u0370-\u0385\u0460-\u04ff\u03cf-\u03ff\u01c0-\u024f]", text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(ANY_GLYPH.filter(_has_glyphs))
@example("`" * 9)
@example("~~~")
def test_any_latin_greek_or_cyrillic_text_appears_in_the_pdf(text: str) -> None:
    fence = "`" * 70
    assert "".join(render(f"{fence}\n{text}\n{fence}").text.split()) == f"{text}1/1"


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=200), st.text(min_size=1, max_size=30))
def test_any_text_at_all_is_typeset(text: str, title: str) -> None:
    text, title = "a" + text.replace("\0", ""), "t" + title.replace("\0", "")
    assert render(text, title=title, author=title).pages


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "# ",
                "> ",
                "- ",
                "1. ",
                "\n",
                "\n\n",
                "    ",
                "`",
                "```",
                "|",
                "|-|-|\n",
                "*",
                "**",
                "_",
                "~~",
                "[",
                "](",
                ")",
                "![",
                "<",
                ">",
                "https://",
                "#a",
                "a",
                "b c",
                "\\",
                "[ ] ",
                "---\n",
            ]
        ),
        max_size=60,
    )
)
def test_any_mixture_of_markup_is_typeset(parts: list[str]) -> None:
    assert render("a\n\n" + "".join(parts)).pages


def test_characters_without_a_glyph_and_control_characters_do_no_harm() -> None:
    pdf = render("日本語 😀 हिन्दी \x07\x1b[31m\u2028end", title="日本\x08")
    assert "\ufffd[31m end" in pdf.text
    assert pdf.metadata["Title"] == "日本\ufffd"


# What stays the same


def test_the_same_input_gives_the_same_bytes_in_another_process_and_folder(tmp_path: Path) -> None:
    markdown = Path(pdf_document.__file__).parents[2].joinpath("demo", "report.md").read_text()
    script = (
        "import sys, jobkit\nfrom jobkit.contrib.renderers import pdf_document\nr = jobkit.Renderers()\n"
        "pdf_document.register(r)\n"
        "sys.stdout.buffer.write(r.render('pdf-document', {'markdown': sys.stdin.read()})[0].body)"
    )
    environment = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}
    other = subprocess.run(
        [sys.executable, "-c", script],
        input=markdown.encode(),
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert render(markdown).body == other.stdout


def test_four_threads_at_once_make_what_one_makes() -> None:
    documents = [f"# Number {number}\n\n" + f"Words of {number}. " * 300 for number in range(12)]
    alone = [render(markdown).body for markdown in documents]
    with ThreadPoolExecutor(4) as pool:
        assert [pdf.body for pdf in pool.map(render, documents)] == alone


# What is refused


@pytest.mark.parametrize(
    ("input", "message"),
    [
        ({}, "markdown is missing"),
        ({"markdown": " \n"}, "markdown is blank"),
        ({"markdown": 5}, "markdown must be text, not int"),
        ({"markdown": "x" * (MAX_CHARACTERS + 1)}, "markdown has 1048577 characters, the limit is 1048576"),
        ({"markdown": "x", "titel": "y"}, "'titel' is not a field of pdf-document"),
        ({"markdown": "x", "title": ["y"]}, "title must be text, not list"),
        ({"markdown": "x", "title": " "}, "title is blank"),
        ({"markdown": "x", "title": "y" * 501}, "title has 501 characters"),
        ({"markdown": "x", "author": 5}, "author must be text, not int"),
        ({"markdown": "x", "author": ["a", None]}, "author must be text, not NoneType"),
        ({"markdown": "x", "author": ["a"] * 51}, "author has 51 names"),
        ({"markdown": "x", "paper": "a0"}, "paper 'a0' is not one of a4, us-letter"),
        ({"markdown": "x", "paper": {}}, "paper {} is not one of"),
        ({"markdown": "x", "filename": "../x.pdf"}, "filename '../x.pdf' has a character"),
        ({"markdown": "x", "filename": "a\nb"}, "filename 'a\\nb' has a character"),
        ({"markdown": "x", "language": "german"}, "language 'german' is not a code"),
        ({"markdown": "x\ud800"}, "markdown contains a lone surrogate"),
        ({"markdown": ">" * 10_000 + "a"}, f"markdown has quotes and lists nested deeper than {MAX_DEPTH} levels"),
        ({"markdown": "> " * (MAX_DEPTH + 1) + "a"}, "nested deeper"),
        ({"markdown": "- " * 10_000 + "a"}, "nested deeper"),
        ({"markdown": "- > 1. " * 3_000 + "a"}, "nested deeper"),
        ({"markdown": "".join("  " * depth + "- a\n" for depth in range(700))}, "nested deeper"),
        ({"markdown": "|a" * (MAX_COLUMNS + 1) + "|\n" + "|-" * (MAX_COLUMNS + 1) + "|\n"}, "more than 40 columns"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_typeset_is_refused_by_name(input: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pdf_document.render(_context(input))


@pytest.mark.parametrize(
    ("limit", "just_right", "too_much", "message"),
    [
        ("MAX_CELLS", "|a|b|\n|-|-|\n" + "|c|d|\n" * 9, "\n\n|a|\n|-|\n", "more than 20 table cells"),
        ("MAX_BLOCKS", "- a\n" * 9 + "\n---", "\n\n# b", "more than 20 paragraphs"),
        ("MAX_RUNS", "*a* b " * 10, "\n\nc", "changes its style more than 20 times"),
    ],
)
def test_a_document_may_be_as_large_as_the_limits_and_no_larger(
    limit: str, just_right: str, too_much: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_markdown, limit, 20)
    assert render(just_right).pages
    with pytest.raises(ValueError, match=message):
        pdf_document.render(_context({"markdown": just_right + too_much}))


@pytest.mark.parametrize("one", ["> ", "- ", "1. ", "> - "])
def test_the_deepest_nesting_that_is_let_through_is_typeset(one: str) -> None:
    inside = "| a | b |\n|--|--|\n" if one == "> " else "**bold *and* `code`** [link](https://example.org)"
    assert render(one * (MAX_DEPTH // one.count(" ")) + inside).pages


def test_a_renderer_whose_claim_is_lost_stops_while_it_reads() -> None:
    context = _context({"markdown": "[a" * 20_000})
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 100:
            raise jobkit.LeaseLost

    context.check = check  # type: ignore[method-assign]
    with pytest.raises(jobkit.LeaseLost):
        pdf_document.render(context)


def _context(input: dict[str, Any]) -> jobkit.RenderContext:
    unused: Any = None
    claim = Claim(uuid.uuid4(), "acme", "pdf-document", input, None, fence=1, attempt=1)
    environment = RenderEnvironment(unused, unused, unused)
    return jobkit.RenderContext(claim, environment, Attempt(claim, Registration(unused), environment))


@pytest.mark.parametrize("missing", ["typst", "markdown_it"])
def test_without_its_extra_registering_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    pdf_document._libraries.cache_clear()
    with pytest.raises(jobkit.ConfigurationError, match=rf"needs {missing}: pip install jobkit\[pdf\]"):
        pdf_document.register(jobkit.Renderers())


def test_importing_the_renderer_imports_no_library_of_its_extra() -> None:
    script = "import sys, jobkit.contrib.renderers.pdf_document; print({'typst', 'markdown_it'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


# As a job


def test_jobs_become_pdfs_side_by_side(
    engine: sa.Engine, disk: jobkit.AssetStore, create: Callable[..., jobkit.Job]
) -> None:
    made = [create("pdf-document", input={"markdown": f"# Report {number}"}) for number in range(6)]
    refused = create("pdf-document", input={"markdown": "x", "paper": "a0"})
    assert jobkit.Runner(engine, disk, RENDERERS, concurrency=4).run_until_idle(timeout=60) == 7
    with Session(engine) as session:
        for number, job in enumerate(made):
            (asset,) = disk.list_by_job(session, job.id)
            assert (asset.content_type, asset.original_filename) == ("application/pdf", f"Report {number}.pdf")
            with disk.open(asset) as file:
                assert read(file.read()).outline == [(0, f"Report {number}")]
        failed = jobkit.JobStore(session).get_by_id(refused.id)
        assert failed is not None
        assert failed.error_message == "paper 'a0' is not one of a4, us-letter"


def test_the_demo_makes_its_report_again_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (1, 2):
        assert cli.main(["demo", "--directory", str(tmp_path / "demo")]) == 0
        assert "verified" in capsys.readouterr().out
        files = list((tmp_path / "demo" / "assets").rglob("*.pdf"))
        assert len(files) == run
    pdf = read(files[0].read_bytes())
    assert 2 <= len(pdf.pages) <= 4
    assert len(pdf.outline) == 8
