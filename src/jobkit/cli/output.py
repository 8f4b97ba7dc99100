"""Output of commands: tables, JSON, errors. Text of users is printed without control characters."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from jobkit.base.text import error_message, printable, without_secrets


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


T = TypeVar("T")
# Seconds between two lines about the progress of a command whose output is no terminal.
PACE = 10.0


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show on standard error how many of ``total`` are done, by a function that is told how many more are: as a bar on
    a terminal, where ``rich`` is installed (the extra ``cli``), else as a line every ten seconds.
    """
    bars = _bars() if sys.stderr.isatty() else None
    if bars is not None:
        with bars:
            task = bars.add_task(what, total=total)
            yield lambda count: bars.update(task, advance=count)
        return
    done, told = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        if time.monotonic() >= told + PACE:
            told = time.monotonic()
            complain(f"{done}{'' if total is None else f' of {total}'} {what}")

    yield advance


def until_interrupted(work: Callable[[Callable[[T], None]], T], empty: T, what: str, *parts: str) -> tuple[T, bool]:
    """The report of ``work``, and whether Ctrl-C ended it. ``work`` is given a function that it calls with the report
    so far after each batch, first ``empty``; the progress in ``what`` is the sum of the fields ``parts``.
    """
    last = empty
    with progress(what, None) as advance:

        def tell(report: T) -> None:
            nonlocal last
            advance(sum(getattr(report, part) - getattr(last, part) for part in parts))
            last = report

        try:
            return work(tell), False
        except KeyboardInterrupt:
            complain(f"interrupted: what is told was done; the same command goes on with the other {what}")
            return last, True


def _bars() -> Any:
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        return None
    return Progress(console=Console(stderr=True))


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
    print(f"jobkit: {without_secrets(printable(' '.join(told.split())))}", file=sys.stderr)


def _width(cell: str) -> int:
    """The width of ``cell`` in columns of a terminal."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in cell)
    return len(cell) + wide - sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in cell)
