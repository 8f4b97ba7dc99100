"""Databases without jobkit's tables, as a host has them before its first upgrade."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import migrations
from tests.support.databases import Database, PostgresDatabase, SqliteDatabase
from tests.support.seed import rows_of, schema_of

KINDS = ["sqlite", "postgresql"]


def unmigrated(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Database:
    """An empty database of this kind; on SQLite its engine enforces foreign keys, as careful hosts do."""
    if kind == "postgresql":
        return PostgresDatabase(request.getfixturevalue("postgres"), None)
    database = SqliteDatabase(tmp_path / "empty.db", migrate=False)
    enforce(database.engine)
    return database


def empty(*kinds: str) -> Any:
    """A fixture: an unmigrated database of each of these kinds."""

    @pytest.fixture(params=kinds)
    def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
        with closing(unmigrated(request.param, tmp_path, request)) as database:
            yield database

    return database


def empty_engine(*kinds: str, fill: Callable[[sa.Engine], object] = lambda _: None) -> Any:
    """A fixture: the engine of such a database, after ``fill`` of it."""

    @pytest.fixture(params=kinds)
    def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
        with closing(unmigrated(request.param, tmp_path, request)) as database:
            fill(database.engine)
            yield database.engine

    return engine


def enforce(engine: sa.Engine) -> None:
    """Turn on foreign keys on every new connection of an SQLite engine."""

    @sa.event.listens_for(engine, "connect")
    def on(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA foreign_keys = ON")


def enforced(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return bool(connection.exec_driver_sql("PRAGMA foreign_keys").scalar())


def run(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def refused(engine: sa.Engine, *reasons: str, kind: type[Exception] = jobkit.SchemaOutOfDate) -> None:
    """The upgrade is refused for these reasons, and nothing is changed."""
    before = schema_of(engine), rows_of(engine, leave_out="-")
    with pytest.raises(kind) as caught:
        migrations.upgrade(engine)
    for reason in reasons:
        assert reason in str(caught.value)
    assert (schema_of(engine), rows_of(engine, leave_out="-")) == before
