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
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit import outbox, signals
from jobkit._dialects import statements_for
from jobkit.clock import seconds
from jobkit.errors import JobNotFound
from jobkit.forks import forget_in_children
from jobkit.jobs import JobStore
from jobkit.relay import Relay, log_key
from jobkit.tables import content_job_events, content_jobs
from jobkit.text import describe
from jobkit.turns import is_outage
from jobkit.types import JobEvent, JobState, JobStatus

logger = logging.getLogger("jobkit")

# How long signals may be silent before the log itself is asked, in seconds: they may be held up by a transaction that
# somebody left open, a slow receiver, or a lost connection.
LOOK = 5.0
# How many events wait for a slow watcher; more are left in the log and read from there.
MOST_WAITING = 1_000
# How many are read from there at once.
PAGE = 500
# How long the end of a watch waits for its relay, in seconds.
ENDING = 1.0
TERMINAL = {f"content_job.{status.value}" for status in JobStatus if status.terminal}
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
            remaining = LOOK if deadline is None else deadline - time.monotonic()
            came = woken.wait(max(0.0, min(LOOK, remaining)))
            woken.clear()
            late = deadline is not None and time.monotonic() >= deadline
            yield from watcher.take(look=late or not came)
            if late:
                break


class Subscriber:
    """Keeps what it hears from ``subscribe`` to ``close``: up to a limit, beyond which it only knows that it missed
    something. ``key``: what it hears of, see ``Hub``. ``wake`` is called on the relay's thread, and must not block.
    """

    def __init__(self, engine: sa.Engine, key: object, wake: Callable[[], object]) -> None:
        self._relay, self._engine, self._wake = Relay(engine), engine, wake
        self.key, self.log = key, log_key(engine)
        self._lock = threading.Lock()
        self._heard: list[JobEvent] = []
        self._missed = False

    def subscribe(self) -> None:
        """Hear from now on. Blocks on the database; what it raises leaves nothing open."""
        try:
            self._relay.start()
            _hub.add(self)
        except BaseException:
            self.close()
            raise

    def hear(self, event: JobEvent) -> None:
        """Keep an event for ``take``. From any thread."""
        with self._lock:
            if len(self._heard) >= MOST_WAITING:
                self._heard.clear()
                self._missed = True
            if not self._missed:
                self._heard.append(event)
        self._wake()

    def _miss(self) -> None:
        with self._lock:
            self._missed = True

    def close(self) -> None:
        """Hear nothing more, and let go of the relay; may take a second while a receiver runs. Any number of times."""
        _hub.remove(self)
        self._relay.stop(ENDING)


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
        self.job_id: UUID
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
            outbox._payload(job),
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
        try:
            with self._engine.connect() as connection:
                rows = connection.execute(
                    sa.select(_e.id, _e.seq, _e.company_id, _e.type, _e.created_at, _e.payload)
                    .where(_e.job_id == self.job_id, _e.seq > self._seq)
                    .order_by(_e.seq)
                    .limit(PAGE)
                ).all()
                known = sa.select(content_jobs.c.id).where(content_jobs.c.id == self.job_id)
                if not rows and connection.execute(known).one_or_none() is None:
                    raise JobNotFound(self.job_id)
        except Exception as error:
            if not is_outage(error):
                raise
            logger.warning("the log of job %s could not be read, and will be again: %s", self.job_id, describe(error))
            self._miss()
            return []
        if len(rows) == PAGE:
            self._miss()
            self._wake()
        return [
            JobEvent(r.id, r.seq, self._cursor, r.company_id, r.type, self.job_id, r.created_at, r.payload)
            for r in rows
        ]


class _Hub:
    """Every watcher of this process by its job, and whoever follows a company by ``(signals.origin(), company_id)``,
    behind one receiver however many they are.
    """

    def __init__(self) -> None:
        # An RLock: an abandoned watch may be collected, and thereby closed, in the middle of any of these.
        self._lock = threading.RLock()
        self._watchers: dict[Any, tuple[Subscriber, ...]] = {}
        self._looking = threading.Lock()
        self._looked: dict[str, float] = {}

    def add(self, watcher: Subscriber) -> None:
        with self._lock:
            self._watchers[watcher.key] = (*self._watchers.get(watcher.key, ()), watcher)
            for signal in signals._SIGNALS.values():
                signal.connect(self._receive)

    def remove(self, watcher: Subscriber) -> None:
        with self._lock:
            left = tuple(other for other in self._watchers.pop(watcher.key, ()) if other is not watcher)
            if left:
                self._watchers[watcher.key] = left
            if not self._watchers:
                for signal in signals._SIGNALS.values():
                    signal.disconnect(self._receive)

    def _after_fork(self) -> None:
        """Begin anew in a child, where nobody takes what the parent's watchers hear."""
        self._lock, self._looking = threading.RLock(), threading.Lock()
        self._watchers.clear()
        for signal in signals._SIGNALS.values():
            signal.disconnect(self._receive)

    def _receive(self, _company_id: str, *, event: JobEvent) -> None:
        for key in (event.job_id, (signals.origin(), event.company_id)):
            for watcher in self._watchers.get(key, ()):
                try:
                    watcher.hear(event)
                except Exception:  # what its wake raises, such as that of a closed loop, is not the others' trouble
                    logger.exception("a watcher of job %s could not be woken", event.job_id)

    def look(self, engine: sa.Engine, log: str) -> None:
        """One look for all watchers of a log, by ``engine``, unless there was one ``LOOK`` seconds ago: whoever missed
        something is woken. Blocks on the database.
        """
        now = time.monotonic()
        if now < self._looked.get(log, 0.0) + LOOK or not self._looking.acquire(blocking=False):
            return
        try:
            self._looked[log] = now
            with self._lock:
                groups = list(self._watchers.values())
            watchers = [w for group in groups for w in group if isinstance(w, Watcher) and w.log == log]
            ids = sorted({watcher.job_id for watcher in watchers})
            last: dict[UUID, int] = {}
            for start in range(0, len(ids), PAGE):
                page = sa.select(content_jobs.c.id, content_jobs.c.event_seq)
                page = page.where(content_jobs.c.id.in_(ids[start : start + PAGE]))
                with engine.connect() as connection:
                    last.update({row.id: row.event_seq for row in connection.execute(page)})
            for watcher in watchers:
                watcher.miss(last.get(watcher.job_id))
        except Exception as error:
            if not is_outage(error):
                raise
            logger.warning("jobs that are watched could not be looked at: %s", describe(error))
        finally:
            self._looking.release()


_hub = _Hub()
forget_in_children(_hub)
