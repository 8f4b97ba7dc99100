"""One database for all tests of a module, emptied after each: for long tables of small cases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from jobkit.tables import metadata
from tests.support.databases import Database, PostgresDatabase, SqliteDatabase


@contextmanager
def shared_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A migrated database of the kind ``request.param``, for a fixture of module scope."""
    database: Database
    if request.param == "sqlite":
        folder = request.getfixturevalue("tmp_path_factory").mktemp("shared")
        database = SqliteDatabase(folder / "host.db")
    else:
        database = PostgresDatabase(request.getfixturevalue("postgres"), request.getfixturevalue("postgres_template"))
    try:
        yield database
    finally:
        database.close()


def empty(engine: sa.Engine) -> None:
    """Delete every row of every table of ours."""
    with engine.begin() as connection:
        for table in metadata.sorted_tables:
            connection.execute(table.delete())


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest) -> Iterator[Database]:
    with shared_database(request) as database:
        yield database


@pytest.fixture
def database(shared: Database) -> Iterator[Database]:
    yield shared
    empty(shared.engine)
