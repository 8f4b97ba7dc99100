"""What holds back the events of other processes on PostgreSQL, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobStore
from jobkit.db.dialects import statements_for
from tests.support.databases import PostgresDatabase
from tests.support.moves import plain
from tests.support.postgres import QUICK, OwnServer, start_own_server


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    server = start_own_server((*QUICK, "wal_level=logical", "max_prepared_transactions=4"))
    yield server
    server.stop()


@contextmanager
def sending(url: str, *statements: str, after: str = "ROLLBACK") -> Iterator[None]:
    """Within it, these were sent on a connection of their own; then ``after``."""
    with closing(psycopg.connect(plain(url), autocommit=True)) as connection:
        for statement in statements:
            connection.execute(statement)
        yield
        connection.execute(after)


def elsewhere(url: str) -> str:
    return sa.make_url(url).set(database="postgres").render_as_string(hide_password=False)


Holder = Callable[[str], object]
HOLDING: dict[str, Holder] = {
    "a transaction that has written": lambda url: sending(url, "BEGIN", "CREATE TABLE wrote ()"),
    "one that has locked rows": lambda url: sending(url, "BEGIN", "SELECT * FROM content_jobs FOR KEY SHARE"),
    "one in another database": lambda url: sending(elsewhere(url), "BEGIN", "CREATE TEMPORARY TABLE wrote ()"),
    "a prepared one": lambda url: sending(
        url, "BEGIN", "CREATE TABLE prepared ()", "PREPARE TRANSACTION 'it'", after="ROLLBACK PREPARED 'it'"
    ),
    "a prepared one in another database": lambda url: sending(
        elsewhere(url), "BEGIN", "CREATE TABLE prepared ()", "PREPARE TRANSACTION 'it'", after="ROLLBACK PREPARED 'it'"
    ),
}
HARMLESS: dict[str, Holder] = {
    "a transaction that only reads": lambda url: sending(
        url, "BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT * FROM content_jobs"
    ),
    "a replication slot": lambda url: sending(
        url,
        "SELECT pg_create_logical_replication_slot('slot', 'pgoutput')",
        "SELECT pg_create_physical_replication_slot('other', true)",
        after="SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots",
    ),
}


@pytest.mark.parametrize("what", [*HOLDING, *HARMLESS])
def test_what_holds_back_the_events_of_others(what: str, server: OwnServer) -> None:
    with closing(PostgresDatabase(server, None)) as database:
        engine = database.engine
        jobkit.migrations.upgrade(engine)

        def create() -> None:
            with Session(engine) as session, session.begin():
                JobStore(session).create("acme", job_type="note")

        create()
        statements = statements_for(engine)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as reader:
            start = statements.start(reader)
            with (HOLDING | HARMLESS)[what](database.url):  # type: ignore[attr-defined]
                create()
                seen = len(statements.scan(reader, start.position, start, 9)[0])
            after = len(statements.scan(reader, start.position, start, 9)[0])
        assert (seen, after) == ((0, 1) if what in HOLDING else (1, 1))
