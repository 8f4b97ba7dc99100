"""Runner: what a host sees of submit, dispatch, start, stop and run_until_idle."""

from __future__ import annotations

import signal as posix
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobEvent, Renderers, Runner, signals
from jobkit.tables import content_jobs
from tests.support.databases import Database
from tests.support.invariants import violations
from tests.support.recorder import ALL, Recorder
from tests.support.runners import Gate, counted, note, objects, only, seen, statuses, until

Create = Callable[..., jobkit.Job]
WHOLE = ["queued", "running", "done"]


def listen(receiver: Any) -> Callable[[], None]:
    """Connect to every signal; the function returned disconnects."""
    for signal in ALL:
        signal.connect(receiver)
    return lambda: [signal.disconnect(receiver) for signal in ALL] and None


# --- the order of steps


def test_every_event_is_told_after_its_commit_for_200_jobs(
    engine: sa.Engine, database: Database, disk: AssetStore, tmp_path: Path
) -> None:
    other = database.connect()
    wrong: list[str] = []
    events: list[JobEvent] = []

    def look(_: str, *, event: JobEvent) -> None:
        events.append(event)
        row = seen(other, event.job_id)
        told = {"queued": 0, "running": 1, "done": 2, "failed": 2}
        kind = event.type.removeprefix("content_job.")
        if told[row.status] < told[kind] or (told[kind] == 2 and row.status != kind) or row.event_seq < event.seq:
            wrong.append(f"{kind} {event.seq} was told when the row said {row.status} {row.event_seq}")
        if kind == "done":
            with other.connect() as connection:
                asset = disk.get_by_id(connection, event.payload["assetId"], company_id=event.company_id)
            if asset is None or disk.open(asset).read() != str(event.job_id).encode():
                wrong.append(f"{event.job_id} was told done without its asset")

    def sometimes(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        if ctx.input["number"] % 5 == 0:
            raise RuntimeError("every fifth")
        return note(ctx)

    stop = listen(look)
    with Runner(engine, disk, only(sometimes), concurrency=8) as runner, Session(engine) as session, session.begin():
        jobs = [
            jobkit.JobStore(session).create("acme", job_type="note", input={"number": number}) for number in range(200)
        ]
        session.commit()
        runner.dispatch(jobs[0])
        ends = ("content_job.done", "content_job.failed")
        until(lambda: sum(event.type in ends for event in list(events)) == 200, "the end of every job")
    stop()
    assert wrong == []
    assert statuses(engine) == ["failed" if number % 5 == 0 else "done" for number in range(200)]
    for job in jobs:
        # On a busy machine a job that was claimed ahead may have been put back, and claimed again.
        seqs = [event.seq for event in events if event.job_id == job.id]
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) in (3, 5, 7)
    assert violations(engine, tmp_path / "assets") == []


def test_running_is_committed_before_the_render_and_the_intent_before_the_object(
    engine: sa.Engine, database: Database, assets: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, job = database.connect(), create()
    at: dict[str, Any] = {}

    def look(step: str) -> None:
        row = seen(other, job)
        at[step] = (row.status, row.started_at is not None, row.finished_at is not None, counted(other))

    def render(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        look("render")
        return note(ctx)

    def publish(uploads: Any) -> Any:
        look("before the object")
        failures = original(uploads)
        look("after the object")
        return failures

    original = assets.storage.publish
    monkeypatch.setattr(assets.storage, "publish", publish)
    assert Runner(engine, assets, only(render)).run_until_idle(timeout=60) == 1
    look("end")
    rows = {"assets": 0, "asset_intents": 0, "content_job_events": 2}
    assert at == {
        "render": ("running", True, False, rows),
        "before the object": ("running", True, False, rows | {"asset_intents": 1}),
        "after the object": ("running", True, False, rows | {"asset_intents": 1}),
        "end": ("done", True, True, {"assets": 1, "asset_intents": 0, "content_job_events": 3}),
    }


def test_a_job_becomes_files_with_rows_in_any_storage(engine: sa.Engine, assets: AssetStore, create: Create) -> None:
    renderers = Renderers()

    @renderers.register("pair")
    def pair(ctx: jobkit.RenderContext) -> list[jobkit.Rendered]:
        return [
            jobkit.Rendered("a.txt", "text/plain", b"first"),
            jobkit.Rendered("b.bin", "application/x-b", [b"se", b"cond"]),
        ]

    job = create("pair", source_task_id="task-7")
    assert Runner(engine, assets, renderers).run_until_idle(timeout=60) == 1
    with engine.connect() as connection:
        files = assets.list_by_job(connection, job.id)
    assert [assets.open(file).read() for file in files] == [b"first", b"second"]
    assert seen(engine, job).result_asset_id == files[0].id
    assert {(f.source_task_id, f.job_id, f.created_by_agent_id, f.created_by_user_id) for f in files} == {
        ("task-7", job.id, None, None)
    }


# --- submit and dispatch


@pytest.mark.parametrize("started", [False, True])
def test_submit_commits_signals_and_dispatches(
    started: bool, engine: sa.Engine, disk: AssetStore, recorder: Recorder
) -> None:
    def where(_: str, *, event: JobEvent) -> None:
        threads.append(threading.current_thread().name)

    threads: list[str] = []
    runner = Runner(engine, disk, only())
    if started:
        runner.start()
    with signals.content_job_queued.connected_to(where):
        job = runner.submit("acme", job_type="note", input={"a": 1}, source_task_id="t")
    assert threads == ["jobkit-relay" if started else threading.current_thread().name]
    assert recorder.types(job.id)[:1] == ["queued"]
    assert (job.status, job.input, job.source_task_id, job.event_seq) == ("queued", {"a": 1}, "t", 1)
    if not started:
        assert seen(engine, job).status == "queued"
        assert runner.run_until_idle(timeout=60) == 1
    recorder.wait(lambda types: len(types) == 3)
    runner.stop()
    assert recorder.types(job.id) == WHOLE


def test_submit_refuses_what_create_refuses_and_leaves_nothing(engine: sa.Engine, disk: AssetStore) -> None:
    with pytest.raises(ValueError, match="job_type"):
        Runner(engine, disk, only()).submit("acme", job_type=" ")
    assert counted(engine)["content_job_events"] == 0


def test_submit_inside_a_written_sqlite_transaction_says_so_at_once(
    sqlite_database: Database, tmp_path: Path, recorder: Recorder
) -> None:
    runner = Runner(sqlite_database.engine, AssetStore(tmp_path / "assets"), only())
    with Session(sqlite_database.engine) as session, session.begin():
        session.execute(sa.select(content_jobs)).all()
        runner.submit("acme", job_type="note")
        jobkit.JobStore(session).create("acme", job_type="note")
        with pytest.raises(jobkit.ConfigurationError, match=r"JobStore\(session\).create"):
            runner.submit("acme", job_type="note")
    runner.submit("acme", job_type="note")
    assert len(recorder.types()) == 2


def test_submit_inside_a_postgresql_transaction_commits_by_itself(postgres_database: Database, tmp_path: Path) -> None:
    runner = Runner(postgres_database.engine, AssetStore(tmp_path / "assets"), only())
    with Session(postgres_database.engine) as session:
        jobkit.JobStore(session).create("acme", job_type="note")
        job = runner.submit("acme", job_type="note")
        session.rollback()
    assert seen(postgres_database.engine, job).status == "queued"


def test_dispatch_does_no_io_in_the_callers_thread_and_never_raises(
    engine: sa.Engine, database: Database, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    job, gate = create(), Gate()
    runner = Runner(engine, disk, only(gate))
    here, touched = threading.get_ident(), []
    for name in ("checkout", "connect"):
        sa.event.listen(engine.pool, name, lambda *_: touched.append(threading.get_ident()))
    runner.dispatch(job)
    assert touched == []
    assert seen(database.connect(), job).status == "queued"
    runner.start()
    touched.clear()
    for wanted in (job, job, None, "not a job"):
        runner.dispatch(wanted)  # type: ignore[arg-type]
    gate.entered()
    gate.open()
    recorder.wait(lambda types: "done" in types)
    assert here not in touched
    runner.stop()
    runner.dispatch(job)
    assert gate.jobs == [job.id]


def test_dispatch_before_the_commit_is_harmless(engine: sa.Engine, disk: AssetStore, recorder: Recorder) -> None:
    with Runner(engine, disk, only(), poll_interval=0.05) as runner:
        with Session(engine) as session, session.begin():
            job = jobkit.JobStore(session).create("acme", job_type="note")
            runner.dispatch(job)
            assert runner.run_until_idle(timeout=60) == 0
            assert recorder.types() == []
        recorder.wait(lambda types: types == WHOLE)
    assert recorder.types(job.id) == WHOLE


def test_twenty_threads_dispatching_one_job_render_it_once(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    gate = Gate()
    gate.open()
    with Runner(engine, disk, only(gate), concurrency=8) as runner:
        job = create()
        start = threading.Barrier(20)
        threads = [threading.Thread(target=lambda: (start.wait(), runner.dispatch(job))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: runner.metrics().ended == 1)  # the relay may tell of it before it is counted
        runner.dispatch(job)
        assert runner.run_until_idle(timeout=60) == 0
    assert gate.jobs == [job.id]
    assert recorder.types() == WHOLE


# --- start and stop


def test_stop_drains_what_is_in_flight_and_claims_nothing_more(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    gate = Gate()
    runner = Runner(engine, disk, only(gate), concurrency=2).start()
    for _ in range(3):
        runner.dispatch(create())
    gate.entered(2)
    stopping = threading.Thread(target=runner.stop)
    stopping.start()
    until(lambda: runner._running is None)
    gate.open()
    stopping.join(60)
    assert not stopping.is_alive()
    assert sorted(statuses(engine)) == ["done", "done", "queued"]
    assert recorder.types().count("done") == 2


@pytest.mark.parametrize("timeout", [0, 0.2, timedelta(milliseconds=100)])
def test_a_renderer_that_hangs_does_not_hold_stop_and_its_job_is_queued_again_uncharged(
    timeout: Any, engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder, tmp_path: Path
) -> None:
    job, gate = create(), Gate()
    runner = Runner(engine, disk, only(gate)).start()
    runner.dispatch(job)
    gate.entered()
    began = time.monotonic()
    runner.stop(timeout=timeout)
    assert time.monotonic() - began < 30
    row = seen(engine, job)
    assert (row.status, row.attempt, row.lease_until, row.worker_id, row.started_at) == ("queued", 0, None, None, None)
    assert recorder.types()[-1] == "queued"
    with pytest.raises(jobkit.LeaseLost):
        gate.contexts[0].check()
    gate.open()
    until(lambda: not any(thread.name.startswith("jobkit-render") for thread in threading.enumerate()))
    row = seen(engine, job)
    assert (row.status, row.fence, row.event_seq) == ("queued", 1, 3)
    assert counted(engine) == {"assets": 0, "asset_intents": 0, "content_job_events": 3}
    assert list((tmp_path / "assets").rglob("*.part")) == []
    assert runner.run_until_idle(timeout=60) == 1
    assert recorder.types() == ["running", "queued", "running", "done"]
    assert violations(engine, tmp_path / "assets") == []


def test_start_and_stop_and_start_again(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    runner = Runner(engine, disk, only(), poll_interval=0.05)
    runner.stop()
    for count in (1, 2, 3):
        assert runner.start() is runner.start()
        create()
        recorder.wait(lambda types, count=count: types.count("done") == count)
        runner.stop()
        runner.stop()
    create()
    assert runner.run_until_idle(timeout=60) == 1
    with runner as entered:
        assert entered is runner
    assert recorder.types() == WHOLE * 4
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("jobkit")])


def test_no_signal_handler_is_installed_and_every_thread_is_a_daemon(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    before = {number: posix.getsignal(number) for number in posix.valid_signals()}
    gate = Gate()
    with Runner(engine, disk, only(gate)) as runner:
        runner.dispatch(create())
        gate.entered()
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("jobkit")]
        assert len(threads) >= 3
        assert all(thread.daemon for thread in threads)
        assert {number: posix.getsignal(number) for number in posix.valid_signals()} == before
        gate.open()


HUNG = """
import sys, threading
import sqlalchemy as sa, jobkit
engine = sa.create_engine(sys.argv[1])
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)
entered = threading.Event()
async def asleep(ctx):
    import asyncio
    entered.set()
    await asyncio.Event().wait()
def hung(ctx):
    entered.set()
    threading.Event().wait()
runner = jobkit.Runner(engine, jobkit.AssetStore(sys.argv[2]), jobkit.Renderers(default=locals()[sys.argv[3]])).start()
runner.submit("acme", job_type="note")
assert entered.wait(60)
print("leaving", flush=True)
"""


@pytest.mark.parametrize("renderer", ["hung", "asleep"])
def test_a_process_with_a_renderer_that_hangs_exits(renderer: str, database: Database, tmp_path: Path) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", HUNG, url, str(tmp_path / "assets"), renderer]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (ended.returncode, ended.stdout) == (0, "leaving\n"), ended.stderr


# --- what is refused


def foreign_engine() -> sa.Engine:
    driver = ModuleType("driver")
    driver.paramstyle = "format"  # type: ignore[attr-defined]
    return sa.create_engine("mysql+pymysql://host/db", module=driver)


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (lambda: create_async_engine("postgresql+psycopg://host/db"), r"AsyncEngine.*postgresql\+psycopg"),
        (foreign_engine, "SQLite and PostgreSQL, not on mysql"),
        (lambda: sa.create_engine("sqlite:///x.db"), "configure_sqlite"),
        (lambda: "sqlite:///x.db", "needs a synchronous Engine, not str"),
    ],
)
def test_an_engine_that_would_not_do_is_refused(engine: Callable[[], Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(jobkit.ConfigurationError, match=complaint):
        Runner(engine(), AssetStore(tmp_path), only())


@pytest.mark.parametrize("concurrency", [0, -1, True, 1.5, "4", None])
def test_concurrency_is_a_count(concurrency: Any, sqlite_database: Database, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="concurrency"):
        Runner(sqlite_database.engine, AssetStore(tmp_path), only(), concurrency=concurrency)


@pytest.mark.parametrize("begin", [Runner.start, Runner.run_until_idle])
def test_a_database_without_the_tables_is_named(
    begin: Callable[[Runner], Any], engine: sa.Engine, disk: AssetStore
) -> None:
    jobkit.migrations.downgrade(engine)
    with pytest.raises(jobkit.SchemaOutOfDate, match=r"migrations.upgrade\(engine\)"):
        begin(Runner(engine, disk, only()))


@pytest.fixture
def memory(tmp_path: Path) -> Any:
    engine = sa.create_engine("sqlite://")
    jobkit.configure_sqlite(engine)
    jobkit.migrations.upgrade(engine)
    yield engine, AssetStore(tmp_path / "assets")
    engine.dispose()


@pytest.mark.parametrize("again", [1, 2])
def test_a_database_in_memory_works_in_one_thread_and_cannot_be_started(
    again: int, memory: tuple[sa.Engine, AssetStore], recorder: Recorder, tmp_path: Path
) -> None:
    engine, assets = memory

    async def slowly(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        return note(ctx)

    def more(_: str, *, event: JobEvent) -> None:
        if event.job_id == first.id:
            runner.submit("acme", job_type="note")

    runner = Runner(engine, assets, only(slowly))
    with pytest.raises(jobkit.ConfigurationError, match="in memory"):
        runner.start()
    first = runner.submit("acme", job_type="note")
    with signals.content_job_done.connected_to(more):
        assert runner.run_until_idle() == 2
    assert recorder.types() == WHOLE * 2
    assert runner.run_until_idle() == 0
    assert len(objects(tmp_path / "assets")) == 2
