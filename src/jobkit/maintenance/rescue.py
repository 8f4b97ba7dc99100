"""Rescue: jobs whose lease expired are queued again, or failed when they have lost too many workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from jobkit.base.clock import Clock
from jobkit.base.logs import job_fields
from jobkit.base.text import error_message
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection, SharedConnection
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow
from jobkit.db.failures import is_outage
from jobkit.jobs import claims
from jobkit.jobs.claims import OnCommit

logger = logging.getLogger("jobkit")

# Seconds between two checks for expired leases by a started runner; jobs that one transaction rescues.
INTERVAL = 1.0
BATCH = 100
_FIRST = UUID(int=0)
# Seconds: when a pause took this much longer, the process or its machine was frozen.
OVERSLEPT = 0.5


@dataclass(frozen=True, slots=True)
class RescueReport:
    """How many jobs of lost workers were queued again, failed after too many losses, or cancelled as requested."""

    queued: int = 0
    failed: int = 0
    cancelled: int = 0


def rescue(
    link: DedicatedConnection | SharedConnection, *, clock: Clock, on_commit: OnCommit, refused: set[UUID]
) -> RescueReport:
    """Take every job with an expired lease from its worker, in transactions of its own. ``on_commit`` gets the events.

    Fenced: of a rescue and a worker that renews or ends its job at the same moment, one wins as a whole. A job whose
    rescue the database refuses stays as it is, keeps no other, is logged once, and added to ``refused``.
    """
    types: list[str] = []
    after: UUID | None = _FIRST
    while after is not None:
        events, after = _batch(link, after, clock(), refused)
        if events:
            on_commit(events)
        types += [event.type for event in events]
    return RescueReport(*(types.count(f"content_job.{end}") for end in ("retrying", "failed", "cancelled")))


def _batch(
    link: DedicatedConnection | SharedConnection, after: UUID, now: datetime, refused: set[UUID]
) -> tuple[list[EventRow], UUID | None]:
    """Rescue the next jobs beyond ``after``; their events, and where to go on, None at the end."""
    try:
        with link.use() as connection, connection.begin():
            statements = statements_for(connection)
            if statements.claim_locks and statements.first_expired(connection, after=after) is None:
                return [], None
            events = claims.rescue(connection, limit=BATCH, now=now, after=after)
        return events, after if len(events) == BATCH else None
    except Exception as error:
        if is_outage(error):
            raise
    with link.use() as connection, connection.begin():
        first = statements_for(connection).first_expired(connection, after=after)
    try:
        with link.use() as connection, connection.begin():
            return claims.rescue(connection, limit=1, now=now, after=after), first
    except Exception as error:
        if is_outage(error):
            raise
        if first is not None and first not in refused:
            refused.add(first)
            message = "job %s lost its worker, and the database refuses to record that; it stays as it is: %s"
            logger.error(message, first, error_message(error), extra=job_fields(first))
        return [], first


class Rescuer:
    """Rescues every second on a thread of its own, also while the runner is idle. Calls ``wake`` after queuing jobs."""

    def __init__(
        self, shared: SharedConnection, *, lease: float, clock: Clock, on_commit: OnCommit, wake: Callable[[], None]
    ) -> None:
        self._shared, self._clock, self._on_commit, self._wake = shared, clock, on_commit, wake
        self._pause = min(INTERVAL, lease / 2)
        self._awake = time.monotonic()
        self._refused: set[UUID] = set()
        self.timer = Periodic("jobkit-rescue", self._pause, self._tick)

    def _tick(self) -> None:
        # After a freeze the leases of this process may have expired: let it renew them rather than take its own jobs.
        frozen = time.monotonic() - self._awake > self._pause + OVERSLEPT
        self._awake = time.monotonic()
        if frozen:
            return
        try:
            report = rescue(self._shared, clock=self._clock, on_commit=self._on_commit, refused=self._refused)
            if report.queued:
                self._wake()
        finally:
            self._awake = time.monotonic()
