"""Rescue: jobs whose lease expired are queued again, or failed when they have lost too many workers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from uuid import UUID

from jobkit.base.clock import CENTURY, Clock
from jobkit.base.logs import job_fields
from jobkit.base.text import error_message
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection, SharedConnection
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow, Leases
from jobkit.db.failures import is_outage
from jobkit.jobs import claims
from jobkit.jobs.claims import Claim, OnCommit

logger = logging.getLogger("jobkit")

# Seconds between two checks for expired leases by a started runner; jobs that one transaction rescues.
INTERVAL = 1.0
BATCH = 100
_FIRST = UUID(int=0)
# Seconds: when a pause took this much longer, the process or its machine was frozen.
OVERSLEPT = 0.5
# A lease that ends more than so many seconds from now, and more than so many leases of this runner, was given by a
# clock that was wrong.
FAR, FAR_LEASES = 600.0, 3


@dataclass(frozen=True, slots=True)
class RescueReport:
    """How many jobs of lost workers were queued again, failed after too many losses, or cancelled as requested."""

    queued: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class RescueLimits:
    """What a rescue leaves alone: the claims of ``mine``, leases that ended more than ``age`` seconds ago, and all when
    the database takes more than ``patience`` seconds for the first. ``refused`` gets the jobs whose rescue the database
    refuses.
    """

    refused: set[UUID] = field(default_factory=set)
    mine: Sequence[Claim] = ()
    age: float = CENTURY
    patience: float = math.inf


class TooLate(Exception):
    """The database took so long for a rescue that those who live must renew first."""


def rescue(
    link: DedicatedConnection | SharedConnection,
    *,
    clock: Clock,
    on_commit: OnCommit,
    limits: RescueLimits | None = None,
) -> RescueReport:
    """Take every job with an expired lease from its worker, in transactions of its own. ``on_commit`` gets the events.

    Fenced: of a rescue and a worker that renews or ends its job at the same moment, one wins as a whole. A job whose
    rescue the database refuses stays as it is, keeps no other, and is logged once. Raises ``TooLate``, with nothing
    written, when the first jobs take longer than the patience of ``limits``.
    """
    types: list[str] = []
    after: UUID | None = _FIRST
    limits = limits or RescueLimits()
    while after is not None:
        events, after = _batch(link, after, clock(), limits)
        limits = replace(limits, patience=math.inf)
        if events:
            on_commit(events)
        types += [event.type for event in events]
    return RescueReport(*(types.count(f"content_job.{end}") for end in ("retrying", "failed", "cancelled")))


def _batch(
    link: DedicatedConnection | SharedConnection, after: UUID, now: datetime, limits: RescueLimits
) -> tuple[list[EventRow], UUID | None]:
    """Rescue the next jobs beyond ``after``; their events, and where to go on, None at the end."""
    step = partial(claims.rescue, now=now, after=after, age=limits.age, mine=limits.mine)
    try:
        with link.use() as connection, connection.begin():
            statements = statements_for(connection)
            if statements.claim_locks and statements.first_expired(connection, after=after) is None:
                return [], None
            began = time.monotonic()
            events = step(connection, limit=BATCH)
            if time.monotonic() - began > limits.patience:
                raise TooLate
        return events, after if len(events) == BATCH else None
    except Exception as error:
        if isinstance(error, TooLate) or is_outage(error):
            raise
    with link.use() as connection, connection.begin():
        first = statements_for(connection).first_expired(connection, after=after)
    try:
        with link.use() as connection, connection.begin():
            return step(connection, limit=1), first
    except Exception as error:
        if is_outage(error):
            raise
        if first is not None and first not in limits.refused:
            limits.refused.add(first)
            message = "job %s lost its worker, and the database refuses to record that; it stays as it is: %s"
            logger.error(message, first, error_message(error), extra=job_fields(first))
        return [], first


class Rescuer:
    """Rescues every second on a thread of its own, also while the runner is idle. Calls ``wake`` after queuing jobs.

    Never the claims that ``mine`` gives, those of this runner that are alive. Whatever makes it doubt that the others'
    workers are lost, makes it wait once, for two pauses, in which they renew: it was frozen or could not reach the
    database, the database's clock has jumped, or leases ended longer ago than since it looked last.
    """

    def __init__(
        self,
        shared: SharedConnection,
        *,
        lease: float,
        clock: Clock,
        on_commit: OnCommit,
        wake: Callable[[], None],
        mine: Callable[[], Sequence[Claim]] = tuple,
    ) -> None:
        self._shared, self._clock, self._on_commit, self._wake = shared, clock, on_commit, wake
        self._lease, self._mine = lease, mine
        self._pause = min(INTERVAL, lease / 2)
        self._awake = time.monotonic()
        self._refused: set[UUID] = set()
        # Whether the last look failed, and whether the pause before this one was given to the keepers.
        self._failed = self._waited = False
        # How much the database's clock was ahead of the monotonic one, at most, at the last look.
        self._ahead = math.inf
        # The end of the first lease at the last look: what is refused or locked stays, and is no reason to wait longer.
        self._first: float | None = None
        self.timer = Periodic("jobkit-rescue", self._pause, self._tick)

    def _tick(self) -> None:
        frozen = time.monotonic() - self._awake > self.timer.interval + OVERSLEPT
        away, self._failed, first = frozen or self._failed, True, self._first
        try:
            self._look(away=away)
            self._failed = False
        finally:
            self._awake = time.monotonic()
            self.timer.interval = 2 * self._pause if self._waited and self._first != first else self._pause

    def _look(self, *, away: bool) -> None:
        leases, jumped = self._leases()
        self._first = leases.first
        if away or jumped:
            self._waited = True
            return
        waited, self._waited = self._waited, False
        if leases.last is not None and leases.last - leases.clock > (far := max(FAR, FAR_LEASES * self._lease)):
            with self._shared.use() as connection, connection.begin():
                statements_for(connection).cap_leases(connection, far=far, lease=self._lease)
        if leases.first is None or leases.first >= leases.clock:
            return
        fresh = self._pause + OVERSLEPT
        self._waited = not waited and leases.clock - leases.first > fresh
        age, patience = (CENTURY, math.inf) if waited else (fresh, OVERSLEPT)
        limits = RescueLimits(self._refused, self._mine(), age, patience)
        try:
            report = rescue(self._shared, clock=self._clock, on_commit=self._on_commit, limits=limits)
        except TooLate:
            self._waited = True
        else:
            if report.queued:
                self._wake()

    def _leases(self) -> tuple[Leases, bool]:
        """When leases end, and whether the database's clock has jumped ahead since the last look."""
        began = time.monotonic()
        with self._shared.use() as connection, connection.begin():
            leases = statements_for(connection).leases(connection)
        jumped = leases.clock - time.monotonic() > self._ahead + OVERSLEPT
        self._ahead = leases.clock - began
        return leases, jumped
