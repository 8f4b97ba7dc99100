"""``pdf-document``: how the pages look."""

from __future__ import annotations

import re
from itertools import pairwise

import pypdfium2
import pypdfium2.raw as pdfium
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.contrib.renderers._breaks import columns, pieces
from jobkit.contrib.renderers._markdown import MAX_DEPTH
from tests.support.pdf import render

SIDE_MARGIN = 28 * 72 / 25.4
LONG = "x" * 400
ADDRESS = "https://example.org/" + "segment/" * 30 + "?q=" + "value&" * 20


@pytest.mark.parametrize(
    "markdown",
    [
        LONG,
        ADDRESS,
        f"# {LONG}",
        f"###### {LONG}",
        f"- {LONG}\n  - `{ADDRESS}`",
        f"<{ADDRESS}>",
        f"> > {LONG}",
        f"```\n{LONG}\n{'word ' * 60}\n```",
        f"```python\nname = '{LONG}'\n```",
        f"| a | b |\n|--|--|\n| {LONG} | {ADDRESS} |",
        "|" + "heading|" * 12 + "\n" + "|--" * 12 + "|\n" + "|internationalisation" * 12 + "|",
        "|" + "MWM|" * 40 + "\n" + "|--" * 40 + "|\n" + "|1,234.5" * 40 + "|",
        "- " * MAX_DEPTH + LONG,
        "> " * MAX_DEPTH + LONG,
        "- " * (MAX_DEPTH - 1) + f"| {LONG} | b |\n" + "  " * (MAX_DEPTH - 1) + "|--|--|",
        "漢字" * 300,
    ],
    ids=lambda markdown: f"{markdown[:18]}…{len(markdown)}",
)
def test_nothing_runs_over_the_margins(markdown: str) -> None:
    pdf = render(markdown, title="T")
    left, bottom, right = pdf.edges
    assert left > SIDE_MARGIN - 2
    assert bottom > 0
    assert right < 595.3 - SIDE_MARGIN + 2


def test_a_long_title_and_long_names_stay_between_the_margins() -> None:
    pdf = render("words " * 3_000, title="W" * 400, author=["M" * 200] * 3)
    assert len(pdf.pages) > 3
    assert pdf.edges[2] < 595.3 - SIDE_MARGIN + 2


def test_long_words_are_broken_without_a_character_added() -> None:
    pdf = render(f"{LONG} {ADDRESS}\n\n```\n{LONG}\n```")
    assert re.sub(r"\s", "", pdf.text) == f"{LONG}{ADDRESS}{LONG}1/1"


def test_a_table_over_several_pages_repeats_its_header() -> None:
    rows = "".join(f"| row {number} | {number * 3} |\n" for number in range(150))
    pdf = render(f"| Name | Count |\n|---|---:|\n{rows}")
    assert len(pdf.pages) > 3
    assert all("Name Count" in page.replace("\n", " ") for page in pdf.pages)
    assert [int(number) for number in re.findall(r"row (\d+)", pdf.text)] == list(range(150))


@pytest.mark.parametrize(
    ("markdown", "word", "count"),
    [
        ("| " + "word " * 4_000 + "| b |\n|--|--|\n| x | y |", "word", 4_000),
        ("| a | b |\n|--|--|\n| x | " + "word " * 4_000 + "|", "word", 4_000),
        ("y" * 9_000, "y", 9_000),
        ("*one* two " * 1_500, "one", 1_500),
        ("```\n" + "y" * 9_000 + "\n```", "y", 9_000),
        ("```\n" + "code\n" * 400 + "```", "code", 400),
        ("```\n" + ("y" * 900 + "\n") * 9 + "```", "y", 8_100),
        ("> " + "word " * 4_000, "word", 4_000),
        ("- " + "word " * 4_000, "word", 4_000),
        ("a\n\n## " + "word " * 4_000, "word", 4_000),
    ],
    ids=["header", "cell", "word", "styles", "line of code", "code", "long lines", "quote", "item", "heading"],
)
def test_what_is_longer_than_a_page_is_shown_whole(markdown: str, word: str, count: int) -> None:
    pdf = render(markdown)
    assert "".join(pdf.text.split()).count(word) == count
    assert pdf.edges[1] > 0


def test_no_heading_is_left_alone_at_the_end_of_a_page() -> None:
    for lines in range(38, 50):
        pdf = render("line  \n" * lines + "\n## Heading\n\nFollower")
        assert any("Heading" in page and "Follower" in page for page in pdf.pages), lines


def test_a_short_code_block_is_never_split_and_a_long_one_keeps_three_lines_together() -> None:
    def code(lines: int) -> str:
        return "```\n" + "".join(f"code{number}\n" for number in range(lines)) + "```\n"

    for filler, lines in [(filler, 12) for filler in range(34, 48, 2)] + [(filler, 30) for filler in range(20, 30)]:
        pages = [len(re.findall("code", page)) for page in render("line  \n" * filler + "\n" + code(lines)).pages]
        assert sum(pages) == lines
        assert not set(pages) & (set(range(1, 12)) if lines == 12 else {1, 2}), filler


def test_lines_of_code_are_evenly_spaced_blank_ones_too() -> None:
    lines = ["x = 1", "", "@" + "x" * 40, "", "x" * 20, "x", "", "", "x"] * 2
    pdf = render("```python\n" + "\n".join(lines) + "\n```")
    with pypdfium2.PdfDocument(pdf.body) as document:
        text = document[0].get_textpage()
        baselines = set()
        for index in range(text.count_chars()):
            x, y = pdfium.c_double(), pdfium.c_double()
            if text.get_text_range(index, 1) == "x" and pdfium.FPDFText_GetCharOrigin(text, index, x, y):
                baselines.add(round(y.value, 2))
    found = sorted(baselines, reverse=True)
    steps = [round(upper - lower, 1) for upper, lower in pairwise(found)]
    line = min(steps)
    assert steps == pytest.approx([line * count for count in (2, 2, 1, 3, 1, 2, 2, 1, 3)], abs=0.2)


# Breaks and columns


@given(st.text(max_size=400), st.integers(1, 30))
def test_pieces_are_the_text_again(text: str, longest: int) -> None:
    found = pieces(text, longest)
    assert "".join(found) == text
    assert pieces(" ".join(text.split()[:1])[:longest], longest) == [" ".join(text.split()[:1])[:longest]]


def test_a_character_is_not_parted_from_its_accents() -> None:
    assert {len(piece) for piece in pieces("e\u0301" * 100)} == {2}


def test_columns_share_the_line_by_what_they_hold() -> None:
    small = columns([["Name", "Count"], ["a", "1"]])
    assert (small.widths, small.size) == (None, 1.0)
    text = columns([["Key", "Description"], ["short", "long words " * 40]])
    assert text.widths is not None
    assert text.widths[1] > 5 * text.widths[0]
    many = columns([["internationalisation"] * 12])
    assert many.size < 0.8
    assert len(set(many.widths or ())) == 1
