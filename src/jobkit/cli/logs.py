"""Logging of commands, where the app has none: escaped and cut for a terminal, or a JSON document per line."""

from __future__ import annotations

import argparse
import json
import logging
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from jobkit.base.text import printable, without_secrets
from jobkit.errors import ConfigurationError

LEVELS = ("debug", "info", "warning", "error", "critical")
# Characters of a message, and of a line of a traceback, that are shown; frames of a traceback; errors of a chain.
LONGEST, FRAMES, CHAIN = 4_000, 50, 10
_STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "taskName"}


def add(parser: argparse.ArgumentParser) -> None:
    """Add ``--log-level`` and ``--log-json``."""
    parser.add_argument("--log-level", type=str.lower, choices=LEVELS, help="the least level that is logged")
    parser.add_argument("--log-json", action="store_true", help="log a JSON document per line")


def configure(options: argparse.Namespace, *, plain: bool = True) -> None:
    """Log to standard error, unless the app, which was imported before, has configured logging itself. ``plain``: only
    warnings, only their text.

    ``--log-level`` sets the level of jobkit's records in any case. ``ConfigurationError`` for ``--log-json`` where the
    app has a handler of its own.
    """
    ours = logging.getLogger("jobkit")
    ours.disabled = False  # dictConfig disables what is there before it, unless it is told not to
    if not ours.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter() if options.log_json else TerminalFormatter(plain=plain))
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.WARNING if plain else logging.INFO)
    elif options.log_json:
        raise ConfigurationError("--log-json: the app has configured logging itself, so configure its format there")
    if options.log_level is not None:
        ours.setLevel(options.log_level.upper())


class TerminalFormatter(logging.Formatter):
    """A record as one line, its error as indented lines. What users wrote is escaped and cut, and moves no terminal."""

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        self._plain = plain

    def format(self, record: logging.LogRecord) -> str:
        head = "" if self._plain else f"{self.formatTime(record)} {record.levelname} "
        return "\n  ".join([head + _one_line(record.getMessage()), *_error_lines(record)])


class JsonFormatter(logging.Formatter):
    """A record as one JSON document of ASCII: time, level, logger, message, what it has as ``extra``, its error."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _one_line(record.getMessage()),
        }
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        document |= {name: _one_line(value) if isinstance(value, str) else value for name, value in extra.items()}
        if error := list(_error_lines(record)):
            document["error"] = "\n".join(error)
        return json.dumps(document, default=lambda value: _one_line(str(value)))


def _error_lines(record: logging.LogRecord) -> Iterator[str]:
    """The traceback of the record's error, a cause before its consequence: each frame, then class and text."""
    error = record.exc_info[1] if record.exc_info else None
    chain: list[BaseException] = []
    while error is not None and error not in chain and len(chain) < CHAIN:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    for error in reversed(chain):
        for frame in traceback.extract_tb(error.__traceback__, limit=-FRAMES).format():
            yield from (_one_line(line) for line in frame.splitlines())
        yield f"{type(error).__qualname__}: {_one_line(_text(error))}"
        for part in getattr(error, "exceptions", ())[:CHAIN]:  # of an ExceptionGroup
            yield f"  {type(part).__qualname__}: {_one_line(_text(part))}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its text cannot be had"


def _one_line(text: str) -> str:
    """``text``, at most ``LONGEST`` characters of it, line ends and other controls as ``\\n`` and ``\\x1b``."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"
    if cut != printable(cut):
        cut = "".join(c if c == printable(c) else c.encode("unicode_escape").decode() for c in cut)
    return without_secrets(cut)
