"""What can go wrong between claim and finish, and that each of it stays with its own job."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, Rendered, Renderers, Runner
from jobkit.runner.pipeline import Pipeline
from jobkit.tables import asset_intents, content_jobs
from tests.support.databases import Database
from tests.support.invariants import violations
from tests.support.recorder import Recorder
from tests.support.runners import Gate, counted, note, objects, only, seen, statuses, until

Create = Callable[..., jobkit.Job]
WHOLE = ["queued", "running", "done"]
FAILED = ["queued", "running", "failed"]


def raising(error: BaseException) -> Renderers:
    def render(ctx: jobkit.RenderContext) -> Rendered:
        raise error

    return only(render)


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


# --- failed jobs


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no such font"), "no such font"),
        (ValueError(), "ValueError"),
        (ValueError("  \n "), "ValueError"),
        (Mute(), "Mute"),
        (KeyError("name"), "'name'"),
        (ValueError("a\0b\ud800c\x1b[31m"), "a\ufffdb\ufffdc\ufffd[31m"),
        (ValueError("x" * 20_000_000), "x" * 1_999 + "…"),
        (ValueError("é" * 2_000), "é" * 2_000),
        (SystemExit(3), "3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (asyncio.CancelledError(), "CancelledError"),
        (GeneratorExit(), "GeneratorExit"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_whatever_a_renderer_raises_fails_its_job_with_a_message_that_can_be_stored(
    error: BaseException, message: str, engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    job = create()
    assert Runner(engine, disk, raising(error)).run_until_idle(timeout=60) == 1
    row = seen(engine, job)
    assert (row.status, row.error_message, row.result_asset_id) == ("failed", message, None)
    assert row.finished_at is not None
    assert recorder.types(job.id) == FAILED
    assert recorder.events[-1].payload == {"jobId": str(job.id), "errorMessage": message}
    assert counted(engine) == {"assets": 0, "asset_intents": 0, "content_job_events": 3}


def empty(ctx: jobkit.RenderContext) -> list[Rendered]:
    return []


def half(ctx: jobkit.RenderContext) -> Iterator[Rendered]:
    yield note(ctx)
    raise RuntimeError("after the first file")


def too_large(ctx: jobkit.RenderContext) -> Rendered:
    return Rendered("big.bin", "application/octet-stream", b"x" * 1_001)


def without_bytes(ctx: jobkit.RenderContext) -> Rendered:
    return Rendered("none.txt", "text/plain", b"")


@pytest.mark.parametrize(
    ("renderers", "complaint"),
    [
        (only(empty), "gave no file"),
        (only(half), "after the first file"),
        (only(too_large), "1000"),
        (only(without_bytes), "none.txt"),
        (Renderers(), "no renderer for job type 'note'"),
        (only(lambda ctx: "text"), "not Rendered"),
    ],
)
def test_a_failed_job_leaves_no_row_and_no_object(
    renderers: Renderers, complaint: str, engine: sa.Engine, tmp_path: Path, create: Create, recorder: Recorder
) -> None:
    job, folder = create(), tmp_path / "assets"
    assert Runner(engine, AssetStore(folder, max_bytes=1_000), renderers).run_until_idle(timeout=60) == 1
    assert complaint in seen(engine, job).error_message
    assert recorder.types() == FAILED
    assert counted(engine) == {"assets": 0, "asset_intents": 0, "content_job_events": 3}
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_a_file_of_exactly_the_limit_passes(engine: sa.Engine, tmp_path: Path, create: Create) -> None:
    job = create()
    Runner(engine, AssetStore(tmp_path / "assets", max_bytes=36), only()).run_until_idle(timeout=60)
    assert seen(engine, job).status == "done"


@pytest.mark.parametrize("error", [OSError("disk full"), asyncio.CancelledError()])
def test_a_storage_that_fails_fails_the_job_and_its_object_has_an_intent(
    error: BaseException,
    engine: sa.Engine,
    assets: AssetStore,
    create: Create,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def second_fails(uploads: Any) -> Any:
        return original(uploads[:1]) | {uploads[1].key: error}

    original = assets.storage.publish
    monkeypatch.setattr(assets.storage, "publish", second_fails)
    job = create()
    assert Runner(engine, assets, only(lambda ctx: [note(ctx), note(ctx)])).run_until_idle(timeout=60) == 1
    assert (seen(engine, job).status, recorder.types()) == ("failed", FAILED)
    assert counted(engine) == {"assets": 0, "asset_intents": 2, "content_job_events": 3}
    assert list(tmp_path.rglob("*.part")) == []


# --- a claim that is lost


def take(engine: sa.Engine, job: jobkit.Job, status: str) -> None:
    with engine.begin() as connection:
        jobkit.JobStore(connection).transition(job.id, expect="running", status=status)


@pytest.mark.parametrize("status", ["cancelled", "failed", "done"])
def test_a_job_that_was_ended_by_hand_is_not_ended_again(
    status: str,
    engine: sa.Engine,
    disk: AssetStore,
    create: Create,
    recorder: Recorder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = Gate()
    with Runner(engine, disk, only(gate)) as runner:
        job = create()
        runner.dispatch(job)
        gate.entered()
        take(engine, job, status)
        before = seen(engine, job)
        gate.open()
        assert runner.run_until_idle(timeout=60) == 0
        recorder.wait(lambda types: types == ["queued", "running", status])
    assert seen(engine, job) == before
    assert counted(engine) == {"assets": 0, "asset_intents": 1, "content_job_events": 3}
    assert len(objects(tmp_path / "assets")) == 1
    assert f"job {job.id} was taken from this runner; its result is dropped" in caplog.text


def test_a_job_that_was_deleted_leaves_nothing_but_an_intent(
    engine: sa.Engine, disk: AssetStore, create: Create, tmp_path: Path
) -> None:
    gate = Gate()
    with Runner(engine, disk, only(gate)) as runner:
        job = create()
        runner.dispatch(job)
        gate.entered()
        with engine.begin() as connection:
            connection.execute(content_jobs.delete().where(content_jobs.c.id == job.id))
        gate.open()
        assert runner.run_until_idle(timeout=60) == 0
    assert counted(engine) == {"assets": 0, "asset_intents": 1, "content_job_events": 2}


@pytest.mark.parametrize("first_out", [0, 1])
def test_a_job_taken_from_a_runner_and_claimed_by_it_again_is_ended_by_the_second_claim(
    first_out: int, engine: sa.Engine, disk: AssetStore, create: Create, tmp_path: Path, recorder: Recorder
) -> None:
    entered = threading.Semaphore(0)
    doors = [threading.Event(), threading.Event()]
    contexts: list[jobkit.RenderContext] = []

    def render(ctx: jobkit.RenderContext) -> Rendered:
        number = len(contexts)
        contexts.append(ctx)
        entered.release()
        assert doors[number].wait(60)
        return Rendered(f"{number}.txt", "text/plain", b"x")

    with Runner(engine, disk, only(render), concurrency=2, poll_interval=0.05) as runner:
        job = create()
        assert entered.acquire(timeout=60)
        take(engine, job, "queued")
        assert entered.acquire(timeout=60)
        with pytest.raises(jobkit.LeaseLost):
            contexts[0].check()
        contexts[1].check()
        doors[first_out].set()
        if first_out == 1:
            recorder.wait(lambda types: "done" in types)
        else:
            until(lambda: list((tmp_path / "assets").rglob("*.part")) == [])
            with pytest.raises(TimeoutError):
                runner.run_until_idle(timeout=0.5)
        doors[1 - first_out].set()
        recorder.wait(lambda types: "done" in types)
    assert (seen(engine, job).status, seen(engine, job).fence) == ("done", 2)
    with engine.connect() as connection:
        assert [file.original_filename for file in disk.list_by_job(connection, job.id)] == ["1.txt"]
    assert recorder.types() == ["queued", "running", "queued", "running", "done"]
    until(lambda: list((tmp_path / "assets").rglob("*.part")) == [])
    assert violations(engine, tmp_path / "assets") == []


def test_stop_waits_for_the_second_claim_of_a_job(engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    gate = Gate()
    runner = Runner(engine, disk, only(gate), concurrency=2, poll_interval=0.05).start()
    job = create()
    gate.entered()
    take(engine, job, "queued")
    gate.entered()
    runner.stop(timeout=0)
    gate.open()
    assert seen(engine, job).status == "queued"


# --- a result that the database refuses


def impose(engine: sa.Engine, rule: dict[str, str]) -> None:
    """A rule of the host's own."""
    with engine.begin() as connection:
        connection.exec_driver_sql(rule[engine.dialect.name])


def refuse_poison(engine: sa.Engine) -> None:
    rule = {
        "postgresql": "ALTER TABLE assets ADD CHECK (original_filename <> 'poison.txt')",
        "sqlite": "CREATE TRIGGER t BEFORE INSERT ON assets WHEN NEW.original_filename = 'poison.txt' "
        "BEGIN SELECT RAISE(ABORT, 'CHECK constraint failed: poison'); END",
    }
    impose(engine, rule)


def test_a_result_that_the_database_refuses_fails_alone(
    engine: sa.Engine, disk: AssetStore, create: Create, tmp_path: Path, recorder: Recorder
) -> None:
    refuse_poison(engine)
    barrier = threading.Barrier(6)

    def together(ctx: jobkit.RenderContext) -> Rendered:
        barrier.wait(60)
        return Rendered(ctx.input["name"], "text/plain", b"x")

    jobs = [create(input={"name": name}) for name in ("a.txt", "poison.txt", "b.txt", "c.txt", "poison.txt", "d.txt")]
    assert Runner(engine, disk, only(together), concurrency=6).run_until_idle(timeout=60) == 6
    assert statuses(engine) == ["done", "failed", "done", "done", "failed", "done"]
    message = seen(engine, jobs[1]).error_message
    assert message.startswith("the result could not be recorded: ")
    assert "poison" in message
    assert "INSERT" not in message
    assert [recorder.types(job.id)[-1] for job in jobs] == statuses(engine)
    assert violations(engine, tmp_path / "assets") == []


def test_a_job_whose_failure_cannot_even_be_written_is_left_to_its_lease_alone(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    rule = {
        "postgresql": "ALTER TABLE content_jobs ADD CHECK (job_type <> 'cursed' OR status IN ('queued', 'running'))",
        "sqlite": "CREATE TRIGGER t BEFORE UPDATE ON content_jobs WHEN NEW.job_type = 'cursed' "
        "AND NEW.status NOT IN ('queued', 'running') BEGIN SELECT RAISE(ABORT, 'cursed'); END",
    }
    impose(engine, rule)
    for job_type in ("note", "cursed", "note"):
        create(job_type)
    assert Runner(engine, disk, only()).run_until_idle(timeout=60) == 2
    assert statuses(engine) == ["done", "running", "done"]


def test_a_file_that_was_swept_before_the_finish_fails_its_job_alone(
    engine: sa.Engine, disk: AssetStore, create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swept(uploads: Any) -> Any:
        failures = original(uploads)
        keys = [upload.key for upload in uploads if "swept" in upload.key]
        with engine.begin() as connection:
            connection.execute(asset_intents.delete().where(asset_intents.c.object_key.in_(keys)))
        return failures

    original = disk.storage.publish
    monkeypatch.setattr(disk.storage, "publish", swept)
    renderers = only(lambda ctx: Rendered(ctx.input["name"], "text/plain", b"x"))
    jobs = [create(input={"name": name}) for name in ("a.txt", "swept.txt", "b.txt")]
    assert Runner(engine, disk, renderers).run_until_idle(timeout=60) == 3
    assert statuses(engine) == ["done", "failed", "done"]
    assert "the sweep was faster: 1 of 1 stored files are gone" in seen(engine, jobs[1]).error_message
    assert counted(engine)["assets"] == 2


# --- slots and connections


@pytest.mark.parametrize(("concurrency", "pool_size"), [(1, 5), (32, 5), (32, 40)])
def test_at_most_four_connections_are_used_at_any_concurrency(
    concurrency: int, pool_size: int, database: Database, tmp_path: Path, create: Create
) -> None:
    engine = database.connect(pool_size=pool_size, max_overflow=0, pool_timeout=1)
    store = AssetStore(tmp_path / "assets", engine=engine)
    with engine.connect() as connection:
        stored = store.put_file("acme", original_filename="in.txt", content_type="text/plain", body=b"input")
        asset = store.create(connection, "acme", stored, source_task_id=None)
        connection.commit()

    together = threading.Barrier(concurrency)

    def render(ctx: jobkit.RenderContext) -> Rendered:
        together.wait(60)
        with ctx.open_asset(asset.id) as file:
            return Rendered("out.txt", "text/plain", file.read())

    out, most = [0], [0]
    lock = threading.Lock()

    def count(step: int) -> Callable[..., None]:
        def change(*_: Any) -> None:
            with lock:
                out[0] += step
                most[0] = max(most[0], out[0])

        return change

    with engine.connect() as host:
        host.execute(sa.select(content_jobs)).all()
        sa.event.listen(engine.pool, "checkout", count(1))
        for name in ("checkin", "detach"):
            sa.event.listen(engine.pool, name, count(-1))
        for _ in range(96):
            create()
        assert Runner(engine, store, only(render), concurrency=concurrency).run_until_idle(timeout=60) == 96
    assert statuses(engine) == ["done"] * 96
    listening = engine.dialect.name == "postgresql"  # one more, taken out of the pool when a run lasts
    assert most[0] <= 4 + listening


def test_a_full_runner_waits_instead_of_looking_again_and_again(
    engine: sa.Engine, database: Database, disk: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, plans = Gate(), []
    plan = Pipeline._plan
    full = Runner(engine, disk, only(gate), concurrency=1, poll_interval=0.01).start()
    create()
    gate.entered()
    create("second")
    full.dispatch(create("third"))
    until(lambda: full._running is not None and len(full._running.pipeline._mailbox) == 0)
    running = full._running
    assert running is not None
    monkeypatch.setattr(Pipeline, "_plan", lambda self: plans.append(self) or plan(self))
    other = Runner(database.connect(), disk, only(), concurrency=1)
    other.run_until_idle(timeout=60)
    assert plans.count(running.pipeline) < 10
    assert len(plans) > 1
    gate.open()
    full.stop()


def test_coroutines_render_at_once_on_one_loop(engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    loops: set[Any] = set()
    waiting: list[asyncio.Event] = []

    async def together(ctx: jobkit.RenderContext) -> Rendered:
        loops.add(asyncio.get_running_loop())
        waiting.append(asyncio.Event())
        if len(waiting) == 4:
            for event in waiting:
                event.set()
        await asyncio.wait_for(waiting[-1].wait() if len(waiting) < 4 else asyncio.sleep(0), 20)
        return note(ctx)

    for _ in range(4):
        create()
    assert Runner(engine, disk, only(together), concurrency=4).run_until_idle(timeout=60) == 4
    assert statuses(engine) == ["done"] * 4
    assert len(loops) == 1


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError()])
def test_a_coroutine_that_would_end_the_loop_ends_only_its_job(
    error: BaseException, engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    let_go = threading.Event()

    async def render(ctx: jobkit.RenderContext) -> Rendered:
        if ctx.input.get("exit"):
            raise error
        while not let_go.is_set():
            await asyncio.sleep(0.01)
        return note(ctx)

    with Runner(engine, disk, only(render), concurrency=2) as runner:
        innocent = create()
        runner.dispatch(innocent)
        until(lambda: seen(engine, innocent).status == "running")
        guilty = create(input={"exit": True})
        runner.dispatch(guilty)
        until(lambda: seen(engine, guilty).status == "failed")
        let_go.set()
        until(lambda: seen(engine, innocent).status == "done")
