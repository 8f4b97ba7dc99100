"""The leases of the jobs in flight: they are renewed, lost claims interrupted, and progress recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import Clock
from jobkit.base.text import error_message
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow, Held
from jobkit.db.failures import contained
from jobkit.errors import JobCancelled, LeaseLost
from jobkit.jobs import claims
from jobkit.jobs.claims import OnCommit, Report
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.failures import fields_of
from jobkit.runner.in_flight import InFlight

logger = logging.getLogger("jobkit")
# Progress reports that were recorded together, their events, and the claims that hold.
Recorded = tuple[Sequence[tuple[Attempt, Report | None]], list[EventRow], list[Held]]
# Seconds between checks of the claims: this soon a renderer hears that its job was cancelled.
LOOK = 1.0
# Seconds between checks per job in flight (at least LOOK): at 6 µs a job this is 0.3 % of a core.
LOOK_PER_JOB = 0.002
# Seconds between two records of progress, and seconds per job in them, if that is more: at most 200 events a second.
RECORD = 0.5
RECORD_PER_JOB = 0.005
# Renewals in a lease: one that is lost costs no claim.
RENEWALS = 3


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
        self._renew_at, self._look_at = time.monotonic() + lease / RENEWALS, 0.0
        # AUTOCOMMIT: one statement is the whole step. On SQLite recording progress takes two.
        self.link = DedicatedConnection(engine, autocommit=not statements_for(engine).claim_locks)
        pause = min(LOOK, lease / RENEWALS)
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
        for recorded, events, held in contained(list(news.items()), self._record, self._unrecorded):
            locked = {one.job_id for one in held if one.locked}
            for attempt, report in recorded:
                if attempt.claim.job_id not in locked:
                    attempt.recorded = report
            self._after([attempt for attempt, _ in recorded], held, renewed=sent)
            self._on_commit(events)

    def _record(self, news: Sequence[tuple[Attempt, Report | None]]) -> Recorded:
        reports = [(attempt.claim, report) for attempt, report in news if report is not None]
        with self.link.use() as connection, connection.begin():
            return news, *claims.update_progress(connection, reports, lease=self._lease, now=self._clock())

    @staticmethod
    def _unrecorded(news: tuple[Attempt, Report | None], error: Exception) -> None:
        attempt, report = news
        attempt.recorded = report
        message, fields = "job %s: its progress was not recorded: %s", fields_of(attempt.claim)
        logger.warning(message, attempt.claim.job_id, error_message(error), extra=fields)

    def _tick(self) -> None:
        attempts = self.in_flight.living()
        if not attempts:
            return
        try:
            self._keep(attempts)
            self.record()
        except Exception:
            self._renew_at = 0.0  # tried again after the timer's pause, not after a third of the lease
            self._interrupt_overdue(attempts)
            raise

    def _keep(self, attempts: list[Attempt]) -> None:
        """Renew the older claims when it is time for that; else check all of them when it is time for that, and renew
        those whose leases are not what they should be: the database's clock was set, or somebody has changed them.
        """
        sent = time.monotonic()
        renewing = sent >= self._renew_at
        if not renewing and sent < self._look_at:
            return
        old = [attempt for attempt in attempts if renewing and sent - attempt.renewed >= self._lease / 6]
        if renewing:
            self._renew_at = sent + self._lease / RENEWALS
        else:
            self._look_at = sent + look_every(len(attempts)) - 0.2  # the timer's pauses vary by a tenth
        found: set[UUID] = set()
        step = self._renew if old else partial(self._check, found)
        for kept, held in contained(old or attempts, step, self._unrenewed):
            self._after(kept, held, renewed=sent if old else None)
        ending = [attempt for attempt in attempts if attempt.claim.job_id in found]
        for kept, held in contained(ending, self._renew, self._unrenewed) if ending else ():
            self._after(kept, held, renewed=sent)

    def _renew(self, attempts: Sequence[Attempt]) -> tuple[Sequence[Attempt], list[Held]]:
        with self.link.use() as connection, connection.begin():
            return attempts, claims.renew(connection, [attempt.claim for attempt in attempts], lease=self._lease)

    def _check(self, found: set[UUID], attempts: Sequence[Attempt]) -> tuple[Sequence[Attempt], list[Held]]:
        with self.link.use() as connection, connection.begin():
            held, ending = claims.look(connection, [attempt.claim for attempt in attempts], within=self._lease / 2)
        found |= ending
        return attempts, held

    def _unrenewed(self, attempt: Attempt, error: Exception) -> None:
        message, fields = "job %s: its lease was not renewed: %s", fields_of(attempt.claim)
        logger.warning(message, attempt.claim.job_id, error_message(error), extra=fields)
        self._interrupt_overdue([attempt])

    def _interrupt_overdue(self, attempts: Sequence[Attempt]) -> None:
        for attempt in attempts:
            if time.monotonic() - attempt.renewed > self._lease:
                attempt.interrupt(LeaseLost(f"the lease of job {attempt.claim.job_id} could not be renewed"))

    def _after(self, attempts: Sequence[Attempt], held: Sequence[Held], *, renewed: float | None) -> None:
        by_id = {one.job_id: one for one in held}
        for attempt in attempts:
            found = by_id.get(attempt.claim.job_id)
            if renewed is not None and found is not None:
                # Nobody can take a job whose row another transaction has locked. It is renewed at the next tick.
                attempt.renewed = renewed - self._lease / 6 if found.locked else renewed
                if found.locked:
                    self._renew_at = renewed
            interrupt_if_lost(attempt, found)


def interrupt_if_lost(attempt: Attempt, held: Held | None) -> None:
    """Interrupt an attempt whose claim is not ``held``, or whose job was asked to stop."""
    job_id = attempt.claim.job_id
    if held is None:
        attempt.interrupt(LeaseLost(f"job {job_id} was taken from this runner"))
    elif held.cancelled:
        attempt.interrupt(JobCancelled(f"job {job_id} was cancelled"))
