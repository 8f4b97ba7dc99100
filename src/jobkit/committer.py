"""The committer: each turn of a pipeline as one transaction, on one connection."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit import claims
from jobkit._dialects import statements_for
from jobkit._dialects.base import EventRow
from jobkit.claims import Claim
from jobkit.clock import Clock
from jobkit.link import Link, each_by_itself
from jobkit.rotation import Rotation
from jobkit.tables import content_jobs
from jobkit.turns import Turn, intents
from jobkit.types import JobStatus


class Committed(NamedTuple):
    """What a turn came to: its events, what it claimed, and of the ends whose first reply was lost those that had been
    committed then, with the status they brought: no other claim has come since, and the job does not run.
    """

    events: list[EventRow]
    taken: list[Claim]
    settled: dict[UUID, JobStatus]


class Committer:
    """Ends, intents and claims of one runner. Used by one thread; ``link`` may be cut by others."""

    def __init__(
        self, engine: sa.Engine, *, worker_id: str, lease: float, clock: Clock, holds: Callable[[Claim], bool]
    ) -> None:
        """``holds``: whether the runner knows of a claim."""
        self.link = Link(engine)
        self._worker_id, self._lease, self._clock, self._holds = worker_id, lease, clock, holds
        self._statements = statements_for(engine)
        self._rotation = Rotation(engine)
        # Until when a claim whose reply was lost may still be committed: one that is cut while it waits for a lock goes
        # on on the server, which does not look at the connection before it answers.
        self._unsure_until = -math.inf

    @property
    def unsure(self) -> bool:
        """Whether a claim may have been committed without this runner knowing: its reply was lost within a lease."""
        return time.monotonic() < self._unsure_until

    @property
    def waiting(self) -> bool:
        """Whether more jobs wait than the last claim took."""
        return self._rotation.waiting

    def commit(self, turn: Turn) -> Committed:
        """Do what ``turn`` says, as a whole."""
        try:
            with self.link.use() as connection:
                events, taken = self._commit(connection, turn)
                settled = self._settled(connection, turn, {event.job_id for event in events}) if turn.again else {}
        except BaseException:
            if turn.limit:
                self._unsure_until = time.monotonic() + self._lease
            raise
        return Committed(events, taken, settled)

    def _commit(self, connection: sa.Connection, turn: Turn) -> tuple[list[EventRow], list[Claim]]:
        unsure = self.unsure
        if turn.only_claims and not unsure:
            return self._claim_only(connection, turn)
        now = self._clock()
        events: list[EventRow] = []
        taken: list[Claim] = []
        with connection.begin():
            if turn.ends:
                events += claims.finish(connection, turn.ends, now=now)
            if turn.rendered:
                claims.record_intents(connection, [intent for attempt in turn.rendered for intent in intents(attempt)])
            if turn.limit and unsure:
                events += claims.release(connection, self._unknown(connection), now=now)
            if turn.limit:
                running, taken = self._claim(connection, turn.limit, now, thorough=turn.thorough)
                events += running
        return events, taken

    def _claim_only(self, connection: sa.Connection, turn: Turn) -> tuple[list[EventRow], list[Claim]]:
        """As little as there is to do: no lock for nothing, and no transaction around one statement."""
        now, thorough = self._clock(), turn.thorough
        if self._statements.claim_locks:
            if not self._queued(connection):
                return [], []
        else:
            with each_by_itself(connection), connection.begin():
                self._rotation.look(connection, now, thorough=thorough)
                thorough = False  # it has just looked
                if not self.waiting:
                    return self._claim(connection, turn.limit, now, thorough=thorough)
        with connection.begin():
            return self._claim(connection, turn.limit, now, thorough=thorough)

    def _claim(
        self, connection: sa.Connection, limit: int, now: datetime, *, thorough: bool
    ) -> tuple[list[EventRow], list[Claim]]:
        """The events of what is claimed, and the claims."""
        pick = partial(self._rotation.claim, thorough=thorough)
        taken, events = claims.claim(
            connection, limit=limit, worker_id=self._worker_id, lease=self._lease, now=now, pick=pick
        )
        return events, taken

    def release(self, held: Sequence[Claim]) -> list[EventRow]:
        """Give back what is held, and what may have been claimed without the runner knowing; the events."""
        with self.link.use() as connection, connection.begin():
            unknown = self._unknown(connection) if self.unsure else []
            return claims.release(connection, [*held, *unknown], now=self._clock())

    def _settled(self, connection: sa.Connection, turn: Turn, told: set[UUID]) -> dict[UUID, JobStatus]:
        c = content_jobs.c
        fences = {end.claim.job_id: end.claim.fence for end in turn.ends if end.claim.job_id not in told}
        with connection.begin():
            rows = connection.execute(
                sa.select(c.id, c.fence, c.status).where(c.id.in_(list(fences)), c.status != JobStatus.RUNNING.value)
            ).all()
        return {row.id: JobStatus(row.status) for row in rows if row.fence == fences[row.id]}

    def _queued(self, connection: sa.Connection) -> bool:
        with connection.begin():
            return self._statements.has_queued(connection, now=self._clock())

    def _unknown(self, connection: sa.Connection) -> list[Claim]:
        """What is claimed in this runner's name and not in its books."""
        c = content_jobs.c
        rows = connection.execute(
            sa.select(c.id, c.company_id, c.fence).where(c.worker_id == self._worker_id, c.status == "running")
        )
        found = [Claim(row.id, row.company_id, "", {}, None, row.fence, 0) for row in rows]
        return [claim for claim in found if not self._holds(claim)]
