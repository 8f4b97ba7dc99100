"""The leases of the jobs in flight: they are renewed, lost claims interrupted, and progress recorded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import Clock
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection
from jobkit.db.dialects import statements_for
from jobkit.errors import JobCancelled, LeaseLost
from jobkit.jobs import claims
from jobkit.jobs.claims import OnCommit
from jobkit.rendering.attempt import Attempt
from jobkit.runner.in_flight import InFlight

# Seconds between checks of the claims: this soon a renderer hears that its job was cancelled.
LOOK = 1.0
# Seconds between checks per job in flight (at least LOOK): at 6 µs a job this is 0.3 % of a core.
LOOK_PER_JOB = 0.002
# Seconds between two records of progress, and seconds per job in them, if that is more: at most 200 events a second.
RECORD = 0.5
RECORD_PER_JOB = 0.005


def look_every(jobs: int) -> float:
    return max(LOOK, jobs * LOOK_PER_JOB)


def record_every(jobs: int) -> float:
    return max(RECORD, jobs * RECORD_PER_JOB)


class LeaseKeeper:
    """Renews the claims in flight every third of a lease, and records progress, on a thread and connection of its own.

    ``ctx.check()`` of an attempt raises ``JobCancelled`` once its job was asked to stop, and ``LeaseLost`` once the
    claim is gone, or no renewal was acknowledged for a whole lease. A renderer that holds the GIL for longer than the
    lease (a regular expression, a huge number) holds up this thread too; the fence still protects its job.
    """

    def __init__(
        self, engine: sa.Engine, lease: float, in_flight: InFlight, *, clock: Clock, on_commit: OnCommit
    ) -> None:
        #: Another one, with the same event, when the pipeline is replaced.
        self.in_flight = in_flight
        self._lease, self._clock, self._on_commit = lease, clock, on_commit
        self._renew_at, self._look_at = time.monotonic() + lease / 3, 0.0
        # AUTOCOMMIT: one statement is the whole step. On SQLite recording progress takes two.
        self.link = DedicatedConnection(engine, autocommit=not statements_for(engine).claim_locks)
        pause = min(LOOK, lease / 3)
        self.timer = Periodic("jobkit-leases", pause, self._tick, self.link.close, woken=in_flight.reported)

    def record(self) -> None:
        """Record new progress reports, unless that was done a moment ago; it renews the leases of their jobs."""
        sent, in_flight = time.monotonic(), self.in_flight
        if sent < in_flight.record_at:
            return
        reported = {attempt: attempt.reported for attempt in in_flight.attempts()}
        news = {attempt: report for attempt, report in reported.items() if report is not attempt.recorded}
        if not news:
            return
        in_flight.record_at = sent + record_every(len(news))
        reports = [(attempt.claim, report) for attempt, report in news.items() if report is not None]
        with self.link.use() as connection, connection.begin():
            held, events = claims.update_progress(connection, reports, lease=self._lease, now=self._clock())
        for attempt, report in news.items():
            attempt.recorded = report
        self._after(list(news), held, renewed=sent)
        self._on_commit(events)

    def _tick(self) -> None:
        attempts = self.in_flight.attempts()
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
        """Renew the older claims when it is time for that; else check all of them when it is time for that."""
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
        self._after(old or attempts, held, renewed=sent if old else None)

    def _after(self, attempts: list[Attempt], held: Mapping[UUID, bool], *, renewed: float | None) -> None:
        for attempt in attempts:
            if renewed is not None and attempt.claim.job_id in held:
                attempt.renewed = renewed
            interrupt_if_lost(attempt, held)


def interrupt_if_lost(attempt: Attempt, held: Mapping[UUID, bool]) -> None:
    """Interrupt an attempt whose job is not in ``held``, or asked to stop there."""
    job_id = attempt.claim.job_id
    if job_id not in held:
        attempt.interrupt(LeaseLost(f"job {job_id} was taken from this runner"))
    elif held[job_id]:
        attempt.interrupt(JobCancelled(f"job {job_id} was cancelled"))
