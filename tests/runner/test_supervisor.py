"""Calls to the database that never answer: the runner's threads get over them, and no job is lost or done twice."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, JobStore, Rendered, Runner
from jobkit.db.connections import DedicatedConnection, SharedConnection
from tests.support.databases import Database
from tests.support.invariants import violations
from tests.support.proxy import Proxy
from tests.support.recorder import Recorder
from tests.support.runners import Gate, note, only, statuses, until


@pytest.fixture
def proxy(postgres_database: Database) -> Iterator[Proxy]:
    url = postgres_database.engine.url
    assert url.host is not None
    with Proxy(url.host, url.port or 5432) as proxy:
        yield proxy


@pytest.fixture
def engine(postgres_database: Database, proxy: Proxy) -> Iterator[sa.Engine]:
    """The database through the proxy."""
    engine = sa.create_engine(postgres_database.engine.url.set(host="127.0.0.1", port=proxy.port))
    yield engine
    # What was left behind in a call ends with its socket, and gives its connection back, before the pool is closed.
    proxy.close()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("jobkit-")])
    engine.dispose()


def create(database: Database, count: int = 1) -> list[jobkit.Job]:
    """Jobs, made past the proxy."""
    with database.engine.begin() as connection:
        return [JobStore(connection).create("acme", job_type="note") for _ in range(count)]


def test_connections_that_fall_silent_under_load_are_cut_and_no_job_is_lost_or_done_twice(
    postgres_database: Database,
    engine: sa.Engine,
    proxy: Proxy,
    tmp_path: Path,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rendered: list[Any] = []

    def render(ctx: jobkit.RenderContext) -> Rendered:
        rendered.append(ctx.job_id)
        return note(ctx)

    store = AssetStore(tmp_path / "assets", engine=postgres_database.engine)
    jobs = create(postgres_database, 300)
    with Runner(engine, store, only(render), lease=20, db_timeout=1.5, poll_interval=0.05) as runner:
        for count in (20, 100, 200):
            until(lambda count=count: runner.metrics().ended >= count)  # type: ignore[misc]
            proxy.stall()
        until(lambda: statuses(postgres_database.engine) == ["done"] * 300, timeout=60)
        until(lambda: len(recorder.types()) >= 600, timeout=60)
    assert len(recorder.types()) == len({(event.job_id, event.seq) for event in recorder.events})
    # What was claimed ahead of a slot may have gone back meanwhile, and was claimed again.
    told = Counter(recorder.types())
    assert told.keys() <= {"queued", "running", "done"}
    assert (told["done"], told["running"] - told["queued"]) == (300, 300)
    assert violations(postgres_database.engine, tmp_path / "assets") == []
    assert {job.id for job in jobs} == set(rendered)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) < 30


def test_a_database_that_answers_nobody_costs_threads_that_are_replaced_and_counted(
    postgres_database: Database, engine: sa.Engine, proxy: Proxy, tmp_path: Path, recorder: Recorder
) -> None:
    store, gate = AssetStore(tmp_path / "assets", engine=postgres_database.engine), Gate()
    raised: list[BaseException] = []

    def render(ctx: jobkit.RenderContext) -> Rendered:
        found = gate(ctx)
        try:
            ctx.check()
        except BaseException as error:
            raised.append(error)
            raise
        return found

    with Runner(engine, store, only(render), lease=0.6, db_timeout=0.2, poll_interval=0.05) as runner:
        create(postgres_database)
        gate.entered()
        proxy.stall(new=True)
        until(lambda: runner.metrics().replaced >= 3)
        gate.open()
        until(lambda: raised)
        assert isinstance(raised[0], jobkit.LeaseLost)  # nobody could tell this worker that its lease goes on
        proxy.resume()
        until(lambda: statuses(postgres_database.engine) == ["done"], timeout=60)
    assert violations(postgres_database.engine, tmp_path / "assets") == []


def test_stop_returns_in_time_when_the_database_answers_nobody(
    postgres_database: Database, engine: sa.Engine, proxy: Proxy, tmp_path: Path
) -> None:
    store, gate = AssetStore(tmp_path / "assets", engine=postgres_database.engine), Gate()
    runner = Runner(engine, store, only(gate), lease=60, db_timeout=30, poll_interval=0.05).start()
    create(postgres_database)
    gate.entered()
    proxy.stall(new=True)
    gate.open()
    begun = time.monotonic()
    runner.stop(timeout=0.5)
    assert time.monotonic() - begun < 25  # 0.5, the wait for its last statement, that for the last events


def test_a_statement_of_sqlite_that_goes_on_is_interrupted(sqlite_database: Database) -> None:
    link, failed = DedicatedConnection(sqlite_database.engine), []
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

    def ask() -> None:
        try:
            with link.use() as connection:
                connection.exec_driver_sql(endless)
        except sa.exc.OperationalError as error:
            failed.append(str(error.orig))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: link.busy_for > 0.1)
    while thread.is_alive():
        link.abort()
        thread.join(0.05)
    assert failed == ["interrupted"]
    assert link.busy_for == 0
    with link.use() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
    link.close()


def test_a_thread_does_not_wait_for_ever_for_its_turn_of_a_shared_connection(database: Database) -> None:
    shared, entered, let_go = SharedConnection(database.engine, 0.05), threading.Event(), threading.Event()

    def hold() -> None:
        with shared.use():
            entered.set()
            assert let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    with shared.use() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
        assert shared.busy_for > 0.05
    let_go.set()
    thread.join()
    assert shared.busy_for == 0


def test_a_runner_whose_thread_fails_goes_on_with_another(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    """An error of jobkit itself, or a host's log handler that raises."""
    planned = jobkit.runner.pipeline.Pipeline._plan
    failures: list[str] = []

    def plan(self: Any) -> Any:
        if not failures:
            failures.append("once")
            raise RuntimeError("a mistake")
        return planned(self)

    monkeypatch.setattr("jobkit.runner.pipeline.Pipeline._plan", plan)
    store = AssetStore(tmp_path / "assets")
    with Runner(database.engine, store, only(note), poll_interval=0.05) as runner:
        create(database)
        until(lambda: statuses(database.engine) == ["done"])
        assert runner.metrics().replaced == 1


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), True, "5"])
def test_a_db_timeout_that_is_none_is_refused_with_its_name(wrong: Any, database: Database, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="db_timeout"):
        Runner(database.engine, AssetStore(tmp_path), only(note), db_timeout=wrong)
