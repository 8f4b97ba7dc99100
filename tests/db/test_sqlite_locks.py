"""SQLite beside other writers: a view that reads takes no lock, one that writes waits for its turn."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobStore, configure_sqlite
from jobkit.base.ids import new_id
from jobkit.db.sqlite import _begin_before_write, writing_in_this_thread
from jobkit.tables import content_jobs
from tests.support import busy, notes
from tests.support.databases import Database
from tests.support.notes import NOTES

engine = notes.engine


def in_transaction(connection: sa.Connection) -> bool:
    driver: Any = connection.connection.driver_connection
    return bool(driver.in_transaction)


def change_nothing(connection: sa.Connection) -> None:
    with suppress(jobkit.JobNotFound):
        JobStore(connection).transition(new_id(), status="done")


READING: dict[str, Callable[[sa.Connection], object]] = {
    "job": lambda c: JobStore(c).get_by_id(new_id()),
    "list": lambda c: JobStore(c).list_by_company("acme", limit=5),
    "orm": lambda c: Session(c).scalars(sa.select(content_jobs.c.id)).all(),
    "half read": lambda c: c.execute(sa.select(content_jobs)).fetchone(),
    "unread": lambda c: c.execute(sa.select(content_jobs)),
    "inspect": lambda c: sa.inspect(c).get_table_names(),
    "missing": change_nothing,
}


@pytest.mark.parametrize("name", READING)
def test_a_view_that_only_reads_has_no_lock_and_waits_for_none(
    engine: sa.Engine, sqlite_database: Database, name: str
) -> None:
    impatient = sqlite_database.connect()
    configure_sqlite(impatient, busy_timeout=0, synchronous="NORMAL")
    with engine.begin() as connection:
        for _ in range(3):
            JobStore(connection).create("acme", job_type="note")
    with engine.begin() as writer:
        JobStore(writer).create("acme", job_type="note")  # holds the write lock
        with impatient.connect() as reader:
            READING[name](reader)
            assert not in_transaction(reader)
    with impatient.connect() as reader:
        READING[name](reader)
        with sqlite_database.connect(connect_args={"timeout": 0}).begin() as other:
            JobStore(other).create("acme", job_type="note")  # not blocked by the reader
        checkpoint = reader.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
        assert checkpoint[0] == 0  # nor is a checkpoint held back by an old snapshot
        JobStore(reader).create("acme", job_type="note")  # and its own write does not fail on one


def test_a_result_is_streamed_where_the_host_asks_for_it(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(NOTES.insert(), [{"title": str(number)} for number in range(5_000)])
    query = sa.select(NOTES.c.title).order_by(NOTES.c.id)
    with engine.connect() as connection:
        for options in ({}, {"stream_results": True}, {"yield_per": 7}):
            result = connection.execute(query, execution_options=options)
            assert [title for (title,) in result] == [str(number) for number in range(5_000)]
        streamed = connection.execute(query, execution_options={"yield_per": 7})
        assert len(next(streamed.partitions())) == 7
        driver: Any = streamed.cursor
        assert driver.fetchone() is not None  # SQLite still has rows to give
        streamed.close()
        whole = connection.execute(query)
        assert whole.fetchmany(2) == [("0",), ("1",)]
        assert whole.cursor.fetchone() is None
        assert len(whole.all()) == 4_998


# --- beside busy writers


@contextmanager
def busy_threads(path: str) -> Iterator[None]:
    stop = threading.Event()
    going = [threading.Event(), threading.Event()]
    threads = [threading.Thread(target=busy.write, args=(path, stop.is_set, event.set)) for event in going]
    for thread in threads:
        thread.start()
    try:
        assert all(event.wait(60) for event in going)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def busy_processes(path: str) -> Iterator[None]:
    command = [sys.executable, busy.__file__, path]
    with ExitStack() as stack:
        for _ in range(2):
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert process.stdin is not None
            stack.callback(process.stdin.close)
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
        yield


@pytest.mark.parametrize("writers", [busy_threads, busy_processes])
def test_a_read_followed_by_a_create_never_meets_a_locked_database(
    engine: sa.Engine, sqlite_database: Database, writers: Callable[[str], Any]
) -> None:
    configure_sqlite(engine, synchronous="NORMAL", busy_timeout=60)
    count = sa.select(sa.func.count()).select_from(content_jobs)
    some = sa.select(content_jobs.c.id).limit(20)
    number = made = others = 0
    with writers(str(engine.url.database)):
        # A busy machine gives the other writers little time: go on until enough of their commits fell between a read
        # and the write that followed.
        while number < 250 or others <= 50:
            with Session(engine) as session, session.begin():
                before = session.scalar(count)
                half_read = session.execute(some)
                half_read.fetchone()
                if number % 2:
                    with session.begin_nested():
                        JobStore(session).create("acme", job_type="note")
                job = JobStore(session).create("acme", job_type="note")
                JobStore(session).transition(job.id, status="running")
                others += session.scalar(count) - before - 1 - number % 2  # type: ignore[operator]
            made += 1 + number % 2
            number += 1
    with engine.connect() as connection:
        assert len(JobStore(connection).list_by_company("acme")) == made >= 375


def test_who_waits_too_long_for_the_lock_gets_sqlalchemys_error(engine: sa.Engine, sqlite_database: Database) -> None:
    impatient = sqlite_database.connect()
    configure_sqlite(impatient, busy_timeout=timedelta(milliseconds=200))
    with engine.begin() as connection, impatient.connect() as waiting:
        connection.execute(NOTES.insert(), {"title": "a"})
        began = time.monotonic()
        with pytest.raises(sa.exc.OperationalError, match="database is locked") as refused:
            JobStore(waiting).create("acme", job_type="note")
        assert 0.15 < time.monotonic() - began < 60
        assert isinstance(refused.value.orig, sqlite3.OperationalError)
        waiting.rollback()
        connection.rollback()
        JobStore(waiting).create("acme", job_type="note")


def test_a_thread_whose_former_connection_begins_for_another_is_not_taken_for_the_writer(
    sqlite_database: Database,
) -> None:
    """One pooled connection, written with here, then begun with in another thread: at that very moment we ask."""
    engine, told = sqlite_database.connect(pool_size=1, max_overflow=0), []
    with engine.begin() as connection:
        JobStore(connection).create("acme", job_type="note")
        assert writing_in_this_thread(engine)

    def ask() -> None:
        asked.wait(60)
        told.append(writing_in_this_thread(engine))
        answered.set()

    class Slow:
        def __init__(self, cursor: Any) -> None:
            self.cursor = cursor

        def execute(self, statement: str) -> None:
            self.cursor.execute(statement)
            asked.set()
            assert answered.wait(60)

    def begin() -> None:
        with engine.connect() as connection:
            _begin_before_write(connection, Slow(connection.connection.cursor()), "INSERT")
            told.append(writing_in_this_thread(engine))
            connection.connection.rollback()

    asked, answered = threading.Event(), threading.Event()
    other = threading.Thread(target=begin)
    other.start()
    ask()
    other.join(60)
    assert told == [False, True]
