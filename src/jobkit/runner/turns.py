"""A turn of the pipeline as one transaction: jobs are finished, intents recorded, jobs claimed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit.assets import intents
from jobkit.assets.intents import Intent
from jobkit.base.clock import Backoff, Clock, utcnow
from jobkit.base.text import error_message
from jobkit.db.connections import DedicatedConnection, autocommitting
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow
from jobkit.db.failures import was_rolled_back
from jobkit.jobs import claims, outcomes
from jobkit.jobs.claims import Claim, Completion
from jobkit.jobs.fairness import RoundRobin
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import DescribeError
from jobkit.rendering.failures import fields_of, tell
from jobkit.runner.in_flight import InFlight
from jobkit.tables import content_jobs
from jobkit.types import JobStatus

logger = logging.getLogger("jobkit")


@dataclass(slots=True)
class Turn:
    """What one transaction does."""

    completions: list[Completion] = field(default_factory=list)
    rendered: list[Attempt] = field(default_factory=list)
    #: How many jobs to claim.
    limit: int = 0
    #: The number of the last request for idleness that this turn's claim answers.
    idle_request: int = 0
    #: Look for scheduled jobs now, not just every half second.
    check_scheduled: bool = False
    #: Some of the completions were sent before, without a reply, and may have been committed.
    may_be_committed: bool = False

    @property
    def size(self) -> int:
        """The number of jobs in it, without those to be claimed."""
        return len(self.completions) + len(self.rendered)

    @property
    def only_claims(self) -> bool:
        return bool(self.limit) and not self.size

    @property
    def claim(self) -> Claim:
        """Of a part that is not a claim: the claim of its job."""
        return (self.completions or self.rendered)[0].claim

    def __bool__(self) -> bool:
        return bool(self.completions or self.rendered or self.limit)

    def parts(self) -> list[Turn]:
        """Each thing by itself, so that what the database refuses fails alone."""
        found = [Turn([completion], may_be_committed=self.may_be_committed) for completion in self.completions]
        found += [Turn(rendered=[attempt]) for attempt in self.rendered]
        if self.limit:
            found.append(Turn(limit=self.limit, idle_request=self.idle_request, check_scheduled=self.check_scheduled))
        return found


def completion_of(attempt: Attempt, failure: BaseException | None, *, now: datetime) -> Completion:
    """How an attempt ends: with its files, or with what follows its failure."""
    if failure is None:
        return Completion(attempt.claim, files=attempt.stored)
    outcome = outcomes.decide(
        failure,
        *attempt.tell(failure),
        attempt=attempt.claim.attempt,
        max_attempts=attempt.max_attempts,
        interrupted=attempt.interrupted,
        now=now,
    )
    return Completion(attempt.claim, outcome=outcome)


def instead_of(completion: Completion, error: Exception, describe: DescribeError | None) -> Completion | None:
    """How an attempt ends whose ``completion`` the database refused: with a message that every encoding has, or failed
    for that reason. None when nothing is left to try: its lease runs out.
    """
    outcome = completion.outcome
    plain = replace(outcome, error=_plain(outcome.error), detail=_plain(outcome.detail))
    if plain != outcome:
        return Completion(completion.claim, outcome=plain)
    if outcome.status is JobStatus.DONE or (outcome.status is JobStatus.QUEUED and outcome.error is not None):
        return not_recorded(completion.claim, error, describe)
    return None


def not_recorded(claim: Claim, error: Exception, describe: DescribeError | None) -> Completion:
    """The end of an attempt whose result the database refused."""
    message, detail = tell(getattr(error, "orig", None) or error, claim, describe)
    return claims.failed(claim, f"the result could not be recorded: {message}", detail)


def _plain(text: str | None) -> str | None:
    """``text`` in ASCII."""
    return None if text is None else text.encode("ascii", "backslashreplace").decode()


# The longest pause between two tries of what was postponed, in seconds.
POSTPONED_MOST = 1.0


@dataclass(slots=True)
class _Retry:
    part: Turn
    until: float
    at: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)


class Postponed:
    """Parts of turns that wait for a reason of their own: the database refused them for now, or another transaction has
    locked the job's row. Each is tried again by itself, so that it holds up no other. Used by one thread.
    """

    def __init__(self, lease: float, in_flight: InFlight) -> None:
        self._lease, self._in_flight = lease, in_flight
        self._retries: dict[UUID, _Retry] = {}

    def refused(self, part: Turn, error: Exception) -> bool:
        """Try ``part`` again, for one lease since it was refused first; False when that is over."""
        if part.claim.job_id not in self._retries:
            message, fields = "job %s could not be recorded yet, and is tried again: %s", fields_of(part.claim)
            logger.warning(message, part.claim.job_id, error_message(error), extra=fields)
        return self._add(part).until > time.monotonic()

    def locked(self, part: Turn) -> None:
        """Try ``part`` again for as long as its row is locked: nobody else can take the job."""
        self._add(part).until = time.monotonic() + self._lease

    def settled(self, job_id: UUID) -> None:
        """What was postponed of this job was committed, or given up."""
        self._retries.pop(job_id, None)

    def due(self) -> list[Turn]:
        """The parts to try now. Those whose job is no longer in flight are dropped."""
        for part in [retry.part for retry in self._retries.values() if not self._in_flight.holds(retry.part.claim)]:
            self._drop(part)
        now = time.monotonic()
        due = [retry for retry in self._retries.values() if retry.at <= now]
        for retry in due:
            retry.at = math.inf
        return [retry.part for retry in due]

    def next_in(self) -> float:
        """Seconds until a part is due; infinite without one."""
        return min((retry.at for retry in self._retries.values()), default=math.inf) - time.monotonic()

    def close(self) -> None:
        """Drop everything."""
        for retry in list(self._retries.values()):
            self._drop(retry.part)

    def _add(self, part: Turn) -> _Retry:
        retry = self._retries.setdefault(part.claim.job_id, _Retry(part, time.monotonic() + self._lease))
        retry.part = part
        retry.backoff.failed()
        retry.at = time.monotonic() + min(POSTPONED_MOST, retry.backoff.pause)
        return retry

    def _drop(self, part: Turn) -> None:
        self.settled(part.claim.job_id)
        for attempt in part.rendered:  # they will not be stored
            attempt.discard()


class Committed(NamedTuple):
    """What a turn did: its events, the new claims, the jobs that could not end because their rows are ``locked``, and
    ``settled``: completions sent before without a reply that did commit, with their status, unless the job was claimed
    since.
    """

    events: list[EventRow]
    claimed: list[Claim]
    locked: Set[UUID] = frozenset()
    settled: Mapping[UUID, JobStatus] = MappingProxyType({})


class Committer:
    """Does turns in the name of ``worker_id``. Used by one thread; others may cut ``link``.

    ``commit`` works on a connection of its own, and commits; ``apply`` in the caller's transaction.
    """

    def __init__(self, engine: sa.Engine, *, worker_id: str, lease: float, clock: Clock, in_flight: InFlight) -> None:
        self.link = DedicatedConnection(engine)
        self._worker_id, self._lease, self._clock, self._in_flight = worker_id, lease, clock, in_flight
        self._statements = statements_for(engine)
        self._rotation = RoundRobin(engine, wall_clock=clock is utcnow, patience=lease)
        # A claim whose connection was cut while it waited for a lock may still commit: PostgreSQL notices a lost client
        # only when it replies. Until this time.
        self._unsure_until = -math.inf

    @property
    def unsure(self) -> bool:
        """Whether a claim may have been committed without this runner knowing: its reply was lost within a lease."""
        return time.monotonic() < self._unsure_until

    @property
    def more_waiting(self) -> bool:
        """Whether more jobs wait than the last claim took."""
        return self._rotation.more_waiting

    @property
    def exclusive(self) -> bool:
        """Whether nothing is to be claimed while something is in flight: that runs alone, or what waits has to."""
        isolated = self._rotation.isolated
        return self._rotation.draining or (isolated is not None and self._in_flight.holds(isolated))

    def commit(self, turn: Turn) -> Committed:
        """Do ``turn`` in a transaction; nothing of it, when this raises."""
        done = False
        try:
            with self.link.use() as connection:
                committed = self._commit(connection, turn)
                done = True
                if turn.may_be_committed:
                    ended = {event.job_id for event in committed.events} | committed.locked
                    committed = committed._replace(settled=self._settled(connection, turn, ended))
        except BaseException as error:
            # What the database rolled back it told: no claim of it can be unknown.
            if turn.limit and (done or not was_rolled_back(error)):
                self._unsure_until = time.monotonic() + self._lease
            raise
        return committed

    def apply(self, connection: sa.Connection, turn: Turn, now: datetime) -> Committed:
        """Do ``turn`` in the caller's transaction."""
        events: list[EventRow] = []
        claimed: list[Claim] = []
        locked: Set[UUID] = frozenset()
        if turn.completions:
            events, locked = claims.finish(connection, turn.completions, now=now)
        if turn.rendered:
            files = [(attempt.claim.company_id, file) for attempt in turn.rendered for file in attempt.stored]
            keys = [Intent(company_id, file.provider, file.object_key) for company_id, file in files]
            intents.record_intents(connection, keys)
        if turn.limit and self.unsure:
            events += claims.release(connection, self._unknown(connection), now=now)
        if turn.limit:
            claim = self._claim(connection, turn, now, check_scheduled=turn.check_scheduled)
            events, claimed = events + claim.events, claim.claimed
        return Committed(events, claimed, locked)

    def _commit(self, connection: sa.Connection, turn: Turn) -> Committed:
        if turn.only_claims and not self.unsure:
            return self._claim_only(connection, turn)
        now = self._clock()
        with connection.begin():
            return self.apply(connection, turn, now)

    def _claim_only(self, connection: sa.Connection, turn: Turn) -> Committed:
        """Claim without a write lock when nothing is queued, and without a transaction around one statement."""
        now, check_scheduled = self._clock(), turn.check_scheduled
        if self._statements.claim_locks:
            with connection.begin():
                if not self._statements.has_queued(connection, by=now):
                    return Committed([], [])
        else:
            with autocommitting(connection), connection.begin():
                self._rotation.find_due(connection, now, check_scheduled=check_scheduled)
                check_scheduled = False  # just done
                if not self.more_waiting:
                    return self._claim(connection, turn, now, check_scheduled=check_scheduled)
        with connection.begin():
            return self._claim(connection, turn, now, check_scheduled=check_scheduled)

    def _claim(self, connection: sa.Connection, turn: Turn, now: datetime, *, check_scheduled: bool) -> Committed:
        alone = len(self._in_flight) <= len(turn.completions)
        pick = partial(self._rotation.claim, check_scheduled=check_scheduled, alone=alone)
        claimed, events = claims.claim(
            connection, limit=turn.limit, worker_id=self._worker_id, lease=self._lease, now=now, pick=pick
        )
        return Committed(events, claimed)

    def release(self, held: Sequence[Claim]) -> list[EventRow]:
        """Put the ``held`` claims, and those whose reply was lost, back into the queue; the events."""
        with self.link.use() as connection, connection.begin():
            unknown = self._unknown(connection) if self.unsure else []
            return claims.release(connection, [*held, *unknown], now=self._clock())

    def _settled(self, connection: sa.Connection, turn: Turn, ended: set[UUID]) -> dict[UUID, JobStatus]:
        """Of the completions that ended nothing now, those that had before."""
        c = content_jobs.c
        fences = {job.job_id: job.fence for job in (one.claim for one in turn.completions) if job.job_id not in ended}
        with connection.begin():
            rows = connection.execute(
                sa.select(c.id, c.fence, c.status).where(c.id.in_(list(fences)), c.status != JobStatus.RUNNING.value)
            ).all()
        return {row.id: JobStatus(row.status) for row in rows if row.fence == fences[row.id]}

    def _unknown(self, connection: sa.Connection) -> list[Claim]:
        """Claims of this worker that are not in flight."""
        c = content_jobs.c
        mine = sa.select(c.id, c.company_id, c.fence).where(c.worker_id == self._worker_id, c.status == "running")
        found = [Claim(row.id, row.company_id, "", {}, None, row.fence, 0) for row in connection.execute(mine)]
        return [claim for claim in found if not self._in_flight.holds(claim)]
