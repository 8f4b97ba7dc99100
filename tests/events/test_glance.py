"""Glance: no commit to an SQLite file escapes a look at its write-ahead log, and silence costs no question."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import JobStore
from jobkit.db.dialects import statements_for
from jobkit.events import hints as glance
from jobkit.events.hints import WalFile
from tests.support.databases import Database
from tests.support.runners import until


def commit(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        JobStore(connection).create("acme", job_type="note")


def looking_at(engine: sa.Engine) -> WalFile:
    with engine.connect() as connection:
        return WalFile(statements_for(engine).log_file(connection))


@pytest.fixture(autouse=True)
def a_quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glance, "SETTLED", 100_000_000)


def test_silence_is_told_and_every_commit_is_seen_at_the_next_look(sqlite_database: Database) -> None:
    engine, other = sqlite_database.engine, sqlite_database.connect()
    looking = looking_at(engine)
    commit(other)
    assert looking.changed()
    until(lambda: not looking.changed())
    for _ in range(200):
        commit(other)
        assert looking.changed()
    until(lambda: not looking.changed())
    with other.connect() as connection:  # the log begins anew, and is as long as before after as many commits
        connection.exec_driver_sql("PRAGMA wal_checkpoint(RESTART)")
    commit(other)
    assert looking.changed()


def test_two_commits_within_one_tick_of_the_kernel_are_two(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(sqlite_database.engine)
    log = Path(f"{sqlite_database.engine.url.database}-wal")
    written = log.stat().st_mtime_ns
    monkeypatch.setattr(glance.time, "time_ns", lambda: written + 3_000_000)
    looking = looking_at(sqlite_database.engine)
    assert looking.changed()
    log.write_bytes(log.read_bytes()[::-1])  # nothing tells it from the write before
    os.utime(log, ns=(written, written))
    assert looking.changed()
    monkeypatch.setattr(glance.time, "time_ns", lambda: written + 200_000_000)
    assert looking.changed()
    assert not looking.changed()


def test_a_commit_that_is_flushed_slowly_is_seen_when_it_is_through(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    commit(sqlite_database.engine)
    log = Path(f"{sqlite_database.engine.url.database}-wal")
    written = log.stat().st_mtime_ns  # and the flush takes a second and a half from now
    looking = looking_at(sqlite_database.engine)
    for passed in (0, 10_000_000, 150_000_000, 1_500_000_000):
        monkeypatch.setattr(glance.time, "time_ns", lambda passed=passed: written + passed)
        assert looking.changed()


def test_a_file_is_looked_at_where_it_is_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        engine = sa.create_engine("sqlite:///jobs.db")
        monkeypatch.chdir(tmp_path)
        jobkit.configure_sqlite(engine)
        jobkit.migrations.upgrade(engine)
        assert looking_at(engine)._path == f"{tmp_path.resolve()}/{name}/jobs.db-wal"
        engine.dispose()


def test_a_log_is_believed_for_a_second(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(sqlite_database.engine)
    looking, begun = looking_at(sqlite_database.engine), time.monotonic()
    until(lambda: not looking.changed())
    monkeypatch.setattr(glance.time, "monotonic", lambda: begun + 3_600)
    assert looking.changed()
    assert not looking.changed()
    monkeypatch.setattr(glance.time, "monotonic", lambda: begun + 3_601.01)
    assert looking.changed()


def test_what_has_no_log_may_always_have_changed(postgres_database: Database, tmp_path: Path) -> None:
    memory = sa.create_engine("sqlite://")
    plain = sa.create_engine(f"sqlite:///{tmp_path}/plain.db")
    for engine in (postgres_database.engine, memory, plain):
        looking = looking_at(engine)
        assert [looking.changed() for _ in range(3)] == [True] * 3
    memory.dispose()
    plain.dispose()


def test_a_relay_in_silence_looks_and_asks_nothing(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    watched, changed = sqlite_database.connect(), WalFile.changed

    def looking(self: WalFile) -> bool:
        did.append("look")
        return changed(self)

    monkeypatch.setattr(WalFile, "changed", looking)
    sa.event.listen(watched, "connect", lambda driver, _: driver.set_trace_callback(did.append))
    heard: list[jobkit.JobEvent] = []
    end = jobkit.signals.subscribe("acme", heard.append)
    with jobkit.Relay(watched):
        for number in (1, 2):
            commit(sqlite_database.engine)
            until(lambda number=number: len(heard) == number)  # type: ignore[misc]
            until(lambda: did[-10:] == ["look"] * 10)
    end()
