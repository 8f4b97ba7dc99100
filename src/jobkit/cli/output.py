"""Output of commands: tables, JSON, errors. Text of users is printed without control characters."""

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
    """Print a table; each column but the last is padded to its widest cell."""
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
    """Print ``some`` of ``count`` items, one per line, and how many more there are."""
    for one in some:
        print(f"  {printable(str(one))}")
    if (more := count - len(some)) > 0:
        print(f"  and {more} more")


def plain(row: Any) -> dict[str, Any]:
    """A dataclass as a JSON object: times and ids become text."""
    return {field.name: text(getattr(row, field.name)) for field in dataclasses.fields(row)}


def text(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | float | dict) else str(value)


def complain(what: str | BaseException) -> None:
    """Print an error or a message as one line on standard error."""
    if isinstance(what, sa.exc.DBAPIError) and what.orig is not None:
        what = what.orig  # without the statement and SQLAlchemy's link
    told = error_message(what) if isinstance(what, BaseException) else what
    print(f"jobkit: {printable(' '.join(told.split()))}", file=sys.stderr)


def _width(cell: str) -> int:
    """The width of ``cell`` in columns of a terminal."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in cell)
    return len(cell) + wide - sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in cell)
