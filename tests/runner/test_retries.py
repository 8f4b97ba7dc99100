"""Failed attempts that are repeated, on both databases, with an injected clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import Discard, JobStore, Rendered, Retry, Snooze
from jobkit.base.text import error_message
from jobkit.storage.local import LocalStorage
from tests.support.invariants import violations
from tests.support.recorder import Recorder
from tests.support.runners import counted, note, objects, seen

Create = Callable[..., jobkit.Job]
START = datetime(2030, 1, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Fails:
    """A renderer that raises what it is given, one after the other, then gives a file."""

    def __init__(self, *failures: Any) -> None:
        self.failures = list(failures)
        self.attempts: list[int] = []

    def __call__(self, ctx: jobkit.RenderContext) -> Iterator[Rendered]:
        self.attempts.append(ctx.attempt)
        yield Rendered("draft.txt", "text/plain", b"draft")
        if self.failures:
            failure = self.failures.pop(0)
            raise failure() if callable(failure) else failure


@pytest.fixture
def run(engine: sa.Engine, disk: jobkit.AssetStore, clock: Clock) -> Callable[..., int]:
    """Run what is due with this renderer; return how many jobs ended."""

    def run(renderer: Any, max_attempts: int = 1) -> int:
        renderers = jobkit.Renderers(describe_error=error_message)
        renderers.register("note", max_attempts=max_attempts)(renderer)
        return jobkit.Runner(engine, disk, renderers, clock=clock).run_until_idle(timeout=60)

    return run


def test_a_failure_waits_for_its_pause_with_its_message_and_then_runs_again(
    engine: sa.Engine, create: Create, run: Any, clock: Clock, recorder: Recorder, tmp_path: Path
) -> None:
    job, renderer = create(), Fails(ValueError("first"), OSError("second"))
    assert run(renderer, 3) == 0
    waits = seen(engine, job)
    assert (waits.status, waits.error_message, waits.attempt) == ("queued", "first", 1)
    assert (waits.started_at, waits.finished_at, waits.lease_until, waits.worker_id) == (None,) * 4
    assert timedelta(seconds=3.3) < waits.run_at - START <= timedelta(seconds=5)
    clock.forward((waits.run_at - START).total_seconds() - 0.001)
    assert run(renderer, 3) == 0
    assert renderer.attempts == [1]  # not before its time
    clock.forward(0.001)
    assert run(renderer, 3) == 0
    second = seen(engine, job).run_at
    assert timedelta(seconds=6.6) < second - clock.now <= timedelta(seconds=10)
    clock.forward(10)
    assert run(renderer, 3) == 1
    done = seen(engine, job)
    assert (done.status, done.error_message, done.attempt, done.fence) == ("done", None, 3, 3)
    assert renderer.attempts == [1, 2, 3]
    assert recorder.types(job.id) == ["queued", "running", "retrying", "running", "retrying", "running", "done"]
    told = [event.payload for event in recorder.events if event.type.endswith("retrying")]
    assert told == [
        {"jobId": str(job.id), "attempt": 1, "errorMessage": "first", "runAt": waits.run_at.isoformat()},
        {"jobId": str(job.id), "attempt": 2, "errorMessage": "second", "runAt": second.isoformat()},
    ]
    assert violations(engine, tmp_path / "assets") == []


def test_the_last_failure_fails_the_job(
    engine: sa.Engine, create: Create, run: Any, clock: Clock, recorder: Recorder
) -> None:
    job, renderer = create(), Fails(*(ValueError(f"no {n}") for n in range(9)))
    for ended in (0, 0, 1, 0):
        assert run(renderer, 3) == ended
        clock.forward(3600)
    row = seen(engine, job)
    assert (row.status, row.error_message, row.attempt, len(renderer.attempts)) == ("failed", "no 2", 3, 3)
    assert recorder.types(job.id)[-2:] == ["running", "failed"]
    assert recorder.events[-1].payload == {"jobId": str(job.id), "errorMessage": "no 2"}
    assert counted(engine)["assets"] == 0


def test_by_default_there_is_one_attempt(engine: sa.Engine, create: Create, disk: jobkit.AssetStore) -> None:
    jobs = [create(), create("other")]
    renderers = jobkit.Renderers(default=Fails(ValueError("no")), describe_error=error_message)
    renderers.register("other")(Fails(ValueError("no")))
    assert jobkit.Runner(engine, disk, renderers).run_until_idle(timeout=60) == 2
    assert [seen(engine, job).status for job in jobs] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("failure", "after"),
    [(Retry(90), 90), (Retry(timedelta(minutes=2)), 120), (Retry(0), 0), (Retry(0.25, reason="busy"), 0.25)],
)
def test_retry_says_when(
    failure: Retry, after: float, engine: sa.Engine, create: Create, disk: jobkit.AssetStore, recorder: Recorder
) -> None:
    clock = Clock()
    job, renderer = create(), Fails(failure)
    renderers = jobkit.Renderers(describe_error=error_message)
    renderers.register("note", max_attempts=2)(renderer)
    runner = jobkit.Runner(engine, disk, renderers, clock=clock)
    ended = runner.run_until_idle(timeout=60)
    told = next(event for event in recorder.events if event.type.endswith("retrying"))
    assert told.payload["runAt"] == (START + timedelta(seconds=after)).isoformat()
    assert told.payload["errorMessage"] == str(failure)
    if after:
        assert (ended, seen(engine, job).run_at) == (0, START + timedelta(seconds=after))
        clock.forward(after)
        ended = runner.run_until_idle(timeout=60)
    assert (ended, renderer.attempts) == (1, [1, 2])


def test_a_wait_that_is_none_is_an_ordinary_failure(engine: sa.Engine, create: Create, run: Any) -> None:
    job = create()
    assert run(Fails(lambda: Retry(-5)), 1) == 1
    assert "after must be at least zero" in seen(engine, job).error_message
    job = create()
    assert run(Fails(lambda: Snooze(1e12)), 1) == 1
    assert "for_ must be at most ten years" in seen(engine, job).error_message


def test_a_snooze_is_not_charged_and_tells_of_no_error(
    engine: sa.Engine, create: Create, run: Any, clock: Clock, recorder: Recorder
) -> None:
    job, renderer = create(), Fails(Snooze(60), Snooze(timedelta(seconds=60)), ValueError("no"))
    for _ in range(2):
        assert run(renderer) == 0
        row = seen(engine, job)
        assert (row.status, row.attempt, row.error_message) == ("queued", 0, None)
        assert row.run_at == clock.now + timedelta(seconds=60)
        clock.forward(59)
        assert run(renderer) == 0
        clock.forward(1)
    assert run(renderer) == 1
    assert (seen(engine, job).status, renderer.attempts) == ("failed", [1, 1, 1])
    assert recorder.types(job.id) == ["queued", "running"] * 3 + ["failed"]
    assert [e.payload for e in recorder.events if e.type.endswith("queued")] == [{"jobId": str(job.id)}] * 3


def test_a_discard_is_not_repeated(engine: sa.Engine, create: Create, run: Any, clock: Clock) -> None:
    job, renderer = create(), Fails(Discard("not worth it"))
    assert run(renderer, 9) == 1
    clock.forward(7200)
    assert run(renderer, 9) == 0
    row = seen(engine, job)
    assert (row.status, row.error_message, row.attempt) == ("failed", "not worth it", 1)


def test_an_unknown_job_type_is_not_repeated(engine: sa.Engine, create: Create, run: Any) -> None:
    job = create("nobody")
    assert run(note, 9) == 1
    assert (seen(engine, job).status, seen(engine, job).attempt) == ("failed", 1)
    assert "nobody" in seen(engine, job).error_message


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_storage_that_fails_is_a_failed_attempt(
    attempts: int, engine: sa.Engine, create: Create, run: Any, clock: Clock,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    publish, failures = LocalStorage.publish, [OSError("disk full")]

    def once(*arguments: Any, **options: Any) -> Any:
        result = publish(*arguments, **options)
        if failures:  # the object is there, and the attempt has failed nevertheless
            raise failures.pop()
        return result

    monkeypatch.setattr(LocalStorage, "publish", once)
    job = create()
    assert run(note, attempts) == int(attempts == 1)
    assert "disk full" in seen(engine, job).error_message
    assert counted(engine)["assets"] == 0
    assert violations(engine, tmp_path / "assets") == []  # what was stored has its intent
    clock.forward(5)
    assert run(note, attempts) == int(attempts == 2)
    assert seen(engine, job).status == {1: "failed", 2: "done"}[attempts]
    assert counted(engine) == {"assets": attempts - 1, "asset_intents": 1, "content_job_events": 3 + 2 * (attempts - 1)}
    assert len(objects(tmp_path / "assets")) == attempts
    assert violations(engine, tmp_path / "assets") == []


def test_attempts_that_failed_leave_no_rows_and_no_spool(
    engine: sa.Engine, create: Create, run: Any, clock: Clock, tmp_path: Path
) -> None:
    job, renderer = create(), Fails(*[ValueError("no")] * 3)
    for _ in range(4):
        run(renderer, 4)
        clock.forward(100)
    assert seen(engine, job).status == "done"
    assert counted(engine)["assets"] == 1
    assert counted(engine)["asset_intents"] == 0
    assert len(objects(tmp_path / "assets")) == 1
    assert [path for path in tmp_path.rglob(".spool/**/*") if path.is_file()] == []


def test_a_started_runner_takes_up_what_has_become_due(
    engine: sa.Engine, create: Create, disk: jobkit.AssetStore, recorder: Recorder
) -> None:
    clock = Clock()
    renderer = Fails(Retry(3600))
    renderers = jobkit.Renderers(describe_error=error_message)
    renderers.register("note", max_attempts=2)(renderer)
    with jobkit.Runner(engine, disk, renderers, clock=clock, poll_interval=0.05):
        job = create()
        recorder.wait(lambda types: "retrying" in types)
        others = create("note")
        recorder.wait(lambda types: types.count("done") == 1)
        assert recorder.types(others.id)[-1] == "done"
        assert renderer.attempts == [1, 1]
        clock.forward(3600)
        recorder.wait(lambda types: types.count("done") == 2)
    assert seen(engine, job).attempt == 2


def test_a_job_that_was_retried_by_hand_has_all_its_attempts_again(
    engine: sa.Engine, create: Create, run: Any, clock: Clock
) -> None:
    job, renderer = create(), Fails(*[ValueError("no")] * 5)
    for _ in range(2):
        run(renderer, 2)
        clock.forward(100)
    assert seen(engine, job).status == "failed"
    with engine.begin() as connection:
        JobStore(connection).retry(job.id)
    assert run(renderer, 2) == 0
    assert (seen(engine, job).attempt, seen(engine, job).fence) == (1, 3)


def test_an_asynchronous_renderer_and_one_that_ends_the_interpreter_are_repeated_too(
    engine: sa.Engine, create: Create, disk: jobkit.AssetStore
) -> None:
    seen_attempts: list[tuple[str, int]] = []
    renderers = jobkit.Renderers(describe_error=error_message)

    @renderers.register("async", max_attempts=2)
    async def later(ctx: jobkit.RenderContext) -> Rendered:
        seen_attempts.append(("async", ctx.attempt))
        if ctx.attempt == 1:
            raise Retry(0)
        return note(ctx)

    @renderers.register("exit", max_attempts=2)
    def leaves(ctx: jobkit.RenderContext) -> Rendered:
        seen_attempts.append(("exit", ctx.attempt))
        raise SystemExit(3)

    first, second = create("async"), create("exit")
    assert jobkit.Runner(engine, disk, renderers).run_until_idle(timeout=60) == 1
    assert sorted(seen_attempts) == [("async", 1), ("async", 2), ("exit", 1)]
    assert (seen(engine, first).status, seen(engine, second).status) == ("done", "queued")
    assert seen(engine, second).error_message == "3"


def test_a_memory_database_repeats_too() -> None:
    engine = sa.create_engine("sqlite://")
    jobkit.configure_sqlite(engine)
    jobkit.migrations.upgrade(engine)
    with engine.begin() as connection:
        JobStore(connection).create("acme", job_type="note")
    renderers = jobkit.Renderers(describe_error=error_message)
    renderer = Fails(Retry(0), Snooze(0))
    renderers.register("note", max_attempts=2)(renderer)
    assert jobkit.Runner(engine, jobkit.AssetStore("memory://retries"), renderers).run_until_idle() == 1
    assert renderer.attempts == [1, 2, 2]
    engine.dispose()
