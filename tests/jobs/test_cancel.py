"""Cancel and retry by hand: one winner and one event, however they meet claims and ends of attempts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import ANY_COMPANY, InvalidTransition, JobNotFound, JobStatus, JobStore
from jobkit.base.clock import utcnow
from jobkit.base.ids import new_id
from jobkit.jobs import claims
from jobkit.jobs.claims import RELEASED, Claim, Completion
from jobkit.jobs.outcomes import Outcome
from jobkit.tables import JOB_COLUMNS, content_job_events, content_jobs
from jobkit.types import StoredObject
from tests.support.databases import Database
from tests.support.recorder import Recorder
from tests.support.runners import note, only, seen, until

Create = Callable[..., jobkit.Job]
Act = Callable[[sa.Connection, Claim], Any]


def told(engine: sa.Engine, job: jobkit.Job) -> list[str]:
    """The job's events by short name; fails when ``seq`` has a gap or the row counts others."""
    e = content_job_events.c
    with engine.connect() as connection:
        rows = connection.execute(sa.select(e.seq, e.type).where(e.job_id == job.id).order_by(e.seq)).all()
    assert [row.seq for row in rows] == list(range(1, seen(engine, job).event_seq + 1))
    return [row.type.removeprefix("content_job.") for row in rows]


def take(connection: sa.Connection) -> Claim:
    return claims.claim(connection, limit=1, worker_id="w", lease=60.0, now=utcnow())[0][0]


def ends(outcome: Outcome) -> Act:
    return lambda connection, claim: claims.finish(connection, [Completion(claim, outcome=outcome)], now=utcnow())


def done(connection: sa.Connection, claim: Claim) -> Any:
    file = StoredObject("local_disk", f"acme/generated/{new_id()}", "text/plain", 1, "0" * 64, "a", recorded=False)
    return claims.finish(connection, [Completion(claim, files=(file,))], now=utcnow())


def rescued(connection: sa.Connection, claim: Claim) -> Any:
    connection.execute(content_jobs.update().values(lease_until=utcnow() - timedelta(hours=1)))
    return claims.rescue(connection, limit=1, now=utcnow())


def cancel(connection: sa.Connection, claim: Claim) -> Any:
    return JobStore(connection).cancel(claim.job_id)


def by_hand(status: str) -> Act:
    return lambda connection, claim: JobStore(connection).transition(claim.job_id, status=status)


LATER = utcnow() + timedelta(hours=1)
ENDS: dict[str, Act] = {
    "done": done,
    "failed": ends(Outcome(JobStatus.FAILED, "no")),
    "retried": ends(Outcome(JobStatus.QUEUED, "no", LATER)),
    "snoozed": ends(Outcome(JobStatus.QUEUED, None, LATER, charged=False)),
    "released": ends(RELEASED),
    "rescued": rescued,
    "stopped": ends(Outcome(JobStatus.CANCELLED)),
    "done by hand": by_hand("done"),
    "queued by hand": by_hand("queued"),
}
# What a running job that was asked to stop becomes by each.
ASKED = dict.fromkeys(("retried", "snoozed", "released", "rescued", "stopped"), "cancelled") | {
    "done": "done", "failed": "failed", "done by hand": "done", "queued by hand": "queued"
}  # fmt: skip


def test_a_queued_job_is_cancelled_at_once(engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.begin() as connection:
        cancelled = JobStore(connection).cancel(str(job.id), company_id="acme")
    assert (cancelled.status, cancelled.cancel_requested_at) == (JobStatus.CANCELLED, None)
    assert cancelled.finished_at is not None
    assert cancelled.finished_at == cancelled.updated_at
    assert tuple(seen(engine, job))[3:-1] == tuple(getattr(cancelled, c.name) for c in JOB_COLUMNS)[3:]
    assert told(engine, job) == ["queued", "cancelled"]


@pytest.mark.parametrize(
    "options", [{"run_at": utcnow() + timedelta(days=1)}, {"priority": 5}, {"idempotency_key": "k"}]
)
def test_a_job_that_waits_for_its_time_is_cancelled_as_well(
    options: Any, engine: sa.Engine, create: Create, disk: jobkit.AssetStore
) -> None:
    job = create(**options)
    with engine.begin() as connection:
        JobStore(connection).cancel(job.id)
    later = lambda: utcnow() + timedelta(days=2)  # noqa: E731
    assert jobkit.Runner(engine, disk, only(), clock=later).run_until_idle(timeout=60) == 0
    assert told(engine, job) == ["queued", "cancelled"]


def test_cancelling_twice_changes_nothing_more(engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.begin() as connection:
        first = JobStore(connection).cancel(job.id)
    with engine.begin() as connection:
        assert JobStore(connection).cancel(job.id) == first
    running = create()
    with engine.begin() as connection:
        take(connection)
        asked = [JobStore(connection).cancel(running.id).cancel_requested_at for _ in range(2)]
    assert asked[0] == asked[1] is not None
    assert (told(engine, job), told(engine, running)) == (["queued", "cancelled"], ["queued", "running"])


@pytest.mark.parametrize("method", ["cancel", "retry"])
@pytest.mark.parametrize(
    ("job_id", "company"),
    [*((bad, ANY_COMPANY) for bad in (new_id(), "nonsense", "", None, 7)), ("own", "other"), ("own", 7)],
)
def test_a_job_that_is_not_there_or_not_theirs_is_not_found(
    method: str, job_id: Any, company: object, engine: sa.Engine, create: Create
) -> None:
    job = create()
    with engine.begin() as connection, pytest.raises(JobNotFound):
        getattr(JobStore(connection), method)(job.id if job_id == "own" else job_id, company_id=company)
    assert told(engine, job) == ["queued"]


@pytest.mark.parametrize("status", ["done", "failed"])
def test_what_has_ended_cannot_be_cancelled(status: str, engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.begin() as connection:
        JobStore(connection).transition(job.id, status=status)
    before = seen(engine, job)
    with engine.begin() as connection, pytest.raises(InvalidTransition, match=f"is '{status}': only a queued"):
        JobStore(connection).cancel(job.id)
    assert seen(engine, job) == before


def test_a_rolled_back_cancel_or_retry_changed_nothing(engine: sa.Engine, create: Create) -> None:
    job = create()
    before = seen(engine, job)
    with engine.begin() as connection, connection.begin_nested() as savepoint:
        JobStore(connection).cancel(job.id)
        JobStore(connection).retry(job.id)
        savepoint.rollback()
    assert (seen(engine, job), told(engine, job)) == (before, ["queued"])


@pytest.mark.parametrize("end", ENDS)
def test_an_attempt_that_ends_after_the_job_was_asked_to_stop(end: str, engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.begin() as connection:
        claim = take(connection)
    with engine.begin() as connection:
        asked = JobStore(connection).cancel(job.id)
    assert (asked.status, asked.fence, asked.worker_id) == ("running", 1, "w")
    with engine.begin() as connection:
        ENDS[end](connection, claim)
    row = seen(engine, job)
    assert told(engine, job) == ["queued", "running", ASKED[end]]
    assert (row.status, row.lease_until) == (ASKED[end], None)
    if row.status == "cancelled":
        assert row.finished_at is not None
        assert row.error_message is None
        assert row.run_at is None
    with engine.begin() as connection:  # it has ended: nothing of that claim counts any more
        assert (
            claims.finish(connection, [Completion(claim, outcome=Outcome(JobStatus.FAILED, "x"))], now=utcnow()).events
            == []
        )


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("committed", [True, False])
def test_an_end_between_the_look_and_the_write_of_a_cancel(
    end: str, committed: bool, engine: sa.Engine, database: Database, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()
    with engine.begin() as connection:
        claim = take(connection)
    other, between = database.connect(), [ENDS[end]]

    def late(store: JobStore, connection: sa.Connection, job: jobkit.Job) -> Any:
        if between:
            with other.connect() as elsewhere:
                between.pop()(elsewhere, claim)
                elsewhere.commit() if committed else elsewhere.rollback()
        return write(store, connection, job)

    write = JobStore._cancel
    monkeypatch.setattr(JobStore, "_cancel", late)
    outcome = attempted(engine, cancel, claim)
    if not committed:
        assert outcome == "running"
        assert told(engine, job) == ["queued", "running"]
        return
    first = {"done": "done", "failed": "failed", "retried": "retrying", "rescued": "retrying", "stopped": "cancelled",
             "done by hand": "done"}.get(end, "queued")  # fmt: skip
    again = first in ("retrying", "queued")
    assert told(engine, job) == ["queued", "running", first, *(["cancelled"] if again else [])]
    assert outcome == ("cancelled" if again or first == "cancelled" else "InvalidTransition")


def attempted(engine: sa.Engine, act: Act, claim: Claim, skipped: threading.Event | None = None) -> str:
    """The status that ``act`` returns, or the name of what it raised. As a runner it comes back for what was locked."""
    try:
        while True:
            with engine.begin() as connection:
                found = act(connection, claim)
            if not (isinstance(found, claims.Ended) and found.locked):
                return str(found.status) if isinstance(found, jobkit.Job) else str(len(found))
            assert skipped is not None
            skipped.set()
    except InvalidTransition as error:
        return type(error).__name__


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("first", ["cancel", "end"])
@pytest.mark.parametrize("committed", [True, False])
def test_a_cancel_and_an_end_at_the_same_moment_have_one_winner(
    end: str, first: str, committed: bool, engine: sa.Engine, database: Database, create: Create
) -> None:
    """The first holds the row while the second wants it; then it commits or rolls back."""
    job = create()
    with engine.begin() as connection:
        claim = take(connection)
    acts = (cancel, ENDS[end]) if first == "cancel" else (ENDS[end], cancel)
    other, outcome, skipped = database.connect(), [], threading.Event()
    with engine.connect() as connection:
        acts[0](connection, claim)
        thread = threading.Thread(target=lambda: outcome.append(attempted(other, acts[1], claim, skipped)))
        waits = waiting(other, acts[1])
        thread.start()
        until(lambda: skipped.is_set() or waits(), "the second's write")
        assert not outcome
        connection.commit() if committed else connection.rollback()
    thread.join(60)
    events = told(engine, job)
    terminal = [kind for kind in events if kind in ("done", "failed", "cancelled")]
    assert len(terminal) <= 1
    assert len(outcome) == 1
    if first == "cancel" and committed:
        assert events == ["queued", "running", ASKED[end]]
    elif first == "cancel":  # nobody asked after all
        assert "cancelled" not in events or end == "stopped"
    elif committed and events[2] in ("done", "failed"):
        assert outcome == ["InvalidTransition"]
        assert len(events) == 3
    elif committed:
        assert (events[-1], seen(engine, job).status) == ("cancelled", "cancelled")
    else:
        assert outcome == ["running"]
        assert seen(engine, job).cancel_requested_at is not None


def waiting(engine: sa.Engine, act: Act) -> Callable[[], bool]:
    """Whether ``act`` on ``engine`` has looked, if it looks first, and goes on to wait for the other's lock."""
    begun = threading.Event()
    # On SQLite a write waits before anyone hears of it; on PostgreSQL the server tells of the wait.
    sa.event.listen(engine, "after_cursor_execute" if act is cancel else "begin", lambda *_: begun.set())

    def waits() -> bool:
        if engine.dialect.name == "sqlite" or not begun.is_set():
            return begun.is_set()
        with engine.connect() as connection:
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return bool(connection.execute(sa.text(query)).scalar())

    return waits


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("first", ["cancel", "claim"])
def test_a_cancel_and_a_claim_at_the_same_moment(
    first: str, committed: bool, engine: sa.Engine, database: Database, create: Create
) -> None:
    job, other, outcome = create(), database.connect(), []
    hand = Claim(job.id, "acme", "note", {}, None, 0, 0)

    def claim(connection: sa.Connection, _: Claim) -> Any:
        return claims.claim(connection, limit=1, worker_id="w", lease=60.0, now=utcnow())[0]

    acts = (cancel, claim) if first == "cancel" else (claim, cancel)
    with engine.connect() as connection:
        acts[0](connection, hand)
        thread = threading.Thread(target=lambda: outcome.append(attempted(other, acts[1], hand)))
        waits = waiting(other, acts[1])
        thread.start()
        until(lambda: outcome or waits(), "the second's write")  # a claim passes over a locked row
        connection.commit() if committed else connection.rollback()
    thread.join(60)
    row = seen(engine, job)
    if first == "cancel" and committed:
        assert (outcome, row.status, told(engine, job)) == (["0"], "cancelled", ["queued", "cancelled"])
    elif first == "claim" and committed:
        assert (outcome, row.status, told(engine, job)) == (["running"], "running", ["queued", "running"])
        assert row.cancel_requested_at is not None
    elif first == "claim":
        assert (outcome, told(engine, job)) == (["cancelled"], ["queued", "cancelled"])


def test_many_who_cancel_a_queued_job_are_told_once(engine: sa.Engine, database: Database, create: Create) -> None:
    for _ in range(5):
        job, barrier = create(), threading.Barrier(6)
        outcomes: list[str] = []

        def stop(job: jobkit.Job = job, barrier: threading.Barrier = barrier, out: list[str] = outcomes) -> None:
            barrier.wait(60)
            out.append(attempted(engine, cancel, Claim(job.id, "acme", "note", {}, None, 0, 0)))

        threads = [threading.Thread(target=stop) for _ in range(6)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        assert outcomes == ["cancelled"] * 6
        assert told(engine, job) == ["queued", "cancelled"]


class Checks:
    """A renderer that asks ``ctx.check()`` until it raises, or until it is let go."""

    def __init__(self, then: Callable[[], Any] | None = None) -> None:
        self.entered, self.let_go, self.raised = threading.Event(), threading.Event(), threading.Event()
        self._then = then

    def __call__(self, ctx: jobkit.RenderContext) -> jobkit.Rendered:
        self.entered.set()
        try:
            while not self.let_go.wait(0.005):
                ctx.check()
        except jobkit.JobCancelled:
            self.raised.set()
            if self._then is not None:
                self._then()
            raise
        return note(ctx)


def test_a_running_job_hears_of_it_and_ends_cancelled(
    engine: sa.Engine, disk: jobkit.AssetStore, create: Create, recorder: Recorder
) -> None:
    renderer = Checks()
    with jobkit.Runner(engine, disk, only(renderer), lease=1, poll_interval=0.05):
        job = create()
        assert renderer.entered.wait(60)
        with engine.begin() as connection:
            assert JobStore(connection).cancel(job.id).status is JobStatus.RUNNING
        recorder.wait(lambda types: "cancelled" in types)
    row = seen(engine, job)
    assert (row.status, row.error_message, row.lease_until) == ("cancelled", None, None)
    assert row.cancel_requested_at <= row.finished_at
    assert recorder.types(job.id) == told(engine, job) == ["queued", "running", "cancelled"]
    assert recorder.events[-1].payload == {"jobId": str(job.id)}


@pytest.mark.parametrize("swallows", ["the interruption", "nothing, and raises another error"])
def test_a_renderer_that_does_not_stop_still_ends_once(
    swallows: str, engine: sa.Engine, disk: jobkit.AssetStore, create: Create, recorder: Recorder
) -> None:
    def then() -> None:
        raise ValueError("while cleaning up")

    def stubborn(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        try:
            return renderer(ctx)
        except jobkit.JobCancelled:
            return note(ctx)

    renderer = Checks() if "interruption" in swallows else Checks(then)
    renderers = jobkit.Renderers()
    renderers.register("note", max_attempts=2)(stubborn)
    with jobkit.Runner(engine, disk, renderers, lease=1, poll_interval=0.05):
        job = create()
        assert renderer.entered.wait(60)
        with engine.begin() as connection:
            JobStore(connection).cancel(job.id)
        expected = "done" if "interruption" in swallows else "cancelled"
        recorder.wait(lambda types: expected in types)
    assert told(engine, job) == ["queued", "running", expected]


def test_a_job_claimed_by_hand_is_asked_and_ended_by_hand(engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.begin() as connection:
        store = JobStore(connection)
        store.transition(job.id, status="running")
        asked = store.cancel(job.id)
        assert (asked.status, asked.lease_until) == (JobStatus.RUNNING, None)
        assert asked.cancel_requested_at is not None
        store.transition(job.id, expect="running", status="cancelled")
    assert told(engine, job) == ["queued", "running", "cancelled"]
