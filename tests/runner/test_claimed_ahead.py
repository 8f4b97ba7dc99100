"""Jobs that take no time are claimed ahead of the slots; one that takes long holds up none of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import AssetStore, Job, JobRequest, JobStore, RenderContext, Rendered, Runner
from jobkit.base.ids import new_id
from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import Registration, RenderEnvironment
from jobkit.runner import render_stage
from jobkit.runner.pipeline import Pipeline
from jobkit.tables import content_job_events, content_jobs
from tests.support.invariants import violations
from tests.support.runners import Gate, note, only, seen, statuses, until

Create = Callable[..., Job]
c, e = content_jobs.c, content_job_events.c


def many(engine: sa.Engine, count: int) -> list[Job]:
    with Session(engine) as session, session.begin():
        return JobStore(session).create_many("acme", [JobRequest("note", {"n": n}) for n in range(count)])


class Halting:
    """Renders at once, but for one job, and reports how many jobs are claimed and not begun when that begins."""

    def __init__(self, engine: sa.Engine, halt_at: int) -> None:
        self._engine, self._halt_at = engine, halt_at
        self.entered, self.open = threading.Event(), threading.Event()
        self.begun: set[int] = set()

    def __call__(self, ctx: RenderContext) -> Rendered:
        self.begun.add(ctx.input["n"])
        if ctx.input["n"] == self._halt_at:
            self.entered.set()
            assert self.open.wait(60)
        return note(ctx)


def test_what_waits_behind_a_long_job_goes_back_to_the_queue_and_others_can_take_it(
    engine: sa.Engine, disk: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_stage, "QUICK", 1.0)  # whatever this machine is busy with
    monkeypatch.setattr(render_stage, "STUCK", 1.0)
    jobs = many(engine, 60)
    # The one that halts is claimed once enough have shown that they take no time.
    halting = Halting(engine, halt_at=30)
    with Runner(engine, disk, only(halting), concurrency=1) as runner:
        assert halting.entered.wait(60)
        until(lambda: statuses(engine).count("running") == 1, "what was claimed ahead is back in the queue")
        waiting = statuses(engine).count("queued")
        assert waiting > 0
        with Runner(engine, disk, only(note), concurrency=1) as other:
            until(lambda: statuses(engine).count("done") == 59, "another runner does the rest")
            assert other.metrics().ended == waiting
        halting.open.set()
        until(lambda: statuses(engine).count("done") == 60)
        assert runner.metrics().rejected == 0
    # The attempts of those that went back are not charged, and nobody rendered anything twice.
    assert all((row := seen(engine, job)).attempt == 1 and row.status == "done" for job in jobs)
    assert violations(engine, disk.spool_folder().parents[1]) == []


def test_jobs_that_take_their_time_are_never_claimed_ahead(
    engine: sa.Engine, disk: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_stage, "QUICK", 0.0)
    many(engine, 50)
    most: list[int] = []

    def counting(ctx: RenderContext) -> Rendered:
        most.append(statuses(engine).count("running"))
        return note(ctx)

    def released() -> int:
        query = sa.select(sa.func.count()).where(e.type == "content_job.queued", e.seq > 1)
        with engine.connect() as connection:
            return connection.execute(query).scalar_one()

    Runner(engine, disk, only(counting), concurrency=2).run_until_idle(timeout=120)
    assert statuses(engine).count("done") == 50
    assert released() == 0


def test_jobs_behind_a_long_one_are_taken_by_other_threads(
    engine: sa.Engine, disk: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_stage, "QUICK", 60.0)
    monkeypatch.setattr(render_stage, "STUCK", 3600.0)
    monkeypatch.setattr(render_stage, "WORTH", 1.0)  # so one thread is enough for all, while none takes a second
    many(engine, 80)
    halting = Halting(engine, halt_at=40)
    with Runner(engine, disk, only(halting), concurrency=4):
        assert halting.entered.wait(60)
        until(lambda: statuses(engine).count("done") == 79, "the other three slots do what waited behind it")
        halting.open.set()
        until(lambda: statuses(engine).count("done") == 80)


@pytest.mark.parametrize("begins_first", [True, False])
def test_an_attempt_is_either_started_or_cancelled(begins_first: bool, disk: AssetStore) -> None:
    claim = Claim(new_id(), "acme", "note", {}, None, 1, 1)
    never: Any = None
    attempt = Attempt(claim, Registration(note), RenderEnvironment(disk, never, never))
    if begins_first:
        assert attempt.task.start()
        assert not attempt.task.cancel()
        attempt.run()
        assert not attempt.task.finish()
        assert not attempt.task.cancel()
        attempt.discard()
    else:
        assert attempt.task.cancel()
        assert not attempt.task.start()


def test_some_jobs_are_claimed_ahead(engine: sa.Engine, disk: AssetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_stage, "QUICK", 60.0)
    many(engine, 60)
    halting = Halting(engine, halt_at=40)
    monkeypatch.setattr(render_stage, "STUCK", 3600.0)
    with Runner(engine, disk, only(halting), concurrency=1):
        assert halting.entered.wait(60)
        until(lambda: statuses(engine).count("running") > 1, "others are claimed while one is at work")
        halting.open.set()
        until(lambda: statuses(engine).count("done") == 60)
    assert len(halting.begun) == 60


def test_a_runner_that_gets_no_more_threads_waits_for_those_it_has(
    engine: sa.Engine, disk: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, collect, looks = threading.Thread.start, Pipeline._collect, []

    def refuse(self: threading.Thread) -> None:
        if self.name.startswith("jobkit-render") and not self.name.endswith("-0"):
            raise RuntimeError("can't start new thread")
        start(self)

    def counting(self: Pipeline, timeout: float) -> None:
        looks.append(timeout)
        collect(self, timeout)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    many(engine, 2)
    gate = Gate()
    with Runner(engine, disk, only(gate), concurrency=3) as runner:
        gate.entered()
        until(lambda: statuses(engine).count("running") == 2)
        threading.Event().wait(0.2)
        monkeypatch.setattr(Pipeline, "_collect", counting)
        threading.Event().wait(0.5)
        meanwhile = len(looks)
        gate.open()
        runner.run_until_idle(timeout=60)
    assert statuses(engine) == ["done", "done"]
    assert meanwhile < 40


def test_jobs_behind_one_whose_failure_takes_long_to_log_are_taken_by_other_threads(
    engine: sa.Engine, disk: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_stage, "QUICK", 60.0)
    monkeypatch.setattr(render_stage, "STUCK", 3600.0)
    monkeypatch.setattr(render_stage, "WORTH", 1.0)
    many(engine, 80)
    logging_, sent = threading.Event(), threading.Event()

    def failing(ctx: RenderContext) -> Rendered:
        if ctx.input["n"] == 40:
            raise ValueError("no such font")
        return note(ctx)

    class Mail(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logging_.set()
            assert sent.wait(60)

    mail = Mail(logging.WARNING)
    logging.getLogger("jobkit").addHandler(mail)
    try:
        with Runner(engine, disk, only(failing), concurrency=4):
            assert logging_.wait(60)
            try:
                until(lambda: statuses(engine).count("done") == 79, "the other three slots do what waited behind it")
            finally:
                sent.set()
            until(lambda: statuses(engine).count("failed") == 1)
    finally:
        logging.getLogger("jobkit").removeHandler(mail)


def test_a_job_taken_while_it_waited_for_a_slot_is_rendered_for_its_second_claim_only(
    engine: sa.Engine, disk: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render_stage, "QUICK", 60.0)
    monkeypatch.setattr(render_stage, "STUCK", 3600.0)
    jobs = many(engine, 45)
    halting, rendered = Halting(engine, halt_at=40), []

    def render(ctx: RenderContext) -> Rendered:
        rendered.append(ctx.input["n"])
        return halting(ctx)

    with Runner(engine, disk, only(render), concurrency=1, poll_interval=0.05):
        assert halting.entered.wait(60)
        try:
            until(lambda: statuses(engine).count("running") == 5, "four are claimed ahead")
            with Session(engine) as session, session.begin():
                for job in jobs[41:]:
                    JobStore(session).transition(job.id, expect="running", status="queued")
            until(lambda: [seen(engine, job).fence for job in jobs[41:]] == [2] * 4, "they are claimed again")
        finally:
            halting.open.set()
        until(lambda: statuses(engine).count("done") == 45)
    assert sorted(rendered) == list(range(45))
