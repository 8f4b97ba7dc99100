"""A turn of the pipeline: what one transaction does with attempts, and whether the database failed it or refused it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit.assets import intents
from jobkit.assets.intents import Intent
from jobkit.base.clock import Clock
from jobkit.base.text import error_message
from jobkit.db.connections import DedicatedConnection, autocommitting, is_refusal
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow
from jobkit.jobs import claims, outcomes
from jobkit.jobs.claims import Claim, Completion
from jobkit.jobs.fairness import RoundRobin
from jobkit.rendering.attempt import Attempt
from jobkit.tables import content_jobs
from jobkit.types import JobStatus


@dataclass(slots=True)
class Turn:
    """What one transaction does."""

    ends: list[Completion] = field(default_factory=list)
    rendered: list[Attempt] = field(default_factory=list)
    limit: int = 0
    asked: int = 0
    check_scheduled: bool = False
    # Whether some of the ends were sent to the database before, without a reply.
    again: bool = False

    @property
    def size(self) -> int:
        """How many jobs take part, besides those that are claimed."""
        return len(self.ends) + len(self.rendered)

    @property
    def only_claims(self) -> bool:
        return bool(self.limit) and not self.size

    def __bool__(self) -> bool:
        return bool(self.ends or self.rendered or self.limit)

    def parts(self) -> list[Turn]:
        """Each thing by itself, so that what the database refuses fails alone."""
        found = [Turn(ends=[end], again=self.again) for end in self.ends]
        found += [Turn(rendered=[attempt]) for attempt in self.rendered]
        return (
            [*found, Turn(limit=self.limit, asked=self.asked, check_scheduled=self.check_scheduled)]
            if self.limit
            else found
        )


def intents_of(attempt: Attempt) -> list[Intent]:
    """The keys of a rendered attempt's files."""
    return [Intent(attempt.claim.company_id, file.provider, file.object_key) for file in attempt.stored]


def end(attempt: Attempt, failure: BaseException | None, *, now: datetime) -> Completion:
    """The end of an attempt: its files; or, after a failure, its job's end or its place in the queue."""
    if failure is None:
        return Completion(attempt.claim, files=attempt.stored)
    outcome = outcomes.decide(
        failure,
        error_message(failure),
        attempt=attempt.claim.attempt,
        max_attempts=attempt.max_attempts,
        interrupted=attempt.interrupted,
        now=now,
    )
    return Completion(attempt.claim, outcome=outcome)


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
        self.link = DedicatedConnection(engine)
        self._worker_id, self._lease, self._clock, self._holds = worker_id, lease, clock, holds
        self._statements = statements_for(engine)
        self._rotation = RoundRobin(engine)
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
        return self._rotation.more_waiting

    def commit(self, turn: Turn) -> Committed:
        """Do what ``turn`` says, as a whole."""
        done = False
        try:
            with self.link.use() as connection:
                events, taken = self._commit(connection, turn)
                done = True
                settled = self._settled(connection, turn, {event.job_id for event in events}) if turn.again else {}
        except BaseException as error:
            # What the database refused, it rolled back: no claim of it can be unknown.
            if turn.limit and (done or not is_refusal(error)):
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
                intents.record_intents(connection, [i for attempt in turn.rendered for i in intents_of(attempt)])
            if turn.limit and unsure:
                events += claims.release(connection, self._unknown(connection), now=now)
            if turn.limit:
                running, taken = self._claim(connection, turn.limit, now, check_scheduled=turn.check_scheduled)
                events += running
        return events, taken

    def _claim_only(self, connection: sa.Connection, turn: Turn) -> tuple[list[EventRow], list[Claim]]:
        """As little as there is to do: no lock for nothing, and no transaction around one statement."""
        now, check_scheduled = self._clock(), turn.check_scheduled
        if self._statements.claim_locks:
            if not self._queued(connection):
                return [], []
        else:
            with autocommitting(connection), connection.begin():
                self._rotation.find_due(connection, now, check_scheduled=check_scheduled)
                check_scheduled = False  # it has just looked
                if not self.waiting:
                    return self._claim(connection, turn.limit, now, check_scheduled=check_scheduled)
        with connection.begin():
            return self._claim(connection, turn.limit, now, check_scheduled=check_scheduled)

    def _claim(
        self, connection: sa.Connection, limit: int, now: datetime, *, check_scheduled: bool
    ) -> tuple[list[EventRow], list[Claim]]:
        """The events of what is claimed, and the claims."""
        pick = partial(self._rotation.claim, check_scheduled=check_scheduled)
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
