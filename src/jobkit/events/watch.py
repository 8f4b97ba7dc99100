"""Watch: one job's state, then its events until it ends, for whoever waits for it: a page, a script.

It subscribes first and reads then: an event committed in between is heard, and is dropped by its ``seq`` if the state
had it already. Signals make it quick; the log, where ``seq`` counts a job's events, makes it complete.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from datetime import timedelta
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import seconds
from jobkit.base.ids import ANY_COMPANY, CompanyScope, parse_id
from jobkit.base.logs import job_fields
from jobkit.base.text import error_message
from jobkit.db.dialects import statements_for
from jobkit.db.failures import may_pass
from jobkit.errors import JobNotFound
from jobkit.events import hub
from jobkit.events.hub import TERMINAL, Subscriber, Wake
from jobkit.events.iteration import ThreadWaker, iterate
from jobkit.jobs import outbox
from jobkit.jobs.store import JobStore
from jobkit.tables import content_job_events, content_jobs
from jobkit.types import JobEvent, JobState

logger = logging.getLogger("jobkit")
_e = content_job_events.c


def watch(
    engine: sa.Engine,
    job_id: UUID | str,
    *,
    company_id: CompanyScope = ANY_COMPANY,
    timeout: timedelta | float | None = None,
) -> Generator[JobEvent, None, None]:
    """The job's ``JobState`` as it is now, then each of its events as it comes, in the order of ``seq``, none missing
    and none twice, until one says that the job is done, failed or cancelled.

    Ends early, without an error, ``timeout`` seconds or timedelta after the first item was asked for; ``close()`` on it
    ends it at once. Needs no started runner or relay: while it is iterated, it holds a relay itself. A database that is
    away only delays it.

    ``JobNotFound``, from this call, for an unknown id and for another company's job; while iterating, when the job is
    deleted.
    """
    limit = None if timeout is None else seconds(timeout, "timeout", positive=False)
    waker = ThreadWaker()
    watcher = Watcher(engine, job_id, company_id=company_id, wake=waker.wake)
    watcher.read()
    return iterate(TimedWatch(watcher, limit), waker)


class Watcher(Subscriber):
    """``watch`` for callers with a loop of their own: never waits for an event.

    ``open``, then ``take`` whenever ``wake`` was called, and with ``look=True`` after five seconds without; ``close``
    in the end. Used by one thread at a time. ``wake`` is called on the relay's thread, and must not block.
    """

    def __init__(
        self,
        engine: sa.Engine,
        job_id: UUID | str,
        *,
        company_id: CompanyScope = ANY_COMPANY,
        wake: Wake,
    ) -> None:
        super().__init__(engine, wake=wake, job_id=parse_id(job_id))
        self._requested, self._company_id = job_id, company_id
        #: Whether the job has ended, as far as ``open`` and ``take`` have shown.
        self.over = False
        self._seq, self._cursor = 0, ""

    def read(self) -> JobState:
        """The state now. Blocks on the database; ``JobNotFound``."""
        self.find_log()
        with self._engine.connect() as connection:
            cursor = str(statements_for(connection).start(connection).position)
            job = JobStore(connection).get_by_id(self._requested, company_id=self._company_id)
            if job is None:
                raise JobNotFound(self._requested)
            last = connection.execute(sa.select(_e.id).where(_e.job_id == job.id, _e.seq == job.event_seq))
            event_id = last.scalar_one_or_none() or 0
        kind, payload = outbox.type_of(job), outbox.payload_of(job)
        return JobState(event_id, job.event_seq, cursor, job.company_id, kind, job.id, job.updated_at, payload, job)

    def open(self, after: int | None = None) -> JobState:
        """Hear of the job from now on, and return its state. Blocks on the database; ``JobNotFound``.

        ``after``: ``take`` gives the events after this ``seq``, at most that of the state, instead of those after the
        state.
        """
        state = self.read()
        if state.type not in TERMINAL or after is not None:
            self.subscribe()
            try:
                state = self.read()
            except BaseException:
                self.close()
                raise
        self._seq, self._cursor = state.seq if after is None else after, state.cursor
        self._missed = self._missed or self._seq < state.seq
        self.over = state.type in TERMINAL and not self._seq < state.seq
        if self.over:
            self.close()
        elif self._missed:
            self._wake()
        return state

    def compare(self, last_seq: int | None) -> None:
        if last_seq is None or last_seq > self._seq:
            self._mark_missed()
            self._wake()

    def take(self, *, look: bool = False) -> list[JobEvent]:
        """The events since the last call, in order; of a great many the first. Empty when there are none.

        ``look`` reads the log, whatever was heard. Blocks on the database only then, and when more had come than are
        kept. ``JobNotFound`` when the job turns out to be deleted.
        """
        if self.over:
            return []
        with self._lock:
            heard, self._heard = self._heard, []
            look = look or self._missed
            self._missed = False
        fresh = [event for event in heard if event.seq > self._seq]
        if look or [event.seq for event in fresh] != list(range(self._seq + 1, self._seq + 1 + len(fresh))):
            fresh = self._from_log()
        return self._taken(fresh)

    def _taken(self, fresh: list[JobEvent]) -> list[JobEvent]:
        for number, event in enumerate(fresh, 1):
            self._seq, self._cursor = event.seq, event.cursor
            if event.type in TERMINAL:
                self.over = True
                self.close()
                return fresh[:number]
        return fresh

    def _from_log(self) -> list[JobEvent]:
        cursor, job_id = self._cursor, self.job_id
        assert job_id is not None
        try:
            with self._engine.connect() as connection:
                rows = connection.execute(
                    sa.select(_e.id, _e.seq, _e.company_id, _e.type, _e.created_at, _e.payload)
                    .where(_e.job_id == job_id, _e.seq > self._seq)
                    .order_by(_e.seq)
                    .limit(hub.PAGE)
                ).all()
                known = sa.select(content_jobs.c.id).where(content_jobs.c.id == job_id)
                if not rows and connection.execute(known).one_or_none() is None:
                    raise JobNotFound(job_id)
        except Exception as error:
            if not may_pass(error):
                raise
            message, fields = "the log of job %s could not be read, and will be again: %s", job_fields(job_id)
            logger.warning(message, job_id, error_message(error), extra=fields)
            self._mark_missed()
            return []
        if len(rows) == hub.PAGE:
            self._mark_missed()
            self._wake()
        return [JobEvent(r.id, r.seq, cursor, r.company_id, r.type, job_id, r.created_at, r.payload) for r in rows]


class TimedWatch:
    """A job's state and events, to be iterated for ``limit`` seconds from the first item on; see ``Subscription``."""

    def __init__(self, watcher: Watcher, limit: float | None) -> None:
        self._watcher, self._limit = watcher, limit
        self._deadline = math.inf
        self._expired = False

    @property
    def over(self) -> bool:
        return self._watcher.over or self._expired

    def begin(self) -> list[JobEvent]:
        if self._limit is not None:
            self._deadline = time.monotonic() + self._limit
        return []

    def open(self) -> list[JobEvent]:
        return [self._watcher.open()]

    def take(self, *, woken: bool) -> list[JobEvent]:
        self._expired = time.monotonic() >= self._deadline
        return self._watcher.take(look=self._expired or not woken)

    def pause(self) -> float:
        return max(0.0, min(hub.POLL, self._deadline - time.monotonic()))

    def close(self) -> None:
        self._watcher.close()
