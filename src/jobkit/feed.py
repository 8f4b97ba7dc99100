"""The feed: reads committed events of one database and sends them as signals in this process, one thread per database.

Two ways lead in. The scan follows a cursor that skips nothing, and therefore waits for the oldest open writing
transaction. What this process committed itself is offered directly and does not wait; the scan then skips it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa

from jobkit import signals
from jobkit._dialects import statements_for
from jobkit._dialects.base import EventRow, Position, Start
from jobkit.clock import pause_after
from jobkit.link import Link
from jobkit.outbox import event_of
from jobkit.pools import Periodic
from jobkit.text import describe

logger = logging.getLogger("jobkit")

# How often the log is scanned, in seconds: for a while after an event, and else.
ACTIVE_POLL = 0.025
ACTIVE_FOR = 2.0
IDLE_POLL = 0.5
# How long a call to the database may take, in seconds, before its connection is cut; a runner may ask for less. After
# twice that, another thread takes the place of the one that waits.
DB_TIMEOUT = 30.0
BATCH = 500
# Jobs whose last delivered seq is remembered; of others it is read from the log.
REMEMBERED_JOBS = 10_000
# ``queued`` events, and those delivered without a feed, that are remembered beyond the feed.
REMEMBERED_EVENTS = 10_000


T = TypeVar("T")


class _Replaced(BaseException):
    """Another thread has taken the place of this one."""


class Memory:
    """Which events this process delivered, as far as a later feed of any database could come upon them again.

    By job and seq: event ids begin anew when a database is made anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[UUID, int], None] = OrderedDict()

    def __contains__(self, row: EventRow) -> bool:
        return (row.job_id, row.seq) in self._seen

    def add(self, rows: Iterable[EventRow]) -> list[EventRow]:
        """Remember; return those that were not."""
        with self._lock:
            fresh = [row for row in rows if row not in self]
            self._seen.update(((row.job_id, row.seq), None) for row in fresh)
            while len(self._seen) > REMEMBERED_EVENTS:
                self._seen.popitem(last=False)
        return fresh


class Feed:
    """Signals of one database in this process. ``start`` and ``close`` once; the rest from any thread."""

    def __init__(self, engine: sa.Engine, memory: Memory) -> None:
        self._engine, self._memory = engine, memory
        self._statements = statements_for(engine)
        # AUTOCOMMIT: no snapshot stays open between two looks, which would hold back vacuum and other feeds.
        self._link = Link(engine, autocommit=True)
        self._db_timeout = DB_TIMEOUT
        self._watch = Periodic("jobkit-relay-watch", 1.0, self._look)
        self._started: Start
        self._cursor: Position
        self._wake = threading.Condition()
        self._offered: list[EventRow] = []
        self._in_hand: list[EventRow] = []
        self._held_back = False
        self._catching_up = 0
        self._accepted = self._delivered = 0
        self._closing = False
        self._thread: threading.Thread | None = None
        self._next_scan = self._active_until = 0.0
        self._failures = 0
        # Delivered beyond the cursor, so that the scan skips them; and each job's last delivered seq, as far as
        # remembered.
        self._ahead: set[int] = set()
        self._last: OrderedDict[UUID, int] = OrderedDict()

    def start(self) -> None:
        """Begin now: what is committed after this returns becomes signals. Raises what the database raises."""
        self._begin()
        self._spawn()
        self._watch.start()

    def hurry(self, db_timeout: float) -> None:
        """Wait no longer than this for the database from now on."""
        if db_timeout < self._db_timeout:
            self._db_timeout = db_timeout
            self._watch.interval = min(1.0, db_timeout / 4)

    def close(self, timeout: float) -> None:
        """Deliver what was offered, then end; wait at most ``timeout`` seconds for that."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._watch.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def offer(self, rows: Sequence[EventRow]) -> bool:
        """Deliver events that this process just committed. False when the feed was closed, and delivers nothing any
        more.
        """
        with self._wake:
            if self._closing:
                return False
            self._offered += rows
            self._accepted += len(rows)
            self._wake.notify_all()
            return True

    @contextmanager
    def catching_up(self) -> Iterator[None]:
        """Within it, a job's ``queued`` event from before ``start`` is delivered too, right before the one after it."""
        with self._wake:
            self._catching_up += 1
        try:
            yield
        finally:
            with self._wake:
                self._catching_up -= 1

    def flush(self, timeout: float) -> bool:
        """Wait until everything offered so far was delivered; False at the timeout. Returns at once on the feed's own
        thread.
        """
        if threading.current_thread() is self._thread:
            return False
        with self._wake:
            accepted = self._accepted
            return self._wake.wait_for(lambda: self._delivered >= accepted or not self._alive(), timeout)

    @property
    def accepted(self) -> int:
        """How many events were offered so far."""
        return self._accepted

    @property
    def cursor(self) -> Position:
        """The position below which everything was delivered."""
        return self._cursor

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _spawn(self) -> None:
        self._thread = threading.Thread(target=self._run, args=(self._link,), name="jobkit-relay", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        link = self._link
        if link.waiting > self._db_timeout:
            link.cut()
        if link.waiting > 2 * self._db_timeout and not self._closing:
            logger.error("the database does not answer the relay's thread; another takes its place")
            with self._wake:
                self._link = Link(self._engine, autocommit=True)
                self._offered[:0] = self._in_hand
                self._in_hand = []
            self._spawn()

    def _ask(self, statement: Callable[..., T], *arguments: Any) -> T:
        """What ``statement`` gives, unless this thread has been replaced meanwhile."""
        link = self._link
        try:
            with link.use() as connection:
                return statement(connection, *arguments)
        finally:
            if link is not self._link:
                raise _Replaced

    def _run(self, link: Link) -> None:
        with suppress(_Replaced):
            self._work()
        link.close()

    def _work(self) -> None:
        while True:
            offered, closing = self._wait()
            delivered = len(offered)
            try:
                delivered = self._deliver_offered(offered)
                if closing:
                    break
                if time.monotonic() >= self._next_scan:
                    self._scan()
                    self._failures = 0
            except _Replaced:
                delivered = 0
                raise
            except Exception as error:
                self._trouble(error)
            finally:
                with self._wake:
                    self._delivered += delivered
                    self._wake.notify_all()

    def _wait(self) -> tuple[list[EventRow], bool]:
        with self._wake:
            timeout = max(0.0, self._next_scan - time.monotonic())
            self._wake.wait_for(lambda: (self._offered and not self._held_back) or self._closing, timeout)
            self._in_hand, self._offered = self._offered, []
            return self._in_hand, self._closing

    def _trouble(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            logger.error("the event log could not be read; signals are late: %s", describe(error))
        self._next_scan = time.monotonic() + pause_after(self._failures)

    # --- events of this process

    def _deliver_offered(self, offered: list[EventRow]) -> int:
        """Deliver them with what is due before them; how many of them need no more care."""
        self._held_back = False
        if not offered or not signals.any_receivers():
            return len(offered)
        self._active_until = time.monotonic() + ACTIVE_FOR
        fresh = [row for row in offered if self._is_due(row)]  # the scan may have been faster
        try:
            earlier = self._earlier(fresh)
        except Exception as error:
            self._trouble(error)
            if self._hold_back(offered):
                return 0
            earlier = []
        self._deliver([*earlier, *fresh])
        self._ahead.update(row.id for row in [*earlier, *fresh])
        return len(offered)

    def _hold_back(self, offered: list[EventRow]) -> bool:
        """Keep events until the log can be read; False when the feed ends: better a gap in order than silence."""
        with self._wake:
            if not self._closing:
                self._held_back = True
                self._offered[:0] = offered
            return not self._closing

    def _earlier(self, rows: Sequence[EventRow]) -> list[EventRow]:
        """The events of the same jobs that come before ``rows`` or between them, and were not delivered yet."""
        known = {(row.job_id, row.seq) for row in rows}
        gaps = {
            row.job_id: row.seq
            for row in _by_seq(rows)
            if row.seq > 1 and (row.job_id, row.seq - 1) not in known and self._last.get(row.job_id) != row.seq - 1
        }
        if not gaps:
            return []
        jobs = [{"job": job.hex, "seq": seq, "queued": self._catching_up > 0} for job, seq in gaps.items()]
        found = self._ask(self._statements.earlier, self._cursor, self._started, jobs)
        return [row for row in found if self._is_due(row) and (row.job_id, row.seq) not in known]

    def _is_due(self, row: EventRow) -> bool:
        return row.id not in self._ahead and row not in self._memory and row.seq > self._last.get(row.job_id, 0)

    # --- events of all processes

    def _scan(self) -> None:
        if not signals.any_receivers():
            self._begin()  # nobody listens: what was committed until now is not owed to anyone
        else:
            self._read()
        active = time.monotonic() < self._active_until
        self._next_scan = time.monotonic() + (ACTIVE_POLL if active else IDLE_POLL)

    def _read(self) -> None:
        while not self._closing:
            rows, position = self._ask(self._statements.scan, self._cursor, self._started, BATCH)
            fresh = [row for row in rows if row.id not in self._ahead and row not in self._memory]
            if fresh:
                self._active_until = time.monotonic() + ACTIVE_FOR
                earlier = self._earlier(fresh)
                self._deliver([*earlier, *fresh])
                self._ahead.update(row.id for row in earlier)
            self._cursor = position
            self._ahead.difference_update(row.id for row in rows)
            if len(rows) < BATCH:
                break

    def _begin(self) -> None:
        self._started = self._ask(self._statements.start)
        self._cursor = self._started.position
        self._ahead.clear()
        self._last.clear()

    def _deliver(self, rows: Sequence[EventRow]) -> None:
        """Send in the order given, except that the events of one job follow their ``seq``."""
        by_job: defaultdict[UUID, deque[EventRow]] = defaultdict(deque)
        for row in _by_seq(rows):
            by_job[row.job_id].append(row)
        ordered = [by_job[row.job_id].popleft() for row in rows]
        for row in ordered:
            self._last[row.job_id] = row.seq
            self._last.move_to_end(row.job_id)
        while len(self._last) > REMEMBERED_JOBS:
            self._last.popitem(last=False)
        self._memory.add(row for row in ordered if row.type == "content_job.queued")
        signals.deliver(event_of(row, self._cursor) for row in ordered)


def _by_seq(rows: Iterable[EventRow]) -> list[EventRow]:
    return sorted(rows, key=lambda row: row.seq)
