"""The feed: reads committed events of one database and sends them as signals in this process, one thread per database.

Two ways lead in. The scan follows a cursor that skips nothing, and therefore waits for the oldest open writing
transaction. What this process committed itself is offered directly and does not wait; the scan then skips it.

When to scan is told by hints: PostgreSQL's notifications, or a look at a number that changes with every commit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import sqlalchemy as sa

from jobkit import signals
from jobkit.base.clock import Backoff
from jobkit.base.text import error_message
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection, abort_overdue
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow, Position
from jobkit.events.hints import Listener, WalFile
from jobkit.events.log import (
    REMEMBERED_STRETCHES,
    DeliveredEvents,
    DeliveredRange,
    ReadPosition,
    cursors,
    event_of,
    in_order,
    known,
    may_run,
)

logger = logging.getLogger("jobkit")

# How often others' commits are looked for, in seconds: for a while after an event, and else. The latter is seldom where
# notifications come sooner anyway, and often where there are none; a look at an SQLite file costs next to nothing.
ACTIVE_POLL, IDLE_POLL, UNTOLD_POLL = 0.025, 0.5, 0.07
ACTIVE_LOOK, IDLE_LOOK = 0.006, 0.04
ACTIVE_FOR = 2.0
# The least time between two scans that hints ask for, in seconds.
AFTER_SCAN = 0.01
# After so long without a scan, events may have been removed from the log before they were told.
STALE = 60.0
# How long a call to the database may take, in seconds, before its connection is cut; a runner may ask for less. After
# twice that, another thread takes the place of the one that waits.
DB_TIMEOUT = 30.0
BATCH = 500
# So many events of this process are told while the cursor has to wait. The scan comes upon the others.
MOST_AHEAD = 100_000

T = TypeVar("T")


class _Replaced(BaseException):
    """Another thread has taken the place of this one."""


class Feed:
    """Signals of one database in this process. ``start`` and ``close`` once; the rest from any thread."""

    def __init__(self, engine: sa.Engine, memory: DeliveredEvents, log: str) -> None:
        """``log``: what ``memory`` knows the log of ``engine``'s database by."""
        self._engine, self._memory, self._log = engine, memory, log
        self._statements = statements_for(engine)
        # AUTOCOMMIT: no snapshot stays open between two looks, which would hold back vacuum and other feeds.
        self._link = DedicatedConnection(engine, autocommit=True)
        self._listener: Listener | None = None
        if self._statements.channels and Listener.possible(engine):
            self._listener = Listener(engine, self._statements.channels, self._hint)
        self._db_timeout = DB_TIMEOUT
        self._watch = Periodic("jobkit-relay-watch", 1.0, self._look)
        self._wake = threading.Condition()
        self._place: ReadPosition
        # What this process told before. A feed that begins now cannot come upon it; one that goes back can.
        self._past: tuple[DeliveredRange, ...] | None = None
        # Whether the place is kept until somebody listens, because a replay was asked for.
        self._owed = False
        self._replays: deque[ReadPosition] = deque()
        self._version: int | None = None
        self._glance = WalFile(None)
        self._offers = OwnEvents()
        self._hinted = self._closing = False
        self._told = self._catching_up = 0
        self._thread: threading.Thread | None = None
        self._next_scan = self._last_scan = self._active_until = 0.0
        self._backoff = Backoff()
        self._wanting: dict[object, Callable[[], object]] = {}

    def start(self, after: Position | None = None) -> None:
        """Begin now: what is committed after this returns becomes signals. Raises what the database raises.

        ``after``: begin there instead, once anybody listens.
        """
        if after is None:
            self._place = ReadPosition(self._ask(self._statements.start))
        else:
            self._place, self._owed = ReadPosition(self._statements.start_after(after)), True
            self._recall()
        self._glance = WalFile(self._ask(self._statements.log_file))
        self._last_scan = time.monotonic()
        self._active_until = self._last_scan + ACTIVE_FOR
        self._spawn()
        self._watch.start()
        if self._listener is not None:
            self._listener.start()

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
        if self._listener is not None:
            self._listener.stop()

    def replay(self, after: Position) -> None:
        """Tell also what lies between ``after`` and where this feed began, as far as this process has not told it."""
        with self._wake:
            self._replays.append(ReadPosition(self._statements.start_after(after)))
            self._owed = True
            self._wake.notify_all()

    def on_jobs(self, wanting: Callable[[], object]) -> Callable[[], None]:
        """Call ``wanting()``, from some thread, soon after another process or a host's transaction has queued jobs,
        until the function returned is called. A hint: it may be late, missing or vain.
        """
        token = object()
        self._wanting[token] = wanting
        return lambda: self._wanting.pop(token, None) and None

    def offer(self, rows: Sequence[EventRow]) -> bool:
        """Deliver events that this process just committed. False when the feed was closed, and delivers nothing any
        more.
        """
        with self._wake:
            if self._closing:
                return False
            room = len(self._place.ahead) <= MOST_AHEAD
            if self._offers.add(rows, wanted=signals.any_receivers(), room=room):
                self._wake.notify_all()
        # JobStore notifies of new jobs itself.
        if self._listener is not None and (later := [row for row in rows if row.seq > 1]):
            self._listener.tell(jobs=any(map(may_run, later)))
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
            accepted = self._offers.accepted
            return self._wake.wait_for(lambda: self._offers.delivered(accepted) or not self._alive(), timeout)

    @property
    def told(self) -> int:
        """How many events have been through their receivers so far."""
        return self._told

    @property
    def cursor(self) -> Position:
        """The position below which everything was delivered."""
        return self._place.cursor

    # --- the thread

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _spawn(self) -> None:
        self._thread = threading.Thread(target=self._run, args=(self._link,), name="jobkit-relay", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        if self._listener is not None:
            abort_overdue(self._listener.link, self._db_timeout)
        if abort_overdue(self._link, self._db_timeout) and not self._closing:
            logger.error("the database does not answer the relay's thread; another takes its place")
            with self._wake:
                self._link = DedicatedConnection(self._engine, autocommit=True)
                self._offers.put_back()
                self._version = None
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

    def _run(self, link: DedicatedConnection) -> None:
        with suppress(_Replaced):
            self._work()
            self._memory.keep(self._log, self._place.stretch())
        link.close()

    def _work(self) -> None:
        while True:
            offered, left, closing = self._wait()
            delivered = len(offered)
            try:
                delivered = self._deliver_offered(offered)
                if closing and not left:
                    break
                self._replay()
                if left or time.monotonic() >= self._next_scan:
                    complete = self._scan(forced=left > 0)
                    self._backoff.succeeded()
                    if complete and left:
                        delivered += self._settle(left)
            except _Replaced:
                delivered = 0
                raise
            except Exception as error:
                self._trouble(error)
                if closing:
                    break
            finally:
                with self._wake:
                    self._offers.through(delivered)
                    self._wake.notify_all()

    def _wait(self) -> tuple[list[EventRow], int, bool]:
        with self._wake:
            while not (self._offers.ready or self._closing):
                if self._hinted and not self._backoff:
                    self._next_scan = min(self._next_scan, self._last_scan + AFTER_SCAN)
                pause = self._next_scan - time.monotonic()
                if pause <= 0 or (self._replays and not self._backoff and signals.any_receivers()):
                    break
                self._wake.wait(pause)
            return self._offers.take(), self._offers.left, self._closing

    def _settle(self, left: int) -> int:
        with self._wake:
            return self._offers.settle(left)

    def _hint(self, jobs: bool) -> None:
        """Others have committed. On any thread."""
        if signals.any_receivers():
            with self._wake:
                self._hinted = True
                self._active_until = time.monotonic() + ACTIVE_FOR
                self._wake.notify_all()
        if jobs:
            self._wanted()

    def _wanted(self) -> None:
        for wanting in list(self._wanting.values()):
            try:
                wanting()
            except Exception:
                logger.exception("%r failed", wanting)

    def _trouble(self, error: Exception) -> None:
        if self._backoff.failed():
            logger.error("the event log could not be read; signals are late: %s", error_message(error))
        self._version = None
        self._next_scan = time.monotonic() + self._backoff.pause

    # --- events of this process

    def _deliver_offered(self, offered: list[EventRow]) -> int:
        """Deliver them with what is due before them; how many of them need no more care."""
        if not offered or not signals.any_receivers():
            return len(offered)
        self._active_until = time.monotonic() + ACTIVE_FOR
        # The scan may have been faster.
        fresh = [row for row in offered if self._place.is_due(row) and row not in self._memory]
        try:
            earlier = self._earlier(self._place, fresh)
        except Exception as error:
            self._trouble(error)
            if self._hold_back():
                return 0
            earlier = []
        self._deliver(self._place, [*earlier, *fresh])
        self._place.ahead.update(row.id for row in [*earlier, *fresh])
        return len(offered)

    def _hold_back(self) -> bool:
        """Keep events until the log can be read; False when the feed ends: better a gap in order than silence."""
        with self._wake:
            if not self._closing:
                self._offers.hold_back()
            return not self._closing

    def _earlier(self, place: ReadPosition, rows: Sequence[EventRow]) -> list[EventRow]:
        """The events of the same jobs that come before ``rows`` or between them, and were not delivered yet."""
        gaps = place.gaps(rows)
        if not gaps:
            return []
        known = {(row.job_id, row.seq) for row in rows}
        jobs = [{"job": job.hex, "seq": seq, "queued": self._catching_up > 0} for job, seq in gaps.items()]
        found = self._ask(self._statements.earlier, place.cursor, place.start, jobs)
        return [row for row in found if place.is_due(row) and (row.job_id, row.seq) not in known and self._untold(row)]

    def _untold(self, row: EventRow) -> bool:
        """Whether no reader before this one has told it."""
        return row not in self._memory and not any(stretch.covers(row) for stretch in self._past or ())

    # --- events of all processes

    def _scan(self, *, forced: bool = False) -> bool:
        """One look at the log; False when there is more to read at once."""
        began, self._hinted = time.monotonic(), False
        told = self._listener is not None and self._listener.listening
        version = None if told else self._version_now()
        complete = True
        if forced or self._owed or version is None or version != self._version:
            if signals.any_receivers():
                if began > self._last_scan + STALE:
                    self._look_for_gaps()
                complete = self._read(self._place)
                self._owed = bool(self._replays)
            elif not self._owed:
                complete = self._skip()
        self._version = version if complete else None
        self._last_scan = began
        self._next_scan = began + self._pause(began, told) if complete else began
        return complete

    def _version_now(self) -> int:
        """The log's version: as it was at the last look, unless a glance says that it may be another."""
        changed = self._glance.changed()  # before it is asked for, so that nothing falls between the two
        return self._ask(self._statements.version) if changed or self._version is None else self._version

    def _pause(self, began: float, told: bool) -> float:
        """How long after a look that ``began`` then the next one is due; ``told``: notifications arrive."""
        active = began < self._active_until
        if not self._statements.channels:
            return ACTIVE_LOOK if active else IDLE_LOOK
        if active:
            return ACTIVE_POLL
        return IDLE_POLL if told or not signals.any_receivers() else UNTOLD_POLL

    def _read(self, place: ReadPosition) -> bool:
        """Deliver the next batch; whether it was the last one for now."""
        rows, position = self._ask(self._statements.scan, place.cursor, place.start, BATCH)
        fresh = [row for row in rows if row.id not in place.ahead and self._untold(row)]
        if fresh:
            self._active_until = time.monotonic() + ACTIVE_FOR
            if any(map(may_run, fresh)):
                self._wanted()
            earlier = self._earlier(place, fresh)
            self._deliver(place, [*earlier, *fresh], scanned=rows)
            place.ahead.update(row.id for row in earlier)
        place.advance(rows, position)
        return len(rows) < BATCH

    def _skip(self) -> bool:
        """Nobody listens, so what was committed until now is owed to no one. False, and nothing is skipped, when
        somebody has come meanwhile, to whom the last of it is owed.
        """
        here = ReadPosition(self._ask(self._statements.start))
        if signals.any_receivers():
            return False
        former, self._place = self._place, here
        self._keep(former.stretch())
        if not self._statements.channels and here.cursor != former.cursor:  # where nobody notifies: it may be jobs
            self._active_until = time.monotonic() + ACTIVE_FOR
            self._wanted()
        return True

    def _keep(self, stretch: DeliveredRange | None) -> None:
        self._memory.keep(self._log, stretch)
        if self._past is not None and stretch is not None:
            self._past = (*self._past, stretch)[-2 * REMEMBERED_STRETCHES :]

    def _recall(self) -> None:
        """What this process told of this log. Another one may be at the same place: a database that was made anew."""
        told = self._memory.told(self._log)
        there = self._ask(known, [stretch.witness for stretch in told]) if told else ()
        self._past = tuple(stretch for stretch in told if stretch.witness in there)

    def _replay(self) -> None:
        """Deliver the next batch of a replay, up to where this feed goes on by itself."""
        if not self._replays or not signals.any_receivers():
            return
        if self._past is None:
            self._recall()
        place, live = self._replays[0], self._place
        told = live.stretch()
        rows, position = self._ask(self._statements.scan, place.cursor, place.start, BATCH)
        rows = [row for row in rows if Position(row.xid, row.id) <= live.cursor]

        def untold(row: EventRow) -> bool:
            return not (told and told.covers(row)) and row.id not in live.ahead

        fresh = [row for row in rows if row.id not in place.ahead and untold(row) and self._untold(row)]
        earlier = [row for row in self._earlier(place, fresh) if untold(row)]
        self._deliver(place, [*earlier, *fresh], scanned=rows)
        place.ahead.update(row.id for row in earlier)
        place.advance(rows, min(position, live.cursor))
        if len(rows) < BATCH:
            # From here on the feed leaves out only what it has told.
            self._keep(told)
            self._keep(place.stretch())
            live.ahead |= place.ahead
            live.start = self._statements.start_after(live.cursor)
            self._version = None
            with self._wake:
                self._replays.popleft()

    def _look_for_gaps(self) -> None:
        """Say when events were removed before they were told: the process was suspended, or the database away."""
        begins = self._ask(self._statements.log_begins)
        if begins > self._place.cursor:
            logger.error("events were removed from the log before this process told them, up to %s", begins)

    def _deliver(self, place: ReadPosition, rows: Sequence[EventRow], scanned: Sequence[EventRow] = ()) -> None:
        """Send in the order given, except that the events of one job follow their ``seq``."""
        ordered = in_order(rows)
        place.tell(ordered)
        self._memory.add(row for row in ordered if row.type == "content_job.queued")
        events = (event_of(row, cursor) for row, cursor in cursors(scanned, ordered, place.cursor))
        signals.deliver(events, self._log)
        self._told += len(ordered)


# So many wait for slow receivers. A scan of the log comes upon the others.
MOST = 10_000


class OwnEvents:
    """What a feed was offered. Not safe to share by threads: whoever calls anything here holds the feed's lock."""

    def __init__(self) -> None:
        self._waiting: list[EventRow] = []
        self._in_hand: list[EventRow] = []
        self._held_back = False
        # How many were offered, and how many need no more care.
        self._accepted = self._through = 0
        #: How many of them are left to the scan.
        self.left = 0

    def add(self, rows: Sequence[EventRow], *, wanted: bool, room: bool) -> bool:
        """Take these; whether the feed has something to do now. ``wanted``: whether anybody listens; ``room``: whether
        the feed can tell more ahead of its scan.
        """
        all_through = self._through == self._accepted
        self._accepted += len(rows)
        # While others are on their way these follow them: what is through is only counted.
        if not wanted and all_through:
            self._through += len(rows)
            return False
        if room and len(self._waiting) + len(rows) <= MOST:
            self._waiting += rows
        else:
            self.left += len(rows)
        return True

    @property
    def ready(self) -> bool:
        """Whether there are some to deliver."""
        return bool(self._waiting) and not self._held_back

    def take(self) -> list[EventRow]:
        """All of them, to be delivered now."""
        self._in_hand, self._waiting, self._held_back = self._waiting, [], False
        return self._in_hand

    def hold_back(self) -> None:
        """Keep what was taken until something else happens: it cannot be delivered now."""
        self.put_back()
        self._held_back = True

    def put_back(self) -> None:
        """Keep what was taken for another thread."""
        self._waiting[:0] = self._in_hand
        self._in_hand = []

    def through(self, count: int) -> None:
        """So many need no more care."""
        self._through += count

    def settle(self, count: int) -> int:
        """So many of those that were left to the scan were told; how many."""
        self.left -= count
        return count

    @property
    def accepted(self) -> int:
        """How many were ever offered."""
        return self._accepted

    def delivered(self, upto: int) -> bool:
        """Whether the first ``upto`` of all that were ever offered need no more care."""
        return self._through >= upto
