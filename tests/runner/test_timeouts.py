"""A renderer, a storage or a database that takes too long: jobs end in time, threads are replaced and counted."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, JobTimeout, Rendered, Renderers, Runner, RunnerMetrics
from jobkit.runner import pipeline, render_stage, store_stage
from jobkit.testing import Fault, FaultPlan, faulty_filesystem
from tests.support.invariants import spooled, violations
from tests.support.recorder import Recorder
from tests.support.runners import note, only, seen, until

Create = Callable[..., jobkit.Job]
LATE = "the renderer for 'slow' did not end within 0.2 seconds"


class Hanging:
    """A renderer that waits until the test lets it go, and then gives a file."""

    def __init__(self) -> None:
        self.let_go, self.entered = threading.Event(), threading.Semaphore(0)

    def __call__(self, ctx: jobkit.RenderContext) -> Rendered:
        self.entered.release()
        assert self.let_go.wait(60)
        return note(ctx)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    found = Hanging()
    yield found
    found.let_go.set()


def slow(renderer: Any, **options: Any) -> Renderers:
    """``renderer`` for slow jobs, a quick one for the others."""
    renderers = Renderers(default=note)
    renderers.register("slow", timeout=0.2, **options)(renderer)
    return renderers


def threads(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


def test_a_renderer_that_hangs_fails_in_time_and_gives_up_its_slot(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder, hanging: Hanging, tmp_path: Path
) -> None:
    runner = Runner(engine, disk, slow(hanging), concurrency=1)
    with runner:
        late = [create(job_type="slow") for _ in range(3)]
        quick = [create(job_type="note") for _ in range(3)]
        until(lambda: runner.metrics().ended == 6)
        assert {(seen(engine, job).status, seen(engine, job).error_message) for job in late} == {("failed", LATE)}
        assert {seen(engine, job).status for job in quick} == {"done"}
        assert runner.metrics() == RunnerMetrics(ended=6, replaced=3)
        hanging.let_go.set()
        until(
            lambda: [t.name for t in threading.enumerate() if t.name.startswith("jobkit-render")] == ["jobkit-render-3"]
        )
        assert spooled(tmp_path / "assets") == []
        create(job_type="note")  # the slot is still one
        until(lambda: runner.metrics().ended == 7)
    assert [recorder.types(job.id) for job in late] == [["queued", "running", "failed"]] * 3
    assert violations(engine, tmp_path / "assets") == []


def test_what_a_renderer_gives_after_its_time_changes_nothing(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder, hanging: Hanging, tmp_path: Path
) -> None:
    tried = []

    def second_time_lucky(ctx: jobkit.RenderContext) -> Rendered:
        tried.append(ctx.attempt)
        return hanging(ctx) if ctx.attempt == 1 else note(ctx)

    with Runner(engine, disk, slow(second_time_lucky, max_attempts=2)) as runner:
        job = create(job_type="slow")
        recorder.wait(lambda types: types[-1:] == ["retrying"])
        waiting = seen(engine, job)
        assert (waiting.status, waiting.error_message, waiting.attempt) == ("queued", LATE, 1)
        with engine.begin() as connection:
            connection.execute(jobkit.tables.content_jobs.update().values(run_at=waiting.created_at))
        runner.dispatch(job)
        until(lambda: runner.metrics().ended == 1)
        before = seen(engine, job)
        hanging.let_go.set()
        until(lambda: len(threads("jobkit-render")) == 1)
    assert seen(engine, job) == before
    assert (before.status, tried) == ("done", [1, 2])
    assert recorder.types(job.id) == ["queued", "running", "retrying", "running", "done"]
    assert violations(engine, tmp_path / "assets") == []


def test_check_raises_when_the_time_is_over_and_the_thread_stays(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    raised: list[BaseException] = []

    def polite(ctx: jobkit.RenderContext) -> Rendered:
        try:
            while True:
                ctx.check()
        except BaseException as error:
            raised.append(error)
            raise

    runner = Runner(engine, disk, slow(polite), concurrency=1)
    job = create(job_type="slow")
    runner.run_until_idle(timeout=60)
    assert [type(error) for error in raised] == [JobTimeout]
    assert (seen(engine, job).status, seen(engine, job).error_message) == ("failed", LATE)


def test_a_coroutine_is_cancelled_when_its_time_is_over(engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    ended: list[str] = []

    async def waits(ctx: jobkit.RenderContext) -> Rendered:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("function")
            raise
        return note(ctx)

    async def yields(ctx: jobkit.RenderContext) -> AsyncIterator[Rendered]:
        try:
            yield note(ctx)
            await asyncio.Event().wait()
        finally:
            ended.append("generator")

    for renderer in (waits, yields):
        runner = Runner(engine, disk, slow(renderer), concurrency=1)
        job = create(job_type="slow")
        with runner:
            until(lambda job=job: seen(engine, job).status == "failed")  # type: ignore[misc]
            assert seen(engine, job).error_message == LATE
            until(lambda: ended)
    assert ended == ["function", "generator"]


def test_a_timeout_that_is_none_is_refused_with_its_name() -> None:
    for wrong in (0, -1, float("inf"), float("nan"), True, "5", timedelta(0)):
        with pytest.raises((TypeError, ValueError), match="timeout"):
            Renderers().register("slow", timeout=wrong)  # type: ignore[arg-type]


def test_without_a_database_the_timeout_counts_for_check() -> None:
    def endless(ctx: jobkit.RenderContext) -> Rendered:
        until(ctx.check, "the timeout")
        return note(ctx)

    with pytest.raises(JobTimeout, match=r"0\.2 seconds"):
        slow(endless).render("slow")


def test_uploads_that_never_answer_do_not_hold_up_the_others(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_stage, "STALLED", 0.2)
    answers = threading.Event()
    where = str(uuid.uuid4())
    with faulty_filesystem(FaultPlan(Fault("put_file", "wait", until=answers.wait, times=6))):
        store = AssetStore(f"faulty://{where}")
        with Runner(engine, store, only(note), concurrency=8) as runner:
            for _ in range(16):
                create()
            until(lambda: runner.metrics().ended == 10)
            assert runner.metrics().replaced >= 2
            answers.set()
            until(lambda: runner.metrics().ended == 16)
        until(lambda: not threads("jobkit-store"))


def test_no_turn_waits_for_an_upload_that_takes_long(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_stage, "STALLED", 0.2)
    answers = threading.Event()
    with faulty_filesystem(FaultPlan(Fault("put_file", "wait", until=answers.wait, times=1))):
        store = AssetStore(f"faulty://{uuid.uuid4()}")
        with Runner(engine, store, only(note)) as runner:
            job = create()
            assert runner._running is not None
            pipeline = runner._running.pipeline
            until(lambda: pipeline.metrics().replaced == 1)
            expected = pipeline._store_stage.expected_results() + pipeline._render_stage.expected_results()
            answers.set()
            until(lambda: seen(engine, job).status == "done")
    assert expected == 0


def test_with_too_many_threads_left_behind_a_runner_claims_nothing_says_so_and_goes_on_when_some_end(
    engine: sa.Engine, disk: AssetStore, create: Create, hanging: Hanging, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(render_stage, "LEFT_BEHIND", 2)
    monkeypatch.setattr(render_stage, "LEFT_BEHIND_PER_SLOT", 1)
    monkeypatch.setattr(pipeline, "FULL_PAUSE", 0.05)
    slow_ones = [create("slow") for _ in range(2)]
    with Runner(engine, disk, slow(hanging), concurrency=1, poll_interval=0.05) as runner:
        until(lambda: runner.metrics().left_behind == 2)
        until(lambda: all(seen(engine, job).status == "failed" for job in slow_ones))
        until(lambda: "nothing more is claimed" in caplog.text)
        innocent = create()
        runner.dispatch(innocent)
        assert Runner(engine, disk, only(note)).run_until_idle(timeout=60) == 1  # another has it at once
        waiting = create()
        hanging.let_go.set()
        until(lambda: seen(engine, waiting).status == "done")
        assert "jobs are claimed again" in caplog.text
    assert seen(engine, innocent).fence == 1
