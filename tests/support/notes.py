"""An SQLite file with a table of the host's own."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from tests.support.databases import Database

NOTES = sa.Table(
    "host_notes", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("title", sa.Text)
)


@pytest.fixture
def engine(sqlite_database: Database) -> sa.Engine:
    NOTES.create(sqlite_database.engine)
    return sqlite_database.engine
