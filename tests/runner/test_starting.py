"""What ``start`` looks at, and raises or waits for."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, ConfigurationError, Job, Runner, SchemaOutOfDate
from tests.support.databases import Database
from tests.support.proxy import Proxy
from tests.support.runners import Gate, only, seen, until
from tests.support.unmigrated import empty

Create = Callable[..., Job]
unmigrated = empty("sqlite", "postgresql")
WAITS = "as soon as the database is ready"
LEASE = 6.0


def stores(engine: sa.Engine, folder: Path) -> AssetStore:
    return AssetStore(folder / "assets", engine=engine)


@contextlib.contextmanager
def starting(runner: Runner) -> Iterator[threading.Thread]:
    """``start(wait=True)`` on a thread of its own."""
    thread = threading.Thread(target=runner.start, kwargs={"wait": True}, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        runner.stop(0)
        thread.join(60)
        assert not thread.is_alive()


def refused(runner: Runner, why: str) -> None:
    """The runner does not start."""
    try:
        with pytest.raises(ConfigurationError, match=why):
            runner.start()
    finally:
        runner.stop(0)


# --- the pool


@pytest.mark.parametrize("pool", [{"pool_size": 1, "max_overflow": 0}, {"poolclass": sa.AssertionPool}])
def test_a_pool_of_one_connection_is_refused(database: Database, tmp_path: Path, pool: dict[str, Any]) -> None:
    engine = database.connect(**pool)
    refused(Runner(engine, stores(engine, tmp_path), only()), r"at least 2 connections .* gives out 1: raise pool_size")


def test_two_connections_suffice_for_jobs_their_leases_and_their_signals(
    database: Database, tmp_path: Path, recorder: Any, create: Create
) -> None:
    engine, gate = database.connect(pool_size=2, max_overflow=0), Gate()
    with Runner(engine, stores(engine, tmp_path), only(gate), lease=LEASE) as runner:
        job = create()
        gate.entered()
        begun = seen(database.engine, job).lease_until
        until(lambda: seen(database.engine, job).lease_until > begun, "the renewal of the lease")
        # The host's own requests have the connection that the runner does not hold at the moment.
        runner.submit("acme", job_type="note")
        gate.open()
        until(lambda: seen(database.engine, job).status == "done", "the end of the job")
        recorder.wait(lambda types: "done" in types)
    assert (seen(database.engine, job).attempt, seen(database.engine, job).rescues) == (1, 0)


def test_a_pool_that_is_used_up_by_transactions_says_what_put_file_needs(
    postgres_database: Database, tmp_path: Path
) -> None:
    engine = postgres_database.connect(pool_size=1, max_overflow=0, pool_timeout=0.1)
    assets = stores(engine, tmp_path)
    with engine.begin() as connection:
        connection.execute(sa.text("SELECT 1"))
        with pytest.raises(sa.exc.TimeoutError, match="call put_file before the transaction"):
            assets.put_file("acme", original_filename="a.txt", content_type="text/plain", body=b"x")
    assert assets.put_file("acme", original_filename="a.txt", content_type="text/plain", body=b"x").byte_size == 1


# --- the folder for unfinished files


def test_a_folder_for_unfinished_files_that_cannot_be_made_is_named(engine: sa.Engine, tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / ".spool").touch()
    runner = Runner(engine, stores(engine, tmp_path), only())
    refused(runner, r"folder for unfinished files .*assets/\.spool")
    (tmp_path / "assets" / ".spool").unlink()
    with runner:
        pass


# --- the database and its tables


def test_without_the_tables_it_says_what_to_run(unmigrated: Database, tmp_path: Path) -> None:
    runner = Runner(unmigrated.engine, stores(unmigrated.engine, tmp_path), only())
    with pytest.raises(SchemaOutOfDate, match="jobkit migrate"):
        runner.start()


def test_it_waits_for_the_tables_and_says_so_once(
    unmigrated: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runner = Runner(unmigrated.engine, stores(unmigrated.engine, tmp_path), only())
    with starting(runner) as thread:
        until(lambda: WAITS in caplog.text, "the line in the log")
        jobkit.migrations.upgrade(unmigrated.engine)
        thread.join(60)
        assert runner.run_until_idle(60) == 0
        job = runner.submit("acme", job_type="note")
        until(lambda: seen(unmigrated.engine, job).status == "done")
    assert caplog.text.count(WAITS) == 1
    assert "the database and its tables are there" in caplog.text


def test_it_waits_for_a_server_that_comes_up_later(
    postgres_database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres_database.engine.url
    with Proxy(url.host or "", url.port or 0) as proxy:
        port = proxy.port
    engine = sa.create_engine(url.set(host="127.0.0.1", port=port))
    runner = Runner(engine, stores(engine, tmp_path), only())
    with pytest.raises(sa.exc.OperationalError):
        runner.start()
    with starting(runner) as thread:
        until(lambda: WAITS in caplog.text, "the line in the log")
        with Proxy(url.host or "", url.port or 0, listen=port):
            thread.join(60)
            job = runner.submit("acme", job_type="note")
            until(lambda: seen(postgres_database.engine, job).status == "done")
            runner.stop()
    engine.dispose()


def test_a_stop_ends_the_wait_and_nothing_is_started(unmigrated: Database, tmp_path: Path, caplog: Any) -> None:
    runner = Runner(unmigrated.engine, stores(unmigrated.engine, tmp_path), only())
    with starting(runner) as thread:
        until(lambda: WAITS in caplog.text, "the line in the log")
        assert runner.stop(0)
        thread.join(60)
        assert not thread.is_alive()
        jobkit.migrations.upgrade(unmigrated.engine)
    assert not [one for one in threading.enumerate() if one.name == "jobkit-runner"]
    with runner:  # another start is not affected
        job = runner.submit("acme", job_type="note")
        until(lambda: seen(unmigrated.engine, job).status == "done")


def test_a_stop_does_not_wait_for_a_start_that_a_silent_server_holds(
    postgres_database: Database, tmp_path: Path
) -> None:
    url = postgres_database.engine.url
    with Proxy(url.host or "", url.port or 0) as proxy:
        proxy.stall(new=True)
        engine = sa.create_engine(url.set(host="127.0.0.1", port=proxy.port))
        runner = Runner(engine, stores(engine, tmp_path), only())
        thread = threading.Thread(target=runner.start)
        thread.start()
        until(lambda: proxy.accepted, "a connection")
        assert runner.stop(0)
        proxy.resume()
        thread.join(60)
        assert not thread.is_alive()
        assert not [one for one in threading.enumerate() if one.name == "jobkit-runner"]
        engine.dispose()


def test_what_is_no_matter_of_time_is_raised_at_once(tmp_path: Path) -> None:
    engine = sa.create_engine("sqlite://")
    jobkit.configure_sqlite(engine)
    with pytest.raises(ConfigurationError, match="in memory"):
        Runner(engine, stores(engine, tmp_path), only()).start(wait=True)


# --- what stop tells


def test_stop_tells_whether_every_job_ended(engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    gate = Gate()
    runner = Runner(engine, disk, only(gate))
    assert runner.stop()
    runner.start()
    job = create()
    gate.entered()
    assert not runner.stop(0)
    assert seen(engine, job).status == "queued"
    gate.open()
    runner.start()
    until(lambda: seen(engine, job).status == "done")
    assert runner.stop()
