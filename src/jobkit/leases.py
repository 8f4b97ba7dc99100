"""Leases of the jobs in flight: prolonged while the runner lives, and the renderers told when one is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from uuid import UUID

import sqlalchemy as sa

from jobkit import claims
from jobkit.attempt import Attempt
from jobkit.errors import JobCancelled, LeaseLost
from jobkit.link import Link
from jobkit.pools import Periodic

# How often the claims are looked at in between, in seconds: so soon a renderer hears that its job was cancelled.
LOOK = 1.0
# How much longer between two looks for each job, in seconds, once that is more: a look costs some six microseconds a
# job, and may take 0.3 % of a core.
LOOK_PER_JOB = 0.002


def look_every(jobs: int) -> float:
    """Seconds between two looks at so many jobs in flight."""
    return max(LOOK, jobs * LOOK_PER_JOB)


class LeaseKeeper:
    """Renews every claim of one runner at a third of its lease, on a thread and connection of its own.

    ``ctx.check()`` of an attempt raises ``JobCancelled`` once its job was asked to stop, and ``LeaseLost`` once the
    claim is gone, or no renewal was acknowledged for a whole lease. A renderer that holds the interpreter's lock for
    longer than the lease (a regular expression, a huge number) keeps this thread waiting too; the fence still holds.
    """

    def __init__(self, engine: sa.Engine, lease: float, attempts: Callable[[], list[Attempt]]) -> None:
        self._lease, self._attempts = lease, attempts
        self._renew_at, self._look_at = time.monotonic() + lease / 3, 0.0
        self.link = Link(engine, autocommit=True)  # one statement carries the whole step
        self.timer = Periodic("jobkit-leases", min(LOOK, lease / 3), self._tick, self.link.close)

    def start(self) -> None:
        self.timer.start()

    def stop(self) -> None:
        """End the thread; what it does just now may take a moment longer."""
        self.timer.stop()

    def _tick(self) -> None:
        attempts = self._attempts()
        if not attempts:
            return
        sent = time.monotonic()
        renewing = sent >= self._renew_at
        if not renewing and sent < self._look_at:
            return
        try:
            held = self._ask(attempts, renewing=renewing)
        except Exception:
            for attempt in attempts:
                if time.monotonic() - attempt.renewed > self._lease:
                    attempt.interrupt(LeaseLost(f"the lease of job {attempt.claim.job_id} could not be renewed"))
            raise
        self._look_at = sent + look_every(len(attempts)) - 0.2  # the timer's pauses vary by a tenth
        if renewing:
            self._renew_at = sent + self._lease / 3
        for attempt in attempts:
            if renewing and attempt.claim.job_id in held:
                attempt.renewed = sent
            tell(attempt, held)

    def _ask(self, attempts: list[Attempt], *, renewing: bool) -> dict[UUID, bool]:
        held = [attempt.claim for attempt in attempts]
        with self.link.use() as connection:
            return claims.renew(connection, held, lease=self._lease) if renewing else claims.look(connection, held)


def tell(attempt: Attempt, held: Mapping[UUID, bool]) -> None:
    """Interrupt an attempt whose claim is not among those that hold, or whose job was asked to stop."""
    job_id = attempt.claim.job_id
    if job_id not in held:
        attempt.interrupt(LeaseLost(f"job {job_id} was taken from this runner"))
    elif held[job_id]:
        attempt.interrupt(JobCancelled(f"job {job_id} was cancelled"))
