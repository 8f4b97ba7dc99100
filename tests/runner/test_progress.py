"""``ctx.progress``: how far a job is, on its row and as an event, never going back and never in a flood."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Job, JobStore, RenderContext, Rendered, Runner
from jobkit.base.clock import utcnow
from jobkit.jobs import claims
from jobkit.jobs.claims import Report
from jobkit.rendering.context import report
from jobkit.runner import leases
from jobkit.tables import content_job_events
from jobkit.testing import inline
from tests.support.recorder import Recorder
from tests.support.runners import Gate, note, only, seen, until
from tests.support.sent import hearing

Create = Callable[..., Job]
e = content_job_events.c


def told(engine: sa.Engine, job: Job) -> list[tuple[float, str | None]]:
    """The progress events of a job, in order."""
    query = sa.select(e.payload).where(e.job_id == job.id, e.type == "content_job.progress").order_by(e.seq)
    with engine.connect() as connection:
        payloads = list(connection.execute(query).scalars())
    assert all(payload.keys() == {"jobId", "progress", "message"} for payload in payloads)
    assert all(payload["jobId"] == str(job.id) for payload in payloads)
    return [(payload["progress"], payload["message"]) for payload in payloads]


def claim_one(engine: sa.Engine) -> claims.Claim:
    with engine.begin() as connection:
        (claim,), _ = claims.claim(connection, limit=1, worker_id="w", lease=60.0, now=utcnow())
    return claim


def advance(engine: sa.Engine, claim: claims.Claim, fraction: float, message: str | None = None) -> dict[Any, bool]:
    with engine.begin() as connection:
        _, held = claims.update_progress(connection, [(claim, Report(fraction, message))], lease=60.0, now=utcnow())
    return {one.job_id: one.cancelled for one in held}


# --- what a renderer may say


@pytest.mark.parametrize("fraction", [0, 1, 0.5, Fraction(1, 3), Decimal("0.25"), sum([0.1] * 3) / 0.3, -0.0])
def test_a_fraction_is_any_number_from_0_to_1(fraction: Any) -> None:
    assert 0 <= report(fraction, None, after=None).fraction <= 1


@pytest.mark.parametrize("fraction", [-0.01, 1.01, 50, float("nan"), float("inf"), 10**400])
def test_another_number_is_refused(fraction: Any) -> None:
    with pytest.raises(ValueError, match="fraction must be a number from 0 to 1, not "):
        report(fraction, None, after=None)


@pytest.mark.parametrize("fraction", ["0.5", b"1", None, True, [0.5], 1j])
def test_what_is_no_number_is_refused(fraction: Any) -> None:
    with pytest.raises(TypeError, match=f"fraction must be a number from 0 to 1, not {type(fraction).__name__}"):
        report(fraction, None, after=None)


def test_a_message_is_text() -> None:
    with pytest.raises(TypeError, match="message must be text, not bytes"):
        report(0.5, b"half", after=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("message", "kept"),
    [("page 3", "page 3"), ("", None), ("a\0b\ud800", "a\ufffdb\ufffd"), ("x" * 3000, "x" * 1999 + "…"), (None, None)],
)
def test_a_message_is_made_harmless(message: str | None, kept: str | None) -> None:
    assert report(0.5, message, after=None).message == kept


def test_a_report_never_falls_behind_and_the_same_again_is_none() -> None:
    first = report(0.5, "half", after=None)
    assert report(0.4, "still", after=first) == (0.5, "still")
    assert report(0.4, "half", after=first) is first


# --- on the row and in the log


def test_the_row_never_goes_back_whoever_reports(engine: sa.Engine, create: Create) -> None:
    job = create()
    claim = claim_one(engine)
    assert advance(engine, claim, 0.5, "half") == {job.id: False}
    advance(engine, claim, 0.2, "on it")
    row = seen(engine, job)
    assert (row.progress, row.progress_message) == (0.5, "on it")
    assert told(engine, job) == [(0.5, "half"), (0.5, "on it")]


def test_a_lost_claim_reports_nothing(engine: sa.Engine, create: Create) -> None:
    job = create()
    lost = claim_one(engine)
    with engine.begin() as connection:
        claims.release(connection, [lost], now=utcnow())
    claim_one(engine)
    before = seen(engine, job)
    assert advance(engine, lost, 0.9) == {}
    assert seen(engine, job) == before
    assert told(engine, job) == []


def test_a_report_prolongs_the_lease(engine: sa.Engine, create: Create) -> None:
    job = create()
    claim = claim_one(engine)
    before = seen(engine, job).lease_until
    advance(engine, claim, 0.1)
    assert seen(engine, job).lease_until > before


def test_a_report_hears_that_its_job_was_asked_to_stop(engine: sa.Engine, create: Create) -> None:
    job = create()
    claim = claim_one(engine)
    with Session(engine) as session, session.begin():
        JobStore(session).cancel(job.id)
    assert advance(engine, claim, 0.1) == {job.id: True}


def test_a_rollback_takes_the_report_and_its_event(engine: sa.Engine, create: Create) -> None:
    job = create()
    claim = claim_one(engine)
    with engine.connect() as connection, connection.begin() as transaction:
        claims.update_progress(connection, [(claim, Report(0.5, None))], lease=60.0, now=utcnow())
        transaction.rollback()
    assert seen(engine, job).progress is None
    assert told(engine, job) == []


# --- by a runner


def test_a_page_that_is_loaded_anew_sees_how_far_the_job_is(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    job, gate = create(), Gate()

    def half(ctx: RenderContext) -> Rendered:
        ctx.progress(0.25, "page 1 of 4")
        return gate(ctx)

    with Runner(engine, disk, only(half)) as runner:
        gate.entered()
        until(lambda: seen(engine, job).progress == 0.25)
        assert seen(engine, job).progress_message == "page 1 of 4"
        gate.contexts[0].progress(0.75)
        until(lambda: seen(engine, job).progress == 0.75)
        assert seen(engine, job).progress_message is None
        gate.open()
        runner.run_until_idle(timeout=60)
    with engine.connect() as connection:
        found = JobStore(connection).get_by_id(job.id)
    assert found is not None
    assert (found.status, found.progress) == ("done", 1.0)
    assert told(engine, job) == [(0.25, "page 1 of 4"), (0.75, None)]
    heard = [event for event in recorder.events if event.job_id == job.id]
    assert [event.seq for event in heard] == [2, 3, 4, 5]
    assert [event.type.removeprefix("content_job.") for event in heard] == [
        "running", "progress", "progress", "done",
    ]  # fmt: skip


@pytest.mark.parametrize("generator", [False, True])
def test_a_coroutine_reports_without_blocking_its_loop(
    engine: sa.Engine, disk: AssetStore, create: Create, generator: bool
) -> None:
    job, go = create(), threading.Event()

    async def report_and_wait(ctx: RenderContext) -> None:
        ctx.progress(0.5, "half")
        while not go.is_set():
            await asyncio.sleep(0.005)

    async def coroutine(ctx: RenderContext) -> Rendered:
        await report_and_wait(ctx)
        return note(ctx)

    async def outputs(ctx: RenderContext) -> Any:
        await report_and_wait(ctx)
        yield note(ctx)

    with Runner(engine, disk, only(outputs if generator else coroutine)) as runner:
        until(lambda: seen(engine, job).progress == 0.5)
        go.set()
        runner.run_until_idle(timeout=60)
    assert seen(engine, job).status == "done"


def test_ten_thousand_reports_are_a_few_events(
    engine: sa.Engine, disk: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is recorded twice within the pause, however long that is; what was said last is recorded in the end."""
    monkeypatch.setattr(leases, "RECORD", 3600.0)
    job, gate = create(), Gate()

    def busy(ctx: RenderContext) -> Rendered:
        ctx.progress(0.0)
        until(lambda: len(told(engine, job)) == 1)
        for n in range(10_000):
            ctx.progress(n / 10_000, f"{n} of 10,000")
        return gate(ctx)

    with Runner(engine, disk, only(busy)) as runner:
        gate.entered()
        runner._running._keeper._tick()  # type: ignore[union-attr]
        assert told(engine, job) == [(0.0, None)]
        monkeypatch.setattr(runner._running.pipeline.in_flight, "record_at", 0.0)  # type: ignore[union-attr]
        until(lambda: len(told(engine, job)) == 2)
        gate.open()
        runner.run_until_idle(timeout=60)
    assert told(engine, job) == [(0.0, None), (0.9999, "9999 of 10,000")]


def test_the_pause_grows_with_the_number_of_jobs() -> None:
    assert leases.record_every(1) == leases.RECORD
    assert 10_000 / leases.record_every(10_000) <= 200


def test_a_job_that_said_nothing_has_no_progress_when_it_is_done(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    job = create()
    Runner(engine, disk, only(note)).run_until_idle(timeout=60)
    assert seen(engine, job).status == "done"
    assert seen(engine, job).progress is None


def test_another_attempt_does_not_set_the_bar_back_and_a_retry_does(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    job = create()
    claim = claim_one(engine)
    advance(engine, claim, 0.5, "half")
    with engine.begin() as connection:
        claims.finish(connection, [claims.failed(claim, "no")], now=utcnow())
    row = seen(engine, job)
    assert (row.status, row.progress, row.progress_message) == ("failed", 0.5, "half")
    with Session(engine) as session, session.begin():
        JobStore(session).retry(job.id)
    row = seen(engine, job)
    assert (row.status, row.progress, row.progress_message) == ("queued", None, None)


def test_a_report_that_is_refused_fails_the_job_unless_it_is_caught(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    job = create()
    Runner(engine, disk, only(lambda ctx: ctx.progress(50))).run_until_idle(timeout=60)
    row = seen(engine, job)
    assert (row.status, row.error_message) == ("failed", "fraction must be a number from 0 to 1, not 50.0")


def test_a_renderer_that_only_reports_hears_that_it_is_cancelled(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    job, began = create(), threading.Event()

    def endless(ctx: RenderContext) -> None:
        n = 0
        while True:
            n += 1
            ctx.progress(1 - 1 / n)
            began.set()
            threading.Event().wait(0.001)

    with Runner(engine, disk, only(endless)) as runner:
        assert began.wait(60)
        with Session(engine) as session, session.begin():
            JobStore(session).cancel(job.id)
        until(lambda: seen(engine, job).status == "cancelled")
        assert runner.metrics().rejected == 0


def test_reports_of_many_jobs_go_together(
    engine: sa.Engine, disk: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = claims.update_progress

    def counted(connection: Any, reports: Any, **options: Any) -> Any:
        asked.append(len(reports))
        return plain(connection, reports, **options)

    monkeypatch.setattr(claims, "update_progress", counted)
    jobs, gate = [create() for _ in range(8)], Gate()
    with Runner(engine, disk, only(gate), concurrency=8) as runner:
        gate.entered(8)
        monkeypatch.setattr(runner._running.pipeline.in_flight, "record_at", float("inf"))  # type: ignore[union-attr]
        for ctx in gate.contexts:
            ctx.progress(0.5)
        monkeypatch.setattr(runner._running.pipeline.in_flight, "record_at", 0.0)  # type: ignore[union-attr]
        until(lambda: all(seen(engine, job).progress == 0.5 for job in jobs))
        gate.open()
    assert asked == [8]


def test_leases_are_renewed_although_reports_cannot_be_recorded(
    engine: sa.Engine, disk: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(claims, "update_progress", refuse)
    job, gate = create(), Gate()
    with Runner(engine, disk, only(gate), lease=1.0) as runner:
        gate.entered()
        gate.contexts[0].progress(0.5)
        first = seen(engine, job).lease_until
        until(lambda: seen(engine, job).lease_until > first)
        gate.open()
        runner.run_until_idle(timeout=60)
    assert (seen(engine, job).status, seen(engine, job).fence) == ("done", 1)


def test_a_database_in_memory_is_told_at_once(recorder: Recorder, tmp_path: Path) -> None:
    engine = sa.create_engine("sqlite://")
    jobkit.configure_sqlite(engine)
    jobkit.migrations.upgrade(engine)
    runner = Runner(engine, AssetStore(tmp_path, engine=engine), only(_half))
    job = runner.submit("acme", job_type="note")
    assert runner.run_until_idle() == 1
    assert told(engine, job) == [(0.5, "half")]
    assert [event.type for event in recorder.events] == [
        "content_job.queued", "content_job.running", "content_job.progress", "content_job.done",
    ]  # fmt: skip
    engine.dispose()


def test_inline_tells_every_report(session: Session, disk: AssetStore, recorder: Recorder) -> None:
    def twice(ctx: RenderContext) -> Rendered:
        ctx.progress(0.25, "a")
        ctx.progress(0.5, "b")
        return note(ctx)

    JobStore(session).create("acme", job_type="note")
    (job,) = inline(session, disk, only(twice))
    assert (job.status, job.progress) == ("done", 1.0)
    assert [event.payload["progress"] for event in recorder.events if event.type == "content_job.progress"] == [
        0.25,
        0.5,
    ]
    session.rollback()


def test_inline_tells_what_a_coroutine_reports(session: Session, disk: AssetStore, recorder: Recorder) -> None:
    async def once(ctx: RenderContext) -> Rendered:
        ctx.progress(0.25, "a")
        await asyncio.sleep(0)
        return note(ctx)

    JobStore(session).create("acme", job_type="note")
    (job,) = inline(session, disk, only(once))
    assert job.status == "done"
    assert [event.payload["message"] for event in recorder.events if event.type == "content_job.progress"] == ["a"]
    session.rollback()


def test_a_renderer_tried_alone_may_report() -> None:
    assert len(only(_half).render("note", {})) == 1


def _half(ctx: RenderContext) -> Rendered:
    ctx.progress(0.5, "half")
    return note(ctx)


def test_no_statement_of_several_jobs_locks_them_in_another_order(postgres_database: Any) -> None:
    """Two statements that want the same rows in different orders wait for each other, and one is refused."""
    engine = postgres_database.engine
    with Session(engine) as session, session.begin():
        JobStore(session).create_many("acme", [jobkit.JobRequest("note") for _ in range(20)])
    with engine.begin() as connection:
        taken, _ = claims.claim(connection, limit=20, worker_id="w", lease=60.0, now=utcnow())
    orders: list[list[str]] = []

    def order(_connection: Any, _statement: str, values: Any) -> None:
        if "jobs" in values:
            orders.append([job["job"] for job in json.loads(values["jobs"])])

    backwards = sorted(taken, key=lambda claim: claim.job_id, reverse=True)
    with hearing(engine, order), engine.begin() as connection:
        claims.renew(connection, backwards, lease=60.0)
        claims.check(connection, backwards)
        claims.update_progress(
            connection, [(claim, Report(0.5, None)) for claim in backwards], lease=60.0, now=utcnow()
        )
        claims.release(connection, backwards, now=utcnow())
    assert len(orders) == 4
    assert all(order == sorted(order) for order in orders)
