"""The feed: reads committed events of one database and sends them as signals in this process, one thread per database.

Two ways lead in. The scan follows a cursor that skips nothing, and therefore waits for the oldest open writing
transaction. Events that this process committed itself are published to the feed and do not wait; the scan then skips
them.

Hints tell when to scan: PostgreSQL's notifications, or a number that changes with every commit.
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
from jobkit.base.clock import AdaptivePoll, Backoff
from jobkit.base.text import error_message
from jobkit.base.threads import Periodic
from jobkit.db.connections import DedicatedConnection, abort_overdue
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow
from jobkit.db.dialects.position import EPOCH, Position
from jobkit.db.sqlite import FileWatch
from jobkit.events.hints import Listener
from jobkit.events.log import (
    DeliveredEvents,
    FeedReader,
    History,
    Replay,
    event_of,
    existing,
    in_order,
    may_run,
    safe_cursors,
)
from jobkit.events.own_events import OwnEvents

logger = logging.getLogger("jobkit")
# Seconds between two polls for commits of others: for ``ACTIVE_FOR`` seconds after an event, and else. On PostgreSQL
# notifications come sooner; where none arrive, it is polled more often. A poll of SQLite costs some 150 µs.
ACTIVE_POLL, IDLE_POLL, UNNOTIFIED_POLL = 0.025, 0.5, 0.07
ACTIVE_SQLITE_POLL, IDLE_SQLITE_POLL = 0.006, 0.06
ACTIVE_FOR = 2.0
# Least seconds between two scans that hints ask for.
AFTER_SCAN = 0.01
# After this many seconds without a scan, as in a suspended process, events may have been pruned before their delivery.
STALE = 60.0
# Seconds between two checks for calls that last too long, and for the file of an SQLite database.
LOOK = 0.5
# Seconds that a call to the database may take before its connection is aborted; a runner may ask for less. After twice
# that, another thread takes the place of the blocked one.
DB_TIMEOUT = 30.0
BATCH = 500
# Bound of the own events delivered ahead of a cursor that has to wait; the scan finds the rest.
MOST_AHEAD = 100_000

T = TypeVar("T")


class _Replaced(BaseException):
    """Another thread has taken the place of this one."""


class Feed:
    """Signals of one database in this process. ``start`` and ``close`` once; the rest from any thread."""

    def __init__(self, engine: sa.Engine, delivered: DeliveredEvents, log: str, after: Position | None = None) -> None:
        """Blocks on the database, and raises what it raises. What is committed from now on becomes signals, once the
        feed is started; with ``after``, what follows that position, as soon as there is a receiver. ``log``: the name
        of the log in ``delivered``.
        """
        self._engine = engine
        self._statements = statements_for(engine)
        # AUTOCOMMIT: no snapshot stays open between two polls, which would hold back vacuum and other feeds.
        # Kept also where connections are few: what ``version`` gives counts for one connection only.
        self._link = DedicatedConnection(engine, autocommit=True, keep=True)
        history = History(delivered, log)
        if after is None:
            start = self._ask(self._statements.start)
        else:
            start = self._statements.start_after(after)
            history.recall(self._ask)
        self._reader = FeedReader(engine, start, history)
        # Whether the cursor waits for a receiver, because a replay was asked for.
        self._owed = after is not None
        self._replays: deque[Replay] = deque()
        self._listener: Listener | None = None
        if self._statements.channels and Listener.possible(engine):
            self._listener = Listener(engine, self._statements.channels, self._hint)
        self._db_timeout = DB_TIMEOUT
        self._watchdog = Periodic("jobkit-relay-watch", LOOK, self._check)
        self._file = FileWatch.of(engine)
        self._wake = threading.Condition()
        self._version: int | None = None
        self._own = OwnEvents()
        self._hinted = self._closing = False
        #: How many events have been through their receivers so far.
        self.delivered_count = 0
        self._catching_up = 0
        self._thread: threading.Thread | None = None
        self._next_scan = self._last_scan = 0.0
        # Whether another server may have taken the place of the one that answered before.
        self._strange = False
        polls = (ACTIVE_POLL, IDLE_POLL) if self._statements.channels else (ACTIVE_SQLITE_POLL, IDLE_SQLITE_POLL)
        self._poll = AdaptivePoll(*polls, ACTIVE_FOR)
        self._backoff = Backoff()
        self._job_listeners: dict[object, Callable[[], object]] = {}

    def start(self) -> None:
        """Send signals from now on."""
        self._last_scan = time.monotonic()
        self._poll.found()
        self._spawn()
        self._watchdog.start()
        if self._listener is not None:
            self._listener.start()

    def hurry(self, db_timeout: float) -> None:
        """Wait no longer than this for the database from now on."""
        if db_timeout < self._db_timeout:
            self._db_timeout = db_timeout
            self._watchdog.interval = min(LOOK, db_timeout / 4)

    def close(self, timeout: float) -> None:
        """Deliver what was published, then end; wait at most ``timeout`` seconds for that."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._watchdog.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        if self._listener is not None:
            self._listener.stop()

    def replay(self, after: Position) -> None:
        """Deliver also what lies between ``after`` and the feed's start, unless this process has delivered it."""
        with self._wake:
            self._replays.append(Replay(self._engine, after, self._reader))
            self._owed = True
            self._wake.notify_all()

    def on_jobs(self, wake: Callable[[], object]) -> Callable[[], None]:
        """Call ``wake()``, from some thread, soon after another process or a host's transaction has queued jobs, until
        the function returned is called. Only a hint: it may come late, never, or with nothing to run.
        """
        token = object()
        self._job_listeners[token] = wake
        return lambda: self._job_listeners.pop(token, None) and None

    def publish(self, rows: Sequence[EventRow]) -> bool:
        """Deliver events that this process just committed. False when the feed is closed, and delivers nothing more."""
        with self._wake:
            if self._closing:
                return False
            room = len(self._reader.position.delivered_ahead) <= MOST_AHEAD
            if self._own.add(rows, wanted=signals.any_receivers(), room=room):
                self._wake.notify_all()
        # JobStore notifies of new jobs itself.
        if self._listener is not None and (later := [row for row in rows if row.seq > 1]):
            self._listener.notify(jobs=any(map(may_run, later)))
        return True

    @contextmanager
    def catching_up(self) -> Iterator[None]:
        """Within it, a job's ``queued`` event from before the start is delivered too, right before the one after it."""
        with self._wake:
            self._catching_up += 1
        try:
            yield
        finally:
            with self._wake:
                self._catching_up -= 1

    def flush(self, timeout: float) -> bool:
        """Wait until what was published is delivered; False at the timeout, and at once on the feed's own thread."""
        if threading.current_thread() is self._thread:
            return False
        with self._wake:
            accepted = self._own.accepted
            return self._wake.wait_for(lambda: self._own.are_done(accepted) or not self._alive(), timeout)

    @property
    def log(self) -> str:
        """The identity of the log it reads."""
        return self._reader.history.log

    @property
    def cursor(self) -> Position:
        """The position below which everything was delivered."""
        return self._reader.position.cursor

    # --- the thread

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _spawn(self) -> None:
        self._thread = threading.Thread(target=self._run, args=(self._link,), name="jobkit-relay", daemon=True)
        self._thread.start()

    def _check(self) -> None:
        if (reason := self._file.lost()) is not None and not self._closing:
            logger.error("no more signals are sent: %s", reason)
            with self._wake:
                self._closing = True
                self._wake.notify_all()
        if self._listener is not None:
            abort_overdue(self._listener.link, self._db_timeout)
        if abort_overdue(self._link, self._db_timeout) and not self._closing:
            logger.error("the database does not answer the relay's thread; another takes its place")
            with self._wake:
                self._link = DedicatedConnection(self._engine, autocommit=True, keep=True)
                self._own.put_back()
                self._version = None
            self._spawn()

    def _ask(self, statement: Callable[..., T], *arguments: Any) -> T:
        """The result of ``statement``, unless this thread was replaced meanwhile."""
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
            self._reader.history.add_range(self._reader.position.delivered_range())
        link.close()

    def _work(self) -> None:
        while True:
            own, left, closing = self._wait()
            done = len(own)
            try:
                done = self._deliver_own(own)
                if closing and not left:
                    break
                self._recognise()
                self._replay()
                if left or time.monotonic() >= self._next_scan:
                    complete = self._scan(forced=left > 0)
                    self._backoff.succeeded()
                    if complete and left:
                        with self._wake:
                            self._own.left_to_scan -= left
                        done += left
            except _Replaced:
                done = 0
                raise
            except Exception as error:
                self._trouble(error)
                if closing:
                    break
            finally:
                with self._wake:
                    self._own.mark_done(done)
                    self._wake.notify_all()

    def _wait(self) -> tuple[list[EventRow], int, bool]:
        with self._wake:
            while not (self._own.ready or self._closing):
                if self._hinted and not self._backoff:
                    self._next_scan = min(self._next_scan, self._last_scan + AFTER_SCAN)
                pause = self._next_scan - time.monotonic()
                if pause <= 0 or (self._replays and not self._backoff and signals.any_receivers()):
                    break
                self._wake.wait(pause)
            return self._own.drain(), self._own.left_to_scan, self._closing

    def _hint(self, jobs: bool) -> None:
        """Others have committed. On any thread."""
        if signals.any_receivers():
            with self._wake:
                self._hinted = True
                self._poll.found()
                self._wake.notify_all()
        if jobs:
            self._wake_runners()

    def _wake_runners(self) -> None:
        for wake in list(self._job_listeners.values()):
            try:
                wake()
            except Exception:
                logger.exception("%r failed", wake)

    def _trouble(self, error: Exception) -> None:
        if self._backoff.failed():
            logger.error("the event log could not be read; signals are late: %s", error_message(error))
        self._version, self._strange = None, True
        self._next_scan = time.monotonic() + self._backoff.pause

    def _recognise(self) -> None:
        """After trouble, make the cursor hold on the server that answers now: it may be a copy of the one before, such
        as a standby, that lacks its last events. The last delivered event that it has was before them.
        """
        if not self._strange:
            return
        settled = self._ask(self._statements.note_moves)
        begins, position = self._ask(self._statements.log_begins), self._reader.position
        if begins.epoch > position.cursor.epoch:
            end, there = self._ask(self._statements.start).position, self._ask(existing, list(position.samples))
            base = end.epoch * EPOCH
            known = max((Position(base + xid, sample[0]) for sample, xid in there.items()), default=end)
            here = Position(base + position.cursor.xid % EPOCH, position.cursor.id)
            position.go_on(self._statements.start_after(min(here, known, end)))
            self._replays.clear()
            logger.warning("a copy of the database's server has taken its place, perhaps without its last events")
        self._strange = not settled

    # --- events of this process

    def _deliver_own(self, own: list[EventRow]) -> int:
        """Deliver them, and what is due before them; return how many of them are done with."""
        if not own or not signals.any_receivers():
            return len(own)
        self._poll.found()
        # The scan may have been faster.
        position, delivered = self._reader.position, self._reader.history.events
        fresh = [row for row in own if position.is_due(row) and row not in delivered]
        try:
            self._recognise()
            earlier = self._reader.earlier(self._ask, fresh, queued=self._catching_up > 0)
        except Exception as error:
            self._trouble(error)
            with self._wake:
                if not self._closing:  # else better a gap in order than silence
                    self._own.hold_back()
                    return 0
            earlier = []
        self._deliver(self._reader, [*earlier, *fresh])
        position.delivered_ahead.update(row.id for row in [*earlier, *fresh])
        return len(own)

    # --- events of all processes

    def _scan(self, *, forced: bool = False) -> bool:
        """Poll the log once; False when there is more to read at once."""
        began, self._hinted = time.monotonic(), False
        notified = self._listener is not None and self._listener.listening
        version = None if notified else self._ask(self._statements.version)
        complete = True
        if forced or self._owed or version is None or version != self._version:
            if signals.any_receivers():
                if began > self._last_scan + STALE:
                    self._check_pruned()
                complete = self._deliver_next(self._reader)
                self._owed = bool(self._replays)
            elif not self._owed:
                complete = self._skip()
        self._version = version if complete else None
        self._last_scan = began
        if self._statements.channels:
            self._poll.idle = IDLE_POLL if notified or not signals.any_receivers() else UNNOTIFIED_POLL
        self._next_scan = began + self._poll.interval if complete else began
        return complete

    def _deliver_next(self, reader: FeedReader) -> bool:
        """Deliver the next batch; whether it was the last one for now."""
        batch = reader.read(self._ask, BATCH, queued=self._catching_up > 0)
        if batch.fresh and reader is self._reader:
            self._poll.found()
            if any(map(may_run, batch.fresh)):
                self._wake_runners()
        self._deliver(reader, [*batch.earlier, *batch.fresh], scanned=batch.scanned)
        reader.advance(batch)
        return len(batch.scanned) < BATCH

    def _skip(self) -> bool:
        """Without receivers, move the cursor to the log's end. False, and nothing moves, if one connected meanwhile."""
        end = self._ask(self._statements.start)
        if signals.any_receivers():
            return False
        # Where nothing notifies, the events that were passed may be of new jobs.
        if self._reader.restart(end) and not self._statements.channels:
            self._poll.found()
            self._wake_runners()
        return True

    def _replay(self) -> None:
        if not self._replays or not signals.any_receivers():
            return
        self._reader.history.recall(self._ask)
        if self._deliver_next(self._replays[0]):
            self._replays[0].finish()
            self._version = None
            with self._wake:
                self._replays.popleft()

    def _check_pruned(self) -> None:
        begins = self._ask(self._statements.log_begins)
        if begins > self.cursor:
            logger.error("events were removed from the log before this process delivered them, up to %s", begins)

    def _deliver(self, reader: FeedReader, rows: Sequence[EventRow], scanned: Sequence[EventRow] = ()) -> None:
        """Send signals in the order given, except that the events of one job follow their ``seq``."""
        ordered = in_order(rows)
        reader.position.mark_delivered(ordered)
        reader.history.events.add(row for row in ordered if row.type == "content_job.queued")
        cursors = safe_cursors(scanned, ordered, reader.position.cursor)
        signals.deliver((event_of(*pair) for pair in zip(ordered, cursors, strict=False)), reader.history.log)
        self.delivered_count += len(ordered)
