"""One receiver behind which all subscribers stand."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from uuid import UUID

import sqlalchemy as sa

from jobkit import signals
from jobkit.base.forks import reset_in_children
from jobkit.base.logs import job_fields
from jobkit.base.text import error_message
from jobkit.db.failures import may_pass
from jobkit.db.logs import log_of
from jobkit.events.relay import Relay
from jobkit.tables import content_jobs
from jobkit.types import JobEvent, JobStatus

logger = logging.getLogger("jobkit")
# Seconds without a signal after which the log itself is polled: a transaction that somebody left open, a slow receiver
# or a lost connection may hold signals up.
POLL = 5.0
# Bound of the events that wait for a slow subscriber; the rest is read from the log.
MOST_WAITING = 1_000
# Events read from the log at once.
PAGE = 500
# Seconds that the end of a subscription waits for its relay.
ENDING = 1.0
TERMINAL = {f"content_job.{status.value}" for status in JobStatus if status.terminal}

Wake = Callable[[], object]


class Subscriber:
    """Keeps the events heard from ``subscribe`` to ``close``: up to a limit, beyond which it only knows that it missed
    some. ``wake`` is called on the relay's thread, and must not block.
    """

    def __init__(self, engine: sa.Engine, *, wake: Wake, job_id: UUID | None = None, company_id: str = "") -> None:
        """Hears of one job, or of one company."""
        self._relay, self._engine, self._wake = Relay(engine), engine, wake
        self.job_id, self._company = job_id, company_id
        #: The identity of the log, once the database was asked.
        self.log = ""
        self._lock = threading.Lock()
        self._heard: list[JobEvent] = []
        self._missed = False

    @property
    def key(self) -> object:
        """The events it hears of; see ``Hub``."""
        return self.job_id or (self.log, self._company)

    def find_log(self) -> None:
        """Ask which log this is, before its positions mean anything. Blocks on the database, the first time."""
        self.log = self.log or log_of(self._engine)

    def subscribe(self) -> None:
        """Hear from now on. Blocks on the database; what it raises leaves nothing open."""
        try:
            self._relay.start()
            self.find_log()
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

    def compare(self, last_seq: int | None) -> None:
        """Find out whether an event was missed: the job's last one has this ``seq``, None when the job is gone."""

    def _mark_missed(self) -> None:
        with self._lock:
            self._missed = True

    def close(self) -> None:
        """Hear nothing more, and let go of the relay; may take a second while a receiver runs. Any number of times."""
        subscribers.remove(self)
        self._relay.stop(ENDING)


class Hub:
    """Every subscriber of this process behind one receiver: by its job's id, or by ``(log, company_id)``."""

    def __init__(self) -> None:
        # An RLock: an abandoned subscriber may be collected, and thereby closed, in the middle of any of these.
        self._lock = threading.RLock()
        self._subscribers: dict[object, tuple[Subscriber, ...]] = {}
        self._polling = threading.Lock()
        self._polled: dict[str, float] = {}

    def add(self, subscriber: Subscriber) -> None:
        with self._lock:
            self._subscribers[subscriber.key] = (*self._subscribers.get(subscriber.key, ()), subscriber)
            for signal in signals.SIGNALS.values():
                signal.connect(self._receive)

    def remove(self, subscriber: Subscriber) -> None:
        with self._lock:
            left = tuple(other for other in self._subscribers.pop(subscriber.key, ()) if other is not subscriber)
            if left:
                self._subscribers[subscriber.key] = left
            if not self._subscribers:
                for signal in signals.SIGNALS.values():
                    signal.disconnect(self._receive)

    def _after_fork(self) -> None:
        """Be empty in a forked child, where nobody takes what the parent's subscribers hear."""
        self._lock, self._polling = threading.RLock(), threading.Lock()
        self._subscribers.clear()
        for signal in signals.SIGNALS.values():
            signal.disconnect(self._receive)

    def _receive(self, _company_id: str, *, event: JobEvent) -> None:
        for key in (event.job_id, (signals.origin(), event.company_id)):
            for subscriber in self._subscribers.get(key, ()):
                try:
                    subscriber.hear(event)
                except Exception:  # what its wake raises, such as that of a closed loop, is not the others' trouble
                    fields = job_fields(event.job_id, event.company_id)
                    logger.exception("a watcher of job %s could not be woken", event.job_id, extra=fields)

    def poll(self, engine: sa.Engine, log: str) -> None:
        """Wake whoever missed an event of a job watched in ``log``; once in ``POLL`` s. Blocks on the database."""
        now = time.monotonic()
        if now < self._polled.get(log, 0.0) + POLL or not self._polling.acquire(blocking=False):
            return
        try:
            self._polled[log] = now
            with self._lock:
                groups = list(self._subscribers.values())
            job_ids = {s: s.job_id for group in groups for s in group if s.job_id is not None and s.log == log}
            ids = sorted(set(job_ids.values()))
            last: dict[UUID, int] = {}
            for start in range(0, len(ids), PAGE):
                page = sa.select(content_jobs.c.id, content_jobs.c.event_seq)
                page = page.where(content_jobs.c.id.in_(ids[start : start + PAGE]))
                with engine.connect() as connection:
                    last.update({row.id: row.event_seq for row in connection.execute(page)})
            for subscriber, job_id in job_ids.items():
                subscriber.compare(last.get(job_id))
        except Exception as error:
            if not may_pass(error):
                raise
            logger.warning("watched jobs could not be polled: %s", error_message(error))
        finally:
            self._polling.release()


subscribers = Hub()
reset_in_children(subscribers)
