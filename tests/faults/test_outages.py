"""The database goes away in the middle, or other processes work on it: nothing is lost, and nothing done twice."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, Rendered, Runner, RunnerMetrics
from jobkit.runner.turns import Committer
from jobkit.tables import content_jobs
from tests.support.databases import Database
from tests.support.invariants import violations
from tests.support.recorder import Recorder
from tests.support.runners import Gate, note, only, seen, statuses, until

Create = Callable[..., jobkit.Job]
WHOLE = ["queued", "running", "done"]


@contextmanager
def unreachable(database: Database) -> Iterator[None]:
    """PostgreSQL ends every connection and lets nobody in; SQLite's write lock is held."""
    if database.engine.dialect.name == "sqlite":
        with database.engine.connect() as connection:
            connection.exec_driver_sql("UPDATE content_jobs SET priority = priority")
            yield
            connection.rollback()
        return
    name = sa.make_url(database.url).database
    admin = sa.create_engine(
        sa.make_url(database.url).set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
    )
    ended = sa.text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = :name")
    with admin.connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
        until(lambda: connection.execute(ended, {"name": name}).scalar_one() == 0)
        yield
        connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
    database.engine.dispose()


def impatient(database: Database) -> sa.Engine:
    """An engine of the same database that gives up on SQLite's write lock soon."""
    engine = database.connect()
    if engine.dialect.name == "sqlite":
        jobkit.configure_sqlite(engine, busy_timeout=0.05, synchronous="NORMAL")
    return engine


def failing(runner: Runner, times: int) -> None:
    until(
        lambda: runner._running is not None and runner._running.pipeline._backoff.failures >= times, f"{times} failures"
    )


@pytest.mark.parametrize("moment", ["idle", "rendering", "storing"])
def test_jobs_in_flight_survive_an_outage(
    moment: str,
    database: Database,
    tmp_path: Path,
    create: Create,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, stored = Gate(), threading.Event()
    disk = AssetStore(tmp_path / "assets")
    storing = threading.Semaphore(0)
    original = disk.storage.publish

    def publish(uploads: Any) -> Any:
        storing.release(len(uploads))
        assert stored.wait(60)
        return original(uploads)

    monkeypatch.setattr(disk.storage, "publish", publish)
    runner = Runner(impatient(database), disk, only(gate), concurrency=3, poll_interval=0.02)
    with caplog.at_level(logging.WARNING, "jobkit"), runner:
        jobs = [] if moment == "idle" else [create() for _ in range(3)]
        if moment != "idle":
            gate.entered(3)
        if moment == "storing":
            gate.open()
            for _ in range(3):
                assert storing.acquire(timeout=60)
        jobs += [create() for _ in range(2)]
        with unreachable(database):
            gate.open()
            stored.set()
            failing(runner, 4)
        recorder.wait(lambda types: types.count("done") == len(jobs), 40)
        until(lambda: "the database answers again" in caplog.text)
    assert statuses(database.engine) == ["done"] * len(jobs)
    assert Counter(gate.jobs) == {job.id: 1 for job in jobs}
    assert [recorder.types(job.id) for job in jobs] == [WHOLE] * len(jobs)
    assert violations(database.engine, tmp_path / "assets") == []
    failures = [record for record in caplog.records if "the database failed" in record.message]
    assert 1 <= len(failures) <= 2
    assert len(caplog.records) < 12


def test_connections_that_are_cut_again_and_again_lose_no_job(
    postgres_database: Database, tmp_path: Path, recorder: Recorder
) -> None:
    engine = postgres_database.connect()
    admin = sa.create_engine(
        sa.make_url(postgres_database.url).set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
    )
    name = sa.make_url(postgres_database.url).database
    cut = sa.text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = :name")
    rendered: list[Any] = []

    def render(ctx: jobkit.RenderContext) -> Rendered:
        rendered.append(ctx.job_id)
        return note(ctx)

    with postgres_database.engine.begin() as connection:
        store = jobkit.JobStore(connection)
        jobs = [store.create("acme", job_type="note") for _ in range(200)]
    postgres_database.engine.dispose()
    with admin.connect() as connection, Runner(engine, AssetStore(tmp_path / "assets"), only(render)) as runner:
        for share in range(1, 6):
            until(lambda share=share: len(rendered) >= 30 * share, "progress", 40)
            connection.execute(cut, {"name": name})
        recorder.wait(lambda types: types.count("done") == 200, 60)
        runner.run_until_idle(timeout=60)
    assert Counter(rendered) == {job.id: 1 for job in jobs}
    assert Counter(event.job_id for event in recorder.events if event.type == "content_job.done") == Counter(rendered)
    assert violations(postgres_database.engine, tmp_path / "assets") == []


@pytest.mark.parametrize("lost", ["claim", "end"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_commit_whose_reply_is_lost_is_neither_lost_nor_done_twice(
    lost: str,
    stopped: bool,
    engine: sa.Engine,
    disk: AssetStore,
    create: Create,
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Committer._commit
    replies: list[str] = []

    def commit(self: Committer, connection: sa.Connection, turn: Any) -> Any:
        applied = original(self, connection, turn)
        if not replies and (applied.claimed if lost == "claim" else turn.completions):
            replies.append("lost")
            if stopped:
                running = runner._running or runner._ending  # the scan may tell the end before this
                assert running is not None
                running.pipeline.stop()
            raise sa.exc.OperationalError("COMMIT", {}, OSError("server closed the connection unexpectedly"))
        return applied

    monkeypatch.setattr(Committer, "_commit", commit)
    gate = Gate()
    gate.open()
    runner = Runner(engine, disk, only(gate), poll_interval=0.02)
    runner.start()
    job = create()
    runner.dispatch(job)
    put_back = stopped and lost == "claim"
    told = {"claim": ["queued", "running", *(["queued"] if put_back else WHOLE)], "end": WHOLE}
    recorder.wait(lambda types: types == told[lost])
    runner.stop()
    row = seen(engine, job)
    assert (row.status, row.attempt, len(gate.jobs)) == (("queued", 0, 0) if put_back else ("done", 1, 1))
    assert recorder.types() == told[lost]
    assert runner.metrics() == RunnerMetrics(ended=0 if put_back else 1)
    assert violations(engine, tmp_path / "assets") == []


def test_stop_returns_while_the_database_is_away(database: Database, tmp_path: Path, create: Create) -> None:
    gate = Gate()
    runner = Runner(impatient(database), AssetStore(tmp_path / "assets"), only(gate), poll_interval=0.02).start()
    job = create()
    gate.entered()
    create()
    with unreachable(database):
        gate.open()
        failing(runner, 2)
        stopping = threading.Thread(target=runner.stop, kwargs={"timeout": 0.1})
        stopping.start()
        stopping.join(60)
        assert not stopping.is_alive()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "jobkit-runner"])
    assert (seen(database.engine, job).status, seen(database.engine, job).fence) == ("running", 1)


# --- other runners on the same database


WORKER = """
import os, sys
import sqlalchemy as sa, jobkit
engine = sa.create_engine(sys.argv[1])
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine, synchronous="NORMAL")
log = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def render(ctx):
    os.write(log, f"{ctx.job_id} {os.getpid()}\\n".encode())
    return jobkit.Rendered("a.txt", "text/plain", b"x")
runner = jobkit.Runner(engine, jobkit.AssetStore(sys.argv[2]), jobkit.Renderers(default=render), poll_interval=0.01)
with runner:
    print("started", flush=True)
    sys.stdin.readline()
"""


def test_two_processes_and_two_runners_in_one_never_render_a_job_twice(
    database: Database, tmp_path: Path, recorder: Recorder
) -> None:
    log, folder, own = tmp_path / "log", tmp_path / "assets", []
    command = [sys.executable, "-c", WORKER, database.url, str(folder), str(log)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]

    def render(ctx: jobkit.RenderContext) -> Rendered:
        own.append(str(ctx.job_id))
        return note(ctx)

    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "started\n"
        runners = [Runner(database.connect(), AssetStore(folder), only(render), poll_interval=0.01) for _ in range(2)]
        with runners[0], runners[1]:
            for _ in range(10):
                with database.engine.begin() as connection:
                    store = jobkit.JobStore(connection)
                    for _ in range(20):
                        store.create("acme", job_type="note")
            recorder.wait(lambda types: types.count("done") == 200, 60)
    finally:
        for worker in workers:
            worker.communicate("\n", timeout=60)
    there = [line.split()[0] for line in log.read_text().splitlines()]
    assert Counter(own + there) == {str(job_id): 1 for job_id in ids(database.engine)}
    assert own
    assert there
    told = Counter((event.job_id, event.type) for event in recorder.events)
    assert (len(told), set(told.values())) == (600, {1})
    assert violations(database.engine, folder) == []


def ids(engine: sa.Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(content_jobs.c.id)).scalars())


def test_a_database_file_that_may_not_grow_delays_the_jobs_and_loses_none(
    sqlite_database: Database, tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    full, engine = threading.Event(), sqlite_database.connect()

    @sa.event.listens_for(engine, "before_cursor_execute")
    def limit(_connection: Any, cursor: Any, *_: Any) -> None:
        pages = cursor.execute("PRAGMA page_count").fetchone()[0]
        cursor.execute(f"PRAGMA max_page_count = {pages if full.is_set() else 1 << 30}").fetchall()

    store = AssetStore(tmp_path / "assets", engine=sqlite_database.engine)
    with Runner(engine, store, only(note), poll_interval=0.05) as runner:
        full.set()
        with sqlite_database.engine.begin() as connection:
            jobs = jobkit.JobStore(connection)
            for number in range(40):
                jobs.create("acme", job_type="note", input={"padding": f"{number}" * 2000})
        failing(runner, 3)
        full.clear()
        until(lambda: statuses(sqlite_database.engine) == ["done"] * 40, timeout=60)
    assert violations(sqlite_database.engine, tmp_path / "assets") == []
    assert len([record for record in caplog.records if "the database failed" in record.message]) <= 3
