"""Watch: one job's state, then its events until it ends, for whoever waits for it: a page, a script.

Subscribed first, read then: what is committed in between is heard, and known by its ``seq`` if the state had it
already. Signals make it quick; the log itself, where ``seq`` counts a job's events, makes it complete.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from datetime import timedelta
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import seconds
from jobkit.base.text import error_message
from jobkit.db.connections import is_outage
from jobkit.db.dialects import statements_for
from jobkit.errors import JobNotFound
from jobkit.events import hub
from jobkit.events.hub import TERMINAL, Subscriber
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
    company_id: object = None,
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
    woken = threading.Event()
    watcher = Watcher(engine, job_id, company_id=company_id, wake=woken.set)
    watcher.read()
    return _items(watcher, woken, limit)


def _items(watcher: Watcher, woken: threading.Event, limit: float | None) -> Generator[JobEvent, None, None]:
    deadline = None if limit is None else time.monotonic() + limit
    with closing(watcher):
        yield watcher.open()
        while not watcher.over:
            remaining = hub.LOOK if deadline is None else deadline - time.monotonic()
            came = woken.wait(max(0.0, min(hub.LOOK, remaining)))
            woken.clear()
            late = deadline is not None and time.monotonic() >= deadline
            yield from watcher.take(look=late or not came)
            if late:
                break


class Watcher(Subscriber):
    """What ``watch`` is made of, for callers with a loop of their own: never waits for an event.

    ``open``, then ``take`` whenever ``wake`` was called and, with ``look=True``, after ``LOOK`` seconds without;
    ``close`` in the end. Used by one thread at a time. ``wake`` is called on the relay's thread, and must not block.
    """

    def __init__(
        self, engine: sa.Engine, job_id: UUID | str, *, company_id: object = None, wake: Callable[[], object]
    ) -> None:
        super().__init__(engine, None, wake)
        self._asked, self._company_id = job_id, company_id
        #: Whether the job has ended, as far as ``open`` and ``take`` have told.
        self.over = False
        self._seq, self._cursor = 0, ""

    def read(self) -> JobState:
        """The state now. Blocks on the database; ``JobNotFound``."""
        with self._engine.connect() as connection:
            cursor = str(statements_for(connection).start(connection).position)
            job = JobStore(connection).get_by_id(self._asked, company_id=self._company_id)
            if job is None:
                raise JobNotFound(self._asked)
            last = connection.execute(sa.select(_e.id).where(_e.job_id == job.id, _e.seq == job.event_seq))
            event_id = last.scalar_one_or_none() or 0
        self.job_id = self.key = job.id
        return JobState(
            event_id,
            job.event_seq,
            cursor,
            job.company_id,
            f"content_job.{job.status.value}",
            job.id,
            job.updated_at,
            outbox.payload_of(job),
            job,
        )

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
        return state

    def miss(self, seq: int | None) -> None:
        """Told from outside that the job's last event has this ``seq``, or that there is no such job any more."""
        if seq is None or seq > self._seq:
            self._miss()
            self._wake()

    def take(self, *, look: bool = False) -> list[JobEvent]:
        """The events since the last call, in order; of a great many the first. Empty when there are none.

        Blocks on the database only with ``look``, or when more had come than are kept. ``JobNotFound`` when it finds
        the job deleted.
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
        return self._told(fresh)

    def _told(self, fresh: list[JobEvent]) -> list[JobEvent]:
        for number, event in enumerate(fresh, 1):
            self._seq, self._cursor = event.seq, event.cursor
            if event.type in TERMINAL:
                self.over = True
                self.close()
                return fresh[:number]
        return fresh

    def _from_log(self) -> list[JobEvent]:
        assert self.job_id is not None
        try:
            with self._engine.connect() as connection:
                rows = connection.execute(
                    sa.select(_e.id, _e.seq, _e.company_id, _e.type, _e.created_at, _e.payload)
                    .where(_e.job_id == self.job_id, _e.seq > self._seq)
                    .order_by(_e.seq)
                    .limit(hub.PAGE)
                ).all()
                known = sa.select(content_jobs.c.id).where(content_jobs.c.id == self.job_id)
                if not rows and connection.execute(known).one_or_none() is None:
                    raise JobNotFound(self.job_id)
        except Exception as error:
            if not is_outage(error):
                raise
            logger.warning(
                "the log of job %s could not be read, and will be again: %s", self.job_id, error_message(error)
            )
            self._miss()
            return []
        if len(rows) == hub.PAGE:
            self._miss()
            self._wake()
        return [
            JobEvent(r.id, r.seq, self._cursor, r.company_id, r.type, self.job_id, r.created_at, r.payload)
            for r in rows
        ]
