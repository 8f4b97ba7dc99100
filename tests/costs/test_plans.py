"""How each hot statement reads tables: as it did when somebody looked at it last, and never a whole table."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import sqlalchemy as sa

from jobkit import AssetStore
from tests.costs.plans import kept
from tests.support.hot import HOT, Host, paths, told
from tests.support.plans import Paths, explained
from tests.support.shared import shared_database

# Indexes of what waits and what runs only: to read one from an end reads nothing of what is over.
PARTIAL = (
    "content_jobs_queued_idx", "content_jobs_scheduled_idx", "content_jobs_due_idx", "content_jobs_running_idx",
)  # fmt: skip
# The most rows that one hot statement reads of a table, where the database says so.
MOST = 300


class Taken(NamedTuple):
    engine: sa.Engine
    paths: dict[str, Paths]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def taken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    with shared_database(request) as database:
        yield Taken(database.engine, paths(database.engine, tmp_path_factory.mktemp("assets")))


def test_every_hot_statement_reads_tables_as_it_did_when_somebody_looked(taken: Taken) -> None:
    file = kept(taken.engine.dialect.name)
    before, now = file.read_text(encoding="utf-8"), told(taken.paths)
    changes = "".join(difflib.unified_diff(before.splitlines(True), now.splitlines(True), file.name, "now", n=3))
    assert not changes, f"if this is better, keep it: python -m tests.costs.plans\n{changes}"


def test_no_hot_statement_reads_a_whole_table(taken: Taken) -> None:
    bad = [
        f"{name} reads {path}"
        for name, found in taken.paths.items()
        for path in found
        if path.endswith(": all") or ("from one end" in path and not path.endswith(PARTIAL))
    ]
    assert bad == []


def test_no_hot_statement_reads_many_rows(taken: Taken) -> None:
    assert {name for name, found in taken.paths.items() if max(found.values(), default=0) > MOST} == set()


def test_an_index_that_is_gone_is_seen(taken: Taken, tmp_path: Path) -> None:
    host = taken.engine, AssetStore(tmp_path, engine=taken.engine)
    taken.engine.dispose()  # SQLite keeps a plan that was explained on the same connection
    with taken.engine.connect() as connection:
        connection.exec_driver_sql("DROP INDEX content_jobs_queued_idx")
        with explained(taken.engine) as found:
            HOT["claim"](Host(connection, *host))
        connection.rollback()
    assert found.keys() != taken.paths["claim"].keys()
