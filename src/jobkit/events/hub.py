"""One receiver behind which all subscribers stand."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit import signals
from jobkit.base.forks import reset_in_children
from jobkit.base.text import error_message
from jobkit.db.connections import is_outage
from jobkit.db.host import log_key
from jobkit.events.relay import Relay
from jobkit.tables import content_jobs
from jobkit.types import JobEvent, JobStatus

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


class Subscriber:
    """Keeps what it hears from ``subscribe`` to ``close``: up to a limit, beyond which it only knows that it missed
    something. ``key``: what it hears of, see ``Hub``. ``wake`` is called on the relay's thread, and must not block.
    """

    def __init__(self, engine: sa.Engine, key: object, wake: Callable[[], object]) -> None:
        self._relay, self._engine, self._wake = Relay(engine), engine, wake
        self.key, self.log = key, log_key(engine)
        #: The job that is watched, if it is one job.
        self.job_id: UUID | None = None
        self._lock = threading.Lock()
        self._heard: list[JobEvent] = []
        self._missed = False

    def subscribe(self) -> None:
        """Hear from now on. Blocks on the database; what it raises leaves nothing open."""
        try:
            self._relay.start()
            subscribers.add(self)
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

    def miss(self, seq: int | None) -> None:
        """Told from outside that the last event of ``job_id`` has this ``seq``, or that there is no such job any more.

        Nothing to those who follow no single job.
        """

    def _miss(self) -> None:
        with self._lock:
            self._missed = True

    def close(self) -> None:
        """Hear nothing more, and let go of the relay; may take a second while a receiver runs. Any number of times."""
        subscribers.remove(self)
        self._relay.stop(ENDING)


class Hub:
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
            for signal in signals.SIGNALS.values():
                signal.connect(self._receive)

    def remove(self, watcher: Subscriber) -> None:
        with self._lock:
            left = tuple(other for other in self._watchers.pop(watcher.key, ()) if other is not watcher)
            if left:
                self._watchers[watcher.key] = left
            if not self._watchers:
                for signal in signals.SIGNALS.values():
                    signal.disconnect(self._receive)

    def _after_fork(self) -> None:
        """Begin anew in a child, where nobody takes what the parent's watchers hear."""
        self._lock, self._looking = threading.RLock(), threading.Lock()
        self._watchers.clear()
        for signal in signals.SIGNALS.values():
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
            watchers = {w: w.job_id for group in groups for w in group if w.job_id is not None and w.log == log}
            ids = sorted(set(watchers.values()))
            last: dict[UUID, int] = {}
            for start in range(0, len(ids), PAGE):
                page = sa.select(content_jobs.c.id, content_jobs.c.event_seq)
                page = page.where(content_jobs.c.id.in_(ids[start : start + PAGE]))
                with engine.connect() as connection:
                    last.update({row.id: row.event_seq for row in connection.execute(page)})
            for watcher, job_id in watchers.items():
                watcher.miss(last.get(job_id))
        except Exception as error:
            if not is_outage(error):
                raise
            logger.warning("jobs that are watched could not be looked at: %s", error_message(error))
        finally:
            self._looking.release()


subscribers = Hub()
reset_in_children(subscribers)
