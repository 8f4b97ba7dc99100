"""``spreadsheet``: tables as a workbook for Excel and its relatives. Needs ``jobkit[sheets]``.

The job's input::

    {"sheets": [{"name": "Sales", "columns": ["Month", {"title": "Sum", "format": "number"}],
                 "rows": [["January", 1234.5], ["February", null]]}],
     "title": "…", "author": "…", "filename": "sales.xlsx"}

A sheet needs ``columns``, each a title or an object of ``title``, ``format`` and ``width`` (in characters; by default
as its content needs). ``rows`` are lists of text, numbers, booleans and null, none longer than the columns. ``name``:
by default ``Sheet1`` and so on. ``format``: ``general``; ``text``; ``integer``, ``number``, ``percent`` (of numbers);
``date`` and ``datetime`` (of text such as ``2026-01-31`` and ``2026-01-31T12:00:00``; one with an offset is shown as
UTC).

Text is only ever text: what begins with ``=``, ``+``, ``-`` or ``@`` is no formula, an address no link. An integer of
more than 15 digits, which Excel would round, is written as text. The same input gives the same bytes.

Refused with ``ValueError``, naming the place: what Excel cannot hold (1,048,576 rows with the titles, 16,384 columns,
32,767 characters in a cell, 31 in a sheet's name, which has none of ``[]:*?/\\``), two sheets of one name, more than
200 sheets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from typing import Any

from jobkit.assets.spool import Spool
from jobkit.contrib.renderers import _fields
from jobkit.contrib.renderers._markdown import clean
from jobkit.errors import ConfigurationError
from jobkit.rendering.context import RenderContext
from jobkit.rendering.renderers import Renderers

JOB_TYPE = "spreadsheet"
CONTENT_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
FORMATS = {
    "general": None,
    "text": "@",
    "integer": "#,##0",
    "number": "#,##0.00",
    "percent": "0.0%",
    "date": "yyyy-mm-dd",
    "datetime": "yyyy-mm-dd hh:mm",
}
MAX_SHEETS = 200
MAX_ROWS, MAX_COLUMNS = 1_048_576, 16_384
MAX_NAME, MAX_CELL = 31, 32_767

_FIELDS = ("sheets", "title", "author", "filename")
_SHEET = ("name", "columns", "rows")
_COLUMN = ("title", "format", "width")
_UNFIT_FOR_NAME = re.compile(r"[\[\]:*?/\\]")
_NOT_IN_XML = re.compile("[\ufffe\uffff]")
_NUMBERS, _DATES = ("integer", "number", "percent"), ("date", "datetime")
_FIRST_DATE = date(1900, 3, 1)  # Excel counts a 29 February 1900
_EXACT = 10**15
_CREATED = datetime(2000, 1, 1, tzinfo=UTC)
_WIDTHS = {"date": 11, "datetime": 17}
_LOOKED_AT = 1_000


def register(renderers: Renderers) -> None:
    """Make ``render`` the renderer of ``spreadsheet``; ``ConfigurationError`` without ``jobkit[sheets]``."""
    _library()
    renderers.register(JOB_TYPE)(render)


def render(ctx: RenderContext) -> None:
    """The workbook. ``ValueError``, naming the field, when the input is not right."""
    value = _fields.object_of(ctx.input, _FIELDS, JOB_TYPE)
    title, author = (_fields.text(value, field, limit=200) for field in ("title", "author"))
    filename = _fields.filename(value, ".xlsx") or "spreadsheet.xlsx"
    sheets = Sheet.all_of(value.get("sheets"))
    with ctx.writer(filename, CONTENT_TYPE) as out:
        workbook = _library().Workbook(
            Output(out),
            {
                "constant_memory": True,  # rows go to files in the working folder
                "tmpdir": str(ctx.workdir),
                "strings_to_formulas": False,
                "strings_to_urls": False,
                "strings_to_numbers": False,
            },
        )
        workbook.set_properties({"title": title or "", "author": author or "", "created": _CREATED})
        styles = Styles(workbook)
        try:
            for sheet in sheets:
                sheet.write(workbook.add_worksheet(sheet.name), styles, ctx)
            workbook.close()
        finally:
            for page in workbook.worksheets():  # their files, which only close() closes
                page.row_data_fh.close()


class Output:
    """The writer as zipfile uses it, which forgets what comes after it was closed: a zip file that an error left open
    tries to end itself when it is collected.
    """

    def __init__(self, out: Spool) -> None:
        self._out = out
        self._position = 0

    def write(self, data: bytes) -> int:
        if not self._out.closed:
            self._out.write(data)
        self._position += len(data)
        return len(data)

    def seek(self, position: int) -> int:
        if not self._out.closed:
            self._out.seek(position)
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing is held back."""


class Styles:
    """The formats of a workbook's cells."""

    def __init__(self, workbook: Any) -> None:
        top = {"valign": "top"}
        self.cells = {
            name: workbook.add_format({**top, "num_format": code} if code else top) for name, code in FORMATS.items()
        }
        head = {"bold": True, "bg_color": "#E7ECF2", "bottom": 1, "valign": "vcenter", "text_wrap": True}
        self.head = workbook.add_format(head)
        self.head_of_numbers = workbook.add_format({**head, "align": "right"})
        self.long = workbook.add_format({**top, "text_wrap": True})


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    format: str
    width: int | None

    @classmethod
    def of(cls, value: Any, place: str) -> Column:
        if isinstance(value, str):
            value = {"title": value}
        if not isinstance(value, dict):
            raise ValueError(f"{place} must be a title or an object, not {type(value).__name__}")
        try:
            _fields.object_of(value, _COLUMN, "a column")
            title = value.get("title", "")
            format = _fields.choice(value, "format", FORMATS) or "general"
            width = _fields.count(value, "width", least=1, most=255)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if not isinstance(title, str):
            raise ValueError(f"{place}.title must be text, not {type(title).__name__}")
        return cls(_written(title, f"{place}.title"), format, width)

    def cell(self, value: Any, place: str) -> str | int | float | bool | datetime | None:
        """``value`` as it goes into this column."""
        if value is None or value == "":
            return None
        if isinstance(value, str):
            if self.format in _DATES:
                return self._moment(value, place)
            if self.format in _NUMBERS:
                raise ValueError(f"{place} must be a number, not {value!r:.80}")
            return _written(value, place)
        if isinstance(value, bool):
            return value
        if not isinstance(value, int | float):
            raise ValueError(f"{place} must be text, a number, a boolean or null, not {type(value).__name__}")
        if self.format in _DATES:
            raise ValueError(f"{place} must be a {self.format} such as '2026-01-31', not {value!r:.80}")
        return str(value) if self.format == "text" or (isinstance(value, int) and abs(value) >= _EXACT) else value

    def _moment(self, value: str, place: str) -> datetime:
        try:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is not None:
                moment = moment.astimezone(UTC).replace(tzinfo=None)
        except (ValueError, OverflowError):
            raise ValueError(f"{place} must be a {self.format} such as '2026-01-31', not {value!r:.80}") from None
        if moment.date() < _FIRST_DATE:
            raise ValueError(f"{place}: Excel has no {self.format} before {_FIRST_DATE}, got {value!r:.80}")
        return moment


@dataclass(frozen=True, slots=True)
class Sheet:
    """One sheet of the input, checked but for its cells."""

    place: str
    name: str
    columns: list[Column]
    rows: list[Any]

    @classmethod
    def all_of(cls, value: Any) -> list[Sheet]:
        if not isinstance(value, list) or not value:
            raise ValueError("sheets must be a list of at least one sheet")
        if len(value) > MAX_SHEETS:
            raise ValueError(f"sheets has {len(value)} sheets, the limit is {MAX_SHEETS}")
        sheets = [cls.of(sheet, number) for number, sheet in enumerate(value)]
        places: dict[str, str] = {}
        for sheet in sheets:
            other = places.setdefault(sheet.name.lower(), sheet.place)
            if other != sheet.place:
                raise ValueError(f"{sheet.place}.name {sheet.name!r} is that of {other} too")
        return sheets

    @classmethod
    def of(cls, value: Any, number: int) -> Sheet:
        place = f"sheets[{number}]"
        try:
            _fields.object_of(value, _SHEET, "a sheet")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        columns, rows = value.get("columns"), value.get("rows", [])
        if not isinstance(columns, list) or not columns:
            raise ValueError(f"{place}.columns must be a list of at least one column")
        if len(columns) > MAX_COLUMNS:
            raise ValueError(f"{place}.columns has {len(columns)} columns, the limit is {MAX_COLUMNS}")
        if not isinstance(rows, list):
            raise ValueError(f"{place}.rows must be a list, not {type(rows).__name__}")
        if len(rows) >= MAX_ROWS:
            raise ValueError(f"{place}.rows has {len(rows)} rows, the limit is {MAX_ROWS - 1} below the titles")
        name = value.get("name")
        return cls(
            place,
            f"Sheet{number + 1}" if name is None else _sheet_name(name, f"{place}.name"),
            [Column.of(column, f"{place}.columns[{at}]") for at, column in enumerate(columns)],
            rows,
        )

    def write(self, page: Any, styles: Styles, ctx: RenderContext) -> None:
        last = len(self.columns) - 1
        for at, column in enumerate(self.columns):
            page.set_column(at, at, self._width(at, column))
            numeric = column.format in _NUMBERS or column.format in _DATES
            _write_text(page, 0, at, column.title, styles.head_of_numbers if numeric else styles.head)
        for number, row in enumerate(self.rows):
            if number % 1_000 == 0:
                ctx.check()
            self._write_row(page, number, row, styles)
        page.freeze_panes(1, 0)
        page.autofilter(0, 0, len(self.rows), last)
        page.set_landscape()
        page.set_paper(9)
        page.fit_to_pages(1, 0)
        page.repeat_rows(0)
        page.set_footer("&C&P / &N")

    def _write_row(self, page: Any, number: int, row: Any, styles: Styles) -> None:
        place = f"{self.place}.rows[{number}]"
        if not isinstance(row, list):
            raise ValueError(f"{place} must be a list, not {type(row).__name__}")
        if len(row) > len(self.columns):
            raise ValueError(f"{place} has {len(row)} cells, there are {len(self.columns)} columns")
        for at, (column, value) in enumerate(zip(self.columns, row, strict=False)):
            cell, style = column.cell(value, f"{place}[{at}]"), styles.cells[column.format]
            if isinstance(cell, str):
                _write_text(page, number + 1, at, cell, styles.long if len(cell) > 60 or "\n" in cell else style)
            elif isinstance(cell, bool):
                page.write_boolean(number + 1, at, cell, style)
            elif isinstance(cell, datetime):
                page.write_datetime(number + 1, at, cell, style)
            elif cell is not None:
                page.write_number(number + 1, at, cell, style)

    def _width(self, at: int, column: Column) -> float:
        """A width at which the first rows can be read, in characters."""
        if column.width is not None:
            return column.width
        lengths = [len(column.title) + 3, _WIDTHS.get(column.format, 8)]  # the filter's button is on the title
        for row in self.rows[:_LOOKED_AT]:
            if isinstance(row, list) and len(row) > at and row[at] is not None and column.format not in _DATES:
                extra = 4 if column.format in _NUMBERS else 2
                lengths.append(max(map(len, str(row[at])[:200].split("\n"))) + extra)
        return min(max(lengths), 60)


def _write_text(page: Any, row: int, column: int, value: str, style: Any) -> None:
    if value.startswith("<r>") and value.endswith("</r>"):
        # xlsxwriter takes such text for markup of its own and would write it as it is, formulas and all.
        page.write_rich_string(row, column, "<", "r", value[2:], style)
    else:
        page.write_string(row, column, value, style)


def _written(text: str, place: str) -> str:
    """``text`` when a cell can hold it, with what XML cannot hold replaced."""
    length = len(text.encode("utf-16-le", "replace")) // 2
    if length > MAX_CELL:
        raise ValueError(f"{place} has {length} characters, a cell holds {MAX_CELL}")
    return _NOT_IN_XML.sub("\ufffd", clean(text))


def _sheet_name(name: Any, place: str) -> str:
    if not isinstance(name, str):
        raise ValueError(f"{place} must be text, not {type(name).__name__}")
    if not name.strip():
        raise ValueError(f"{place} is blank")
    if len(name.encode("utf-16-le", "replace")) // 2 > MAX_NAME:
        raise ValueError(f"{place} {name!r:.80} is longer than {MAX_NAME} characters")
    if _UNFIT_FOR_NAME.search(name) or _written(name, place) != name or "\n" in name or "'" in (name[0], name[-1]):
        raise ValueError(f"{place} {name!r} has a character that names of sheets do not have")
    if name.lower() == "history":
        raise ValueError(f"{place} {name!r} is a name that Excel keeps for itself")
    return name


@cache
def _library() -> Any:
    try:
        import xlsxwriter
    except ImportError as error:
        raise ConfigurationError(f"{JOB_TYPE} needs xlsxwriter: pip install jobkit[sheets]") from error
    return xlsxwriter
