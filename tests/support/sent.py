"""What is sent to a database."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa

from tests.support.databases import Database

Heard = Callable[[sa.Connection, str, Any], object]


@contextmanager
def hearing(engine: sa.Engine, heard: Heard) -> Iterator[None]:
    """Call ``heard`` with every statement and its parameters, as the driver gets them, right before it is sent."""

    def listen(connection: sa.Connection, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        heard(connection, statement, parameters)

    sa.event.listen(engine, "before_cursor_execute", listen)
    try:
        yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", listen)


class Bill:
    """What is asked of a database over ``engine``, as its driver gets it: also what goes past SQLAlchemy."""

    def __init__(self, database: Database) -> None:
        self._items: list[str] = []
        if database.engine.dialect.name == "sqlite":
            self.engine = database.connect()
            sa.event.listen(self.engine, "connect", lambda driver, _: driver.set_trace_callback(self._heard))
        else:
            self.engine = database.connect(connect_args={"cursor_factory": _cursor(self._heard)})
            sa.event.listen(self.engine, "commit", lambda _: self._heard("COMMIT"))

    def take(self) -> str:
        """How many statements and commits it was since the last call, and which: ``2, 1: read jobs; update jobs``.

        With ``+`` between what one statement writes.
        """
        items = self._items.copy()
        self._items.clear()
        statements = [item for item in items if item != "COMMIT"]
        return f"{len(statements)}, {len(items) - len(statements)}: {'; '.join(statements)}"

    def _heard(self, text: str) -> None:
        if not text.startswith("BEGIN"):
            self._items.append(text if text == "COMMIT" else _named(text))


def _cursor(heard: Callable[[str], object]) -> type[psycopg.Cursor[Any]]:
    class Cursor(psycopg.Cursor[Any]):
        def execute(self, query: Any, *arguments: Any, **options: Any) -> Any:
            heard(query)
            return super().execute(query, *arguments, **options)

    return Cursor


_TABLES = {"content_jobs": "jobs", "content_job_events": "events", "assets": "assets", "asset_intents": "intents"}
_WRITES = re.compile(rf"\b(INSERT INTO|UPDATE|DELETE FROM) ({'|'.join(_TABLES)})\b")


def _named(text: str) -> str:
    """A statement by the tables that it writes, else by those that it reads."""
    if writes := [f"{verb.split()[0].lower()} {_TABLES[table]}" for verb, table in _WRITES.findall(text)]:
        return " + ".join(writes)
    return " ".join(["read", *(short for table, short in _TABLES.items() if re.search(rf"\b{table}\b", text))])
