"""Rescue: jobs whose lease expired are queued again, or failed when they have lost too many workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from jobkit.base.clock import Clock
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection, SharedConnection
from jobkit.db.dialects import statements_for
from jobkit.jobs import claims
from jobkit.jobs.claims import OnCommit

# Seconds between two checks for expired leases by a started runner; jobs that one transaction rescues.
INTERVAL = 1.0
BATCH = 100
# Seconds: when a pause took this much longer, the process or its machine was frozen.
OVERSLEPT = 0.5


@dataclass(frozen=True, slots=True)
class RescueReport:
    """How many jobs of lost workers were queued again, failed after too many losses, or cancelled as requested."""

    queued: int = 0
    failed: int = 0
    cancelled: int = 0


def rescue(link: DedicatedConnection | SharedConnection, *, clock: Clock, on_commit: OnCommit) -> RescueReport:
    """Take every job with an expired lease from its worker, in transactions of its own. ``on_commit`` gets the events.

    Fenced: of a rescue and a worker that renews or ends its job at the same moment, one wins as a whole.
    """
    types: list[str] = []
    with link.use() as connection:
        statements = statements_for(connection)
        if statements.claim_locks:
            with connection.begin():
                if not statements.has_expired(connection):
                    return RescueReport()
        while True:
            with connection.begin():
                events = claims.rescue(connection, limit=BATCH, now=clock())
            if events:
                on_commit(events)
            types += [event.type for event in events]
            if len(events) < BATCH:
                break
    return RescueReport(*(types.count(f"content_job.{end}") for end in ("retrying", "failed", "cancelled")))


class Rescuer:
    """Rescues every second on a thread of its own, also while the runner is idle. Calls ``wake`` after queuing jobs."""

    def __init__(
        self, shared: SharedConnection, *, lease: float, clock: Clock, on_commit: OnCommit, wake: Callable[[], None]
    ) -> None:
        self._shared, self._clock, self._on_commit, self._wake = shared, clock, on_commit, wake
        self._pause = min(INTERVAL, lease / 2)
        self._awake = time.monotonic()
        self.timer = Periodic("jobkit-rescue", self._pause, self._tick)

    def _tick(self) -> None:
        # After a freeze the leases of this process may have expired: let it renew them rather than take its own jobs.
        frozen = time.monotonic() - self._awake > self._pause + OVERSLEPT
        self._awake = time.monotonic()
        if frozen:
            return
        try:
            report = rescue(self._shared, clock=self._clock, on_commit=self._on_commit)
            if report.queued:
                self._wake()
        finally:
            self._awake = time.monotonic()
