"""Leases and rescue: a claim lives as long as its worker, and a job outlives them both."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, Job, JobStore, Rendered, Renderers, RescueReport, Runner
from jobkit.base.clock import utcnow
from jobkit.db.connections import DedicatedConnection, SharedConnection
from jobkit.jobs import claims
from jobkit.jobs.claims import RELEASED
from jobkit.jobs.fairness import RoundRobin
from jobkit.jobs.outcomes import Outcome
from jobkit.maintenance.rescue import RescueLimits, Rescuer, TooLate
from jobkit.maintenance.rescue import rescue as look
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import Registration
from jobkit.runner import leases
from jobkit.runner.in_flight import InFlight
from jobkit.runner.leases import LeaseKeeper
from jobkit.tables import content_jobs
from jobkit.types import JobStatus
from tests.support.invariants import violations
from tests.support.recorder import Recorder

Create = Callable[..., Job]
c = content_jobs.c


def claim_one(engine: sa.Engine, worker: str) -> claims.Claim:
    with engine.begin() as connection:
        pick = partial(RoundRobin(engine).claim, check_scheduled=True)
        (claim,), _ = claims.claim(connection, limit=1, worker_id=worker, lease=60.0, now=utcnow(), pick=pick)
    return claim


def expire(engine: sa.Engine, job: Job) -> None:
    """Let the lease of a job run out."""
    with engine.begin() as connection:
        connection.execute(
            sa.update(content_jobs).where(c.id == job.id).values(lease_until=datetime(2020, 1, 1, tzinfo=UTC))
        )


def fresh(engine: sa.Engine, job: Job) -> Job:
    with engine.connect() as connection:
        found = JobStore(connection).get_by_id(job.id)
    assert found is not None
    return found


def rescue(engine: sa.Engine) -> list[str]:
    with engine.begin() as connection:
        return [event.type for event in claims.rescue(connection, limit=10, now=utcnow())]


def note(ctx: jobkit.RenderContext) -> Rendered:
    return Rendered("a.txt", "text/plain", b"x")


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- rescue


def test_whoever_was_frozen_does_not_rescue_before_its_keeper_could_renew(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()
    claim_one(engine, "me")
    expire(engine, job)
    woken: list[bool] = []
    rescuer = Rescuer(
        SharedConnection(engine, 1), lease=10, clock=utcnow, on_commit=lambda rows: None,
        wake=lambda: woken.append(True),
    )  # fmt: skip
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 60)
    rescuer._tick()
    assert (woken, fresh(engine, job).status) == ([], "running")
    rescuer._tick()
    assert (woken, fresh(engine, job).status) == ([True], "queued")


def rescuing(engine: sa.Engine, mine: Sequence[claims.Claim] = (), lease: float = 10) -> Rescuer:
    return Rescuer(
        SharedConnection(engine, 1), lease=lease, clock=utcnow, on_commit=lambda rows: None, wake=lambda: None,
        mine=lambda: mine,
    )  # fmt: skip


def test_no_runner_rescues_what_it_is_working_on(engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    mine, lost = create(), create()
    claim = claim_one(engine, "me")
    claim_one(engine, "dead")
    for job in (mine, lost):
        expire(engine, job)
    rescuer = rescuing(engine, [claim])
    rescuer._tick()
    rescuer._tick()
    assert (fresh(engine, mine).status, fresh(engine, lost).status) == ("running", "queued")
    old = dataclasses.replace(claim, fence=claim.fence - 1)  # what it has lost since is nobody's
    rescuer = rescuing(engine, [old])
    rescuer._tick()
    rescuer._tick()
    assert fresh(engine, mine).status == "queued"


def test_leases_that_ended_long_ago_are_looked_at_twice_and_others_are_not(engine: sa.Engine, create: Create) -> None:
    """The clock was set, or a machine slept: whoever lives renews before the second look."""
    alive, dead, just_lost = create(), create(), create()
    claim = claim_one(engine, "alive")
    claim_one(engine, "dead")
    claim_one(engine, "just lost")
    expire(engine, alive)
    expire(engine, dead)
    with engine.begin() as connection:
        soon = utcnow() - timedelta(milliseconds=1)
        connection.execute(sa.update(content_jobs).where(c.id == just_lost.id).values(lease_until=soon))
    rescuer = rescuing(engine)
    rescuer._tick()
    assert [fresh(engine, job).status for job in (alive, dead, just_lost)] == ["running", "running", "queued"]
    assert rescuer.timer.interval == 2.0
    with engine.begin() as connection:
        claims.renew(connection, [claim], lease=60.0)
    rescuer._tick()
    assert [fresh(engine, job).status for job in (alive, dead)] == ["running", "queued"]
    assert rescuer.timer.interval == 1.0


def test_after_a_failure_of_its_own_a_rescuer_waits_once(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()
    claim_one(engine, "alive")
    expire(engine, job)
    rescuer = rescuing(engine)
    rescuer._waited = True  # it would rescue now

    def away(*_: object) -> None:
        raise sa.exc.OperationalError("", None, OSError("away"))

    sa.event.listen(engine, "before_cursor_execute", away)
    with pytest.raises(sa.exc.OperationalError):
        rescuer._tick()
    sa.event.remove(engine, "before_cursor_execute", away)
    rescuer._tick()
    assert fresh(engine, job).status == "running"
    rescuer._tick()
    assert fresh(engine, job).status == "queued"


def test_after_a_jump_of_the_databases_clock_a_rescuer_waits_once(engine: sa.Engine, create: Create) -> None:
    rescuer = rescuing(engine)
    rescuer._tick()
    rescuer._ahead -= 3600  # as if the clock had been set an hour ahead since
    job = create()
    claim_one(engine, "alive")
    with engine.begin() as connection:
        soon = utcnow() - timedelta(milliseconds=1)
        connection.execute(sa.update(content_jobs).values(lease_until=soon))
    rescuer._tick()
    assert fresh(engine, job).status == "running"
    rescuer._tick()
    assert fresh(engine, job).status == "queued"


def test_a_rescue_that_had_to_wait_writes_nothing(engine: sa.Engine, create: Create) -> None:
    job = create()
    claim_one(engine, "alive")
    expire(engine, job)
    link = DedicatedConnection(engine)
    with pytest.raises(TooLate):
        look(link, clock=utcnow, on_commit=lambda rows: None, limits=RescueLimits(patience=0.0))
    assert fresh(engine, job).status == "running"
    assert look(link, clock=utcnow, on_commit=lambda rows: None, limits=RescueLimits(patience=60.0)) == RescueReport(
        queued=1
    )
    link.close()


@pytest.mark.parametrize(("ahead", "capped"), [(timedelta(days=3650), True), (timedelta(hours=1), True),
                                               (timedelta(seconds=590), False)])  # fmt: skip
def test_a_lease_far_in_the_future_is_cut(engine: sa.Engine, create: Create, ahead: timedelta, capped: bool) -> None:
    job = create()
    claim_one(engine, "under a wrong clock")
    with engine.begin() as connection:
        connection.execute(sa.update(content_jobs).values(lease_until=utcnow() + ahead))
    rescuing(engine)._tick()
    left = fresh(engine, job).lease_until
    assert left is not None
    assert (left - utcnow() < timedelta(seconds=11)) is capped


def test_a_lost_workers_job_runs_again_with_a_higher_fence_and_the_attempt_not_charged(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    job = create()
    claim_one(engine, "dead")
    expire(engine, job)
    runner = Runner(engine, disk, Renderers(default=note))
    assert runner.rescue() == RescueReport(queued=1)
    waiting = fresh(engine, job)
    assert (waiting.status, waiting.attempt, waiting.rescues, waiting.fence) == ("queued", 0, 1, 1)
    assert (waiting.lease_until, waiting.worker_id, waiting.started_at) == (None, None, None)
    assert runner.run_until_idle(timeout=60) == 1
    done = fresh(engine, job)
    assert (done.status, done.attempt, done.rescues, done.fence) == ("done", 1, 1, 2)
    told = next(event for event in recorder.events if event.type == "content_job.retrying")
    assert told.payload["jobId"] == str(job.id)
    assert told.payload["attempt"] == 1
    assert told.payload["errorMessage"] == "the worker was lost"
    assert datetime.fromisoformat(told.payload["runAt"]).utcoffset() == timedelta(0)
    assert violations(engine, disk.spool_folder().parents[1]) == []


def test_a_started_runner_rescues_by_itself_while_every_slot_is_busy(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    gate, begun = threading.Event(), threading.Event()

    def wait(ctx: jobkit.RenderContext) -> Rendered:
        begun.set()
        assert gate.wait(60)
        return note(ctx)

    renderers = Renderers(default=note)
    renderers.register("wait")(wait)
    with Runner(engine, disk, renderers, concurrency=1, lease=1.0, poll_interval=0.05):
        create("wait")
        assert begun.wait(60)
        lost = create()
        claim_one(engine, "dead")
        expire(engine, lost)
        until(lambda: fresh(engine, lost).rescues == 1)
        assert fresh(engine, lost).status == "queued"
        gate.set()
        recorder.wait(lambda types: types.count("done") == 2)
    assert recorder.types(lost.id) == ["queued", "running", "retrying", "running", "done"]


def test_a_job_that_kills_its_workers_is_stopped_and_says_so(engine: sa.Engine, create: Create) -> None:
    job = create()
    for lost in range(claims.MAX_RESCUES):
        claim_one(engine, f"worker {lost}")
        expire(engine, job)
        assert rescue(engine) == ["content_job.retrying"]
    claim_one(engine, "the last")
    expire(engine, job)
    assert rescue(engine) == ["content_job.failed"]
    failed = fresh(engine, job)
    assert (failed.status, failed.rescues) == ("failed", claims.MAX_RESCUES + 1)
    assert failed.error_message == "its worker was lost 6 times in a row; perhaps this job is what kills it"
    assert failed.finished_at is not None


@pytest.mark.parametrize("end", [RELEASED, Outcome(JobStatus.QUEUED, error="boom", run_at=utcnow())])
def test_workers_lost_now_and_then_do_not_stop_a_job(engine: sa.Engine, create: Create, end: Outcome) -> None:
    job = create()
    for _ in range(claims.MAX_RESCUES):
        claim_one(engine, "lost")
        expire(engine, job)
        rescue(engine)
    claim = claim_one(engine, "well")
    with engine.begin() as connection:
        assert claims.finish(connection, [claims.Completion(claim, outcome=end)], now=utcnow()).events
        connection.execute(sa.update(content_jobs).values(run_at=None))
    claim_one(engine, "lost")
    expire(engine, job)
    assert rescue(engine) == ["content_job.retrying"]
    assert fresh(engine, job).rescues == 1


def test_a_rescue_is_told_after_its_commit(engine: sa.Engine, create: Create) -> None:
    job = create()
    claim_one(engine, "dead")
    expire(engine, job)
    told: list[str] = []
    link = DedicatedConnection(engine)
    look(link, clock=utcnow, on_commit=lambda rows: told.append(fresh(engine, job).status))
    link.close()
    assert told == ["queued"]


def test_a_lost_job_that_was_asked_to_stop_is_cancelled(engine: sa.Engine, create: Create) -> None:
    job = create()
    claim_one(engine, "dead")
    with engine.begin() as connection:
        JobStore(connection).cancel(job.id)
    expire(engine, job)
    assert rescue(engine) == ["content_job.cancelled"]
    assert fresh(engine, job).status == "cancelled"


def test_what_is_claimed_by_hand_or_still_leased_is_never_rescued(engine: sa.Engine, create: Create) -> None:
    by_hand = create()
    with engine.begin() as connection:
        JobStore(connection).transition(by_hand.id, status="running")
    create()
    claim_one(engine, "alive")
    assert rescue(engine) == []


@pytest.mark.parametrize("wrong", [timedelta(days=1), timedelta(days=-1)])
def test_a_host_whose_clock_is_wrong_rescues_just_what_is_lost(
    engine: sa.Engine, create: Create, wrong: timedelta
) -> None:
    held, lost = create(), create()
    claim_one(engine, "well")
    claim_one(engine, "dead")
    expire(engine, lost)
    with engine.begin() as connection:
        events = claims.rescue(connection, limit=10, now=utcnow() + wrong)
    assert [event.job_id for event in events] == [lost.id]
    assert fresh(engine, held).status == "running"


@pytest.mark.parametrize("first", ["rescue", "finish", "renew"])
def test_of_a_worker_and_a_rescue_at_the_same_moment_one_wins(engine: sa.Engine, create: Create, first: str) -> None:
    job = create()
    claim = claim_one(engine, "slow")
    expire(engine, job)

    def finish() -> int:
        with engine.begin() as connection:
            return len(claims.finish(connection, [claims.failed(claim, "slow")], now=utcnow()).events)

    def renew() -> int:
        with engine.begin() as connection:
            return len(claims.renew(connection, [claim], lease=60.0))

    if first == "rescue":
        assert rescue(engine) == ["content_job.retrying"]
        assert (finish(), renew()) == (0, 0)
        assert fresh(engine, job).status == "queued"
    elif first == "finish":
        assert finish() == 1
        assert rescue(engine) == []
        assert fresh(engine, job).status == "failed"
    else:
        assert renew() == 1
        assert rescue(engine) == []
        assert finish() == 1


def test_a_renewal_of_an_old_claim_changes_nothing(engine: sa.Engine, create: Create) -> None:
    job = create()
    old = claim_one(engine, "first")
    expire(engine, job)
    rescue(engine)
    new = claim_one(engine, "second")
    expire(engine, job)
    with engine.begin() as connection:
        assert claims.renew(connection, [old], lease=60.0) == []
        assert claims.check(connection, [old]) == []
        assert fresh(engine, job).lease_until == datetime(2020, 1, 1, tzinfo=UTC)
        assert claims.renew(connection, [old, new], lease=60.0) == [(job.id, False, False)]


# --- renewal


def keeping(engine: sa.Engine, create: Create, lease: float) -> tuple[LeaseKeeper, Attempt]:
    """A keeper of one claimed job."""
    create()
    never: Any = None
    attempt = Attempt(claim_one(engine, "me"), Registration(never), never)
    in_flight = InFlight()
    in_flight.add(attempt)
    return LeaseKeeper(engine, lease, in_flight, clock=utcnow, on_commit=lambda rows: None), attempt


@pytest.mark.parametrize("lost", range(4))
def test_one_lost_renewal_costs_no_claim(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Whichever it is. The keeper's pauses are stepped through on a clock of its own."""
    now, lease, renewals = [1000.0], 60.0, [0]
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now[0]))
    keeper, attempt = keeping(engine, create, lease)
    attempt.renewed = now[0]

    def lose(connection: object, cursor: object, statement: str, *_: object) -> None:
        if "SET lease_until" in statement:
            renewals[0] += 1
            if renewals[0] == lost + 1:
                raise sa.exc.OperationalError("", None, OSError("lost"))

    sa.event.listen(engine, "before_cursor_execute", lose)
    for _ in range(200):
        now[0] += 1.1 * keeper.timer.interval
        with suppress(sa.exc.OperationalError):
            keeper._tick()
        assert now[0] - attempt.renewed < 0.75 * lease
    assert renewals[0] > 6
    assert not attempt.interrupted
    keeper.link.close()


def test_a_lease_that_is_shorter_than_it_should_be_is_renewed_at_the_next_look(
    engine: sa.Engine, create: Create
) -> None:
    keeper, attempt = keeping(engine, create, 60.0)
    with engine.begin() as connection:
        connection.execute(sa.update(content_jobs).values(lease_until=utcnow() - timedelta(hours=1)))
    keeper._tick()
    with engine.connect() as connection:
        _, ending = claims.look(connection, [attempt.claim], within=30.0)
    assert not ending
    keeper.link.close()


def test_what_was_taken_back_from_its_thread_is_not_renewed(engine: sa.Engine, create: Create) -> None:
    keeper, attempt = keeping(engine, create, 60.0)
    assert attempt.task.cancel()
    with engine.begin() as connection:
        connection.execute(sa.update(content_jobs).values(lease_until=utcnow() - timedelta(hours=1)))
    keeper._renew_at = 0.0
    attempt.renewed = -1000.0
    keeper._tick()
    with engine.connect() as connection:
        _, ending = claims.look(connection, [attempt.claim], within=0.0)
    assert ending
    keeper.link.close()


def test_a_job_that_renders_for_several_leases_keeps_its_claim(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    job = create()
    start = time.monotonic()

    def long(ctx: jobkit.RenderContext) -> Rendered:
        until(lambda: time.monotonic() - start > 3 * lease)
        ctx.check()
        return note(ctx)

    lease = 2.0  # a busy machine may stand still for a good part of a second
    with Runner(engine, disk, Renderers(default=long), lease=lease, poll_interval=0.05):
        recorder.wait(lambda types: "done" in types)
    done = fresh(engine, job)
    assert (done.status, done.rescues, done.fence) == ("done", 0, 1)
    assert recorder.types(job.id) == ["running", "done"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [("taken", jobkit.LeaseLost), ("cancelled", jobkit.JobCancelled)],
    ids=["taken", "cancelled"],
)
def test_check_tells_the_renderer_that_its_work_is_not_wanted_any_more(
    engine: sa.Engine, disk: AssetStore, create: Create, change: str, expected: type[BaseException]
) -> None:
    begun, raised = threading.Event(), []

    def endless(ctx: jobkit.RenderContext) -> Rendered:
        begun.set()
        try:
            until(lambda: ctx.check() is not None)
        except BaseException as error:
            raised.append(type(error))
            raise
        return note(ctx)

    job = create("endless")
    renderers = Renderers()
    renderers.register("endless")(endless)
    with Runner(engine, disk, renderers, lease=1.0, poll_interval=0.05):
        assert begun.wait(60)
        with engine.begin() as connection:
            if change == "taken":
                JobStore(connection).transition(job.id, expect="running", status="failed", error_message="by hand")
            else:
                JobStore(connection).cancel(job.id)
        until(lambda: bool(raised))
    assert raised == [expected]
    assert fresh(engine, job).status == ("failed" if change == "taken" else "cancelled")
