"""Rescue: jobs whose worker died go back into the queue, and a job that kills its workers is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from jobkit.base.clock import Clock
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection, SharedConnection
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import Dialect, EventRow
from jobkit.jobs import claims

# How often a started runner looks for expired leases, in seconds, and how many jobs one transaction rescues.
INTERVAL = 1.0
BATCH = 100
# A pause that was longer by so much, in seconds, was no pause: the process or its machine stood still.
OVERSLEPT = 0.5


@dataclass(frozen=True, slots=True)
class RescueReport:
    """How many jobs of lost workers were queued again, failed for having lost too many, or cancelled as was asked."""

    queued: int = 0
    failed: int = 0
    cancelled: int = 0


def rescue(
    link: DedicatedConnection | SharedConnection,
    statements: Dialect,
    *,
    clock: Clock,
    on_commit: Callable[[Sequence[EventRow]], object],
) -> RescueReport:
    """Take every job whose lease is over from its worker, in transactions of its own; their events go to ``on_commit``.

    Compare and set: a worker that renews or ends its job at the same moment wins or loses as a whole.
    """
    told: list[str] = []
    with link.use() as connection:
        if statements.claim_locks:
            with connection.begin():
                if not statements.has_expired(connection):
                    return RescueReport()
        while True:
            with connection.begin():
                events = claims.rescue(connection, limit=BATCH, now=clock())
            if events:
                on_commit(events)
            told += [event.type for event in events]
            if len(events) < BATCH:
                break
    return RescueReport(
        told.count("content_job.retrying"), told.count("content_job.failed"), told.count("content_job.cancelled")
    )


class Rescuer:
    """Rescues every second, on a thread of its own, whether the runner is idle or not."""

    def __init__(
        self,
        engine: sa.Engine,
        *,
        lease: float,
        clock: Clock,
        shared: SharedConnection,
        on_commit: Callable[[Sequence[EventRow]], object],
        wake: Callable[[], None],
    ) -> None:
        self._clock, self._on_commit, self._wake = clock, on_commit, wake
        self._statements = statements_for(engine)
        self._shared = shared
        self._pause = min(INTERVAL, lease / 2)
        self._awake = time.monotonic()
        self.timer = Periodic("jobkit-rescue", self._pause, self._tick)

    def _tick(self) -> None:
        # Whoever was frozen together with its keeper lets that renew first, rather than take its own jobs.
        frozen = time.monotonic() - self._awake > self._pause + OVERSLEPT
        self._awake = time.monotonic()
        if frozen:
            return
        try:
            self._rescue()
        finally:
            self._awake = time.monotonic()

    def _rescue(self) -> None:
        report = rescue(self._shared, self._statements, clock=self._clock, on_commit=self._on_commit)
        if report.queued:
            self._wake()
