"""Leases of the jobs in flight: prolonged while the runner lives, and the renderers told when one is lost. What those
say of how far they are goes the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import Clock
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow
from jobkit.errors import JobCancelled, LeaseLost
from jobkit.jobs import claims
from jobkit.rendering.attempt import Attempt

# How often the claims are looked at in between, in seconds: so soon a renderer hears that its job was cancelled.
LOOK = 1.0
# How much longer between two looks for each job, in seconds, once that is more: a look costs some six microseconds a
# job, and may take 0.3 % of a core.
LOOK_PER_JOB = 0.002


# The least time between two records of how far the jobs are, in seconds, and how much longer for each of them: at most
# two hundred events a second come from one runner.
RECORD = 0.5
RECORD_PER_JOB = 0.005


def look_every(jobs: int) -> float:
    """Seconds between two looks at so many jobs in flight."""
    return max(LOOK, jobs * LOOK_PER_JOB)


def record_every(jobs: int) -> float:
    """Seconds between two records of how far so many jobs are."""
    return max(RECORD, jobs * RECORD_PER_JOB)


class LeaseKeeper:
    """Renews every claim of one runner at a third of its lease, on a thread and connection of its own, and records on
    the way how far the renderers are.

    ``ctx.check()`` of an attempt raises ``JobCancelled`` once its job was asked to stop, and ``LeaseLost`` once the
    claim is gone, or no renewal was acknowledged for a whole lease. A renderer that holds the interpreter's lock for
    longer than the lease (a regular expression, a huge number) keeps this thread waiting too; the fence still holds.
    """

    def __init__(
        self,
        engine: sa.Engine,
        lease: float,
        attempts: Callable[[], list[Attempt]],
        *,
        clock: Clock,
        on_commit: Callable[[Sequence[EventRow]], object],
    ) -> None:
        self._lease, self._attempts = lease, attempts
        self._clock, self._on_commit = clock, on_commit
        self._renew_at, self._look_at, self._record_at = time.monotonic() + lease / 3, 0.0, 0.0
        # AUTOCOMMIT: one statement carries the whole step. On SQLite it takes two to record how far a job is.
        self.link = DedicatedConnection(engine, autocommit=not statements_for(engine).claim_locks)
        self.timer = Periodic("jobkit-leases", min(LOOK, lease / 3), self._tick, self.link.close)

    def hear(self) -> None:
        """A renderer has said how far it is. From any thread."""
        if time.monotonic() >= self._record_at:
            self.timer.wake()

    def record(self) -> None:
        """Record how far the jobs are whose renderers have said so, unless that was done a moment ago; their leases
        begin anew.
        """
        sent = time.monotonic()
        if sent < self._record_at:
            return
        news = {attempt: said for attempt in self._attempts() if (said := attempt.reported) is not attempt.recorded}
        if not news:
            return
        self._record_at = sent + record_every(len(news))
        reports = [(attempt.claim, said) for attempt, said in news.items() if said is not None]
        with self.link.use() as connection, connection.begin():
            held, events = claims.update_progress(connection, reports, lease=self._lease, now=self._clock())
        for attempt, said in news.items():
            attempt.recorded = said
        self._told(list(news), held, renewed=sent)
        self._on_commit(events)

    def _tick(self) -> None:
        attempts = self._attempts()
        if not attempts:
            return
        try:
            self._keep(attempts)
            self.record()
        except Exception:
            for attempt in attempts:
                if time.monotonic() - attempt.renewed > self._lease:
                    attempt.interrupt(LeaseLost(f"the lease of job {attempt.claim.job_id} could not be renewed"))
            raise

    def _keep(self, attempts: list[Attempt]) -> None:
        """Look whether the claims still hold, when it is time; when it is time for that, renew those that are not
        young.
        """
        sent = time.monotonic()
        renewing = sent >= self._renew_at
        if not renewing and sent < self._look_at:
            return
        old = [attempt for attempt in attempts if renewing and sent - attempt.renewed >= self._lease / 6]
        with self.link.use() as connection, connection.begin():
            if old:
                held = claims.renew(connection, [attempt.claim for attempt in old], lease=self._lease)
            else:
                held = claims.check(connection, [attempt.claim for attempt in attempts])
        if renewing:
            self._renew_at = sent + self._lease / 3
        else:
            self._look_at = sent + look_every(len(attempts)) - 0.2  # the timer's pauses vary by a tenth
        self._told(old or attempts, held, renewed=sent if old else None)

    def _told(self, attempts: list[Attempt], held: Mapping[UUID, bool], *, renewed: float | None) -> None:
        for attempt in attempts:
            if renewed is not None and attempt.claim.job_id in held:
                attempt.renewed = renewed
            tell(attempt, held)


def tell(attempt: Attempt, held: Mapping[UUID, bool]) -> None:
    """Interrupt an attempt whose claim is not among those that hold, or whose job was asked to stop."""
    job_id = attempt.claim.job_id
    if job_id not in held:
        attempt.interrupt(LeaseLost(f"job {job_id} was taken from this runner"))
    elif held[job_id]:
        attempt.interrupt(JobCancelled(f"job {job_id} was cancelled"))
