"""What commands print: columns, JSON, one-line complaints. Whatever users wrote, no terminal obeys it."""

from __future__ import annotations

import dataclasses
import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobkit.base.text import error_message, printable


def table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as what is in them; the last may be of any length."""
    lines = [[name.upper() for name in names], *([shown(value) for value in row] for row in rows)]
    widths = [max(_width(line[number]) for line in lines) for number in range(len(names) - 1)]
    for line in lines:
        cells = [cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=False)]
        print("  ".join([*cells, line[-1]]).rstrip())


def shown(value: object) -> str:
    """``value`` as a cell of a table."""
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    return printable(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value))


def sample(some: Sequence[object], count: int) -> None:
    """``some`` of ``count``, one a line, and how many more there are."""
    for one in some:
        print(f"  {printable(str(one))}")
    if (more := count - len(some)) > 0:
        print(f"  and {more} more")


def document(value: object) -> None:
    """``value`` as one line of JSON, in ASCII."""
    print(json.dumps(value))


def plain(row: Any) -> dict[str, Any]:
    """A dataclass as JSON has it: times and ids as text."""
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    return {name: text(value) for name, value in values.items()}


def text(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | float | dict) else str(value)


def complain(what: str | BaseException) -> None:
    """One line on standard error."""
    if isinstance(what, sa.exc.DBAPIError) and what.orig is not None:
        what = what.orig  # without the statement, and without the address of a page about it
    told = error_message(what) if isinstance(what, BaseException) else what
    print(f"jobkit: {printable(' '.join(told.split()))}", file=sys.stderr)


def _width(cell: str) -> int:
    """How many columns of a terminal ``cell`` takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in cell)
    return len(cell) + wide - sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in cell)
