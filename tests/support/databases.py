"""A migrated database for one test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

import jobkit
from tests.support.postgres import Server


class Database(Protocol):
    """A database with jobkit's tables. ``engine`` is set up as a host would; ``connect`` gives further engines."""

    url: str
    engine: sa.Engine

    def connect(self, **options: Any) -> sa.Engine:
        """Another engine on the same database, closed with it."""

    def close(self) -> None:
        """Close every engine and drop the database."""


class _Engines:
    def __init__(self, url: str, prepare: Callable[[sa.Engine], None]) -> None:
        self.url, self._prepare = url, prepare
        self._engines: list[sa.Engine] = []
        self.engine = self.connect()

    def connect(self, **options: Any) -> sa.Engine:
        engine = sa.create_engine(self.url, **options)
        self._prepare(engine)
        self._engines.append(engine)
        return engine

    def close(self) -> None:
        for engine in self._engines:
            engine.dispose()


class SqliteDatabase(_Engines):
    def __init__(self, path: Path, *, migrate: bool = True) -> None:
        # Flushing to disk is what the fault tests are about, and they say so; the others need not wait for it.
        super().__init__(f"sqlite:///{path}", lambda engine: jobkit.configure_sqlite(engine, synchronous="NORMAL"))
        if migrate:
            jobkit.migrations.upgrade(self.engine)


class PostgresDatabase(_Engines):
    def __init__(self, server: Server, template: str | None) -> None:
        self._server = server
        super().__init__(server.create_database(template=template), lambda engine: None)

    def close(self) -> None:
        super().close()
        self._server.drop_database(self.url)
