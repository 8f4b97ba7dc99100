"""Reads the event log after a position, skipping no event; and remembers which events receivers were given."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow, Start
from jobkit.db.dialects.position import EPOCH, Position
from jobkit.errors import EventsPruned
from jobkit.tables import content_job_events
from jobkit.types import JobEvent

# Jobs whose last delivered seq is kept; that of others is read from the log.
REMEMBERED_JOBS = 10_000
# ``queued`` events, and events delivered without a feed, that are remembered beyond the feed.
REMEMBERED_EVENTS = 10_000
# Delivered events among which a copy of the server is looked through for the last that it has.
REMEMBERED_SAMPLES = 500
# Ranges of ended readers, each with up to ``REMEMBERED_EVENTS`` events delivered beyond its cursor.
REMEMBERED_RANGES = 20

T = TypeVar("T")


class Ask(Protocol):
    """Calls ``statement`` with a connection of the log's database and the arguments."""

    def __call__(self, statement: Callable[..., T], *arguments: Any) -> T: ...


class DeliveredRange(NamedTuple):
    """A range of the log that receivers were given: after ``start``, up to ``end``, and the ids in ``ahead``."""

    start: Start
    end: Position
    ahead: frozenset[int]
    #: Id and job of one event in the range. A log that has it not is another one.
    sample: tuple[int, UUID]

    def covers(self, row: EventRow) -> bool:
        """Whether ``row``, as a scan gave it, is in this range."""
        if row.id in self.ahead:
            return True
        position = Position(row.xid, row.id)
        if not self.start.position < position <= self.end:
            return False
        return not _visible(row.xid - self.start.position.epoch * EPOCH, self.start.snapshot)


class DeliveredEvents:
    """Events this process delivered that a new reader of a log may find again; by (job, seq), because ids restart in a
    recreated database. Safe from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[UUID, int], None] = OrderedDict()
        self._ranges: dict[str, deque[DeliveredRange]] = defaultdict(lambda: deque(maxlen=REMEMBERED_RANGES))

    def __contains__(self, row: EventRow) -> bool:
        return (row.job_id, row.seq) in self._seen

    def add(self, rows: Iterable[EventRow]) -> list[EventRow]:
        """Remember ``rows``; return those that were not remembered yet."""
        with self._lock:
            fresh = [row for row in rows if row not in self]
            self._seen.update(((row.job_id, row.seq), None) for row in fresh)
            while len(self._seen) > REMEMBERED_EVENTS:
                self._seen.popitem(last=False)
        return fresh

    def add_range(self, log: str, delivered: DeliveredRange) -> None:
        """Remember what a reader of ``log`` delivered."""
        with self._lock:
            self._ranges[log].append(delivered)

    def ranges(self, log: str) -> tuple[DeliveredRange, ...]:
        """What earlier readers of ``log`` delivered."""
        with self._lock:
            return tuple(self._ranges.get(log, ()))


class ReadPosition:
    """How far one reader of the log has come. For one thread."""

    def __init__(self, start: Start) -> None:
        self.start, self.cursor = start, start.position
        #: Ids of events delivered beyond the cursor: a scan skips them.
        self.delivered_ahead: set[int] = set()
        #: Id and job of the last events delivered.
        self.samples: deque[tuple[int, UUID]] = deque(maxlen=REMEMBERED_SAMPLES)
        self._last: OrderedDict[UUID, int] = OrderedDict()

    def is_due(self, row: EventRow) -> bool:
        """Whether an event, perhaps from beyond the cursor, is still to be delivered."""
        return row.id not in self.delivered_ahead and row.seq > self._last.get(row.job_id, 0)

    def gaps(self, rows: Iterable[EventRow]) -> dict[UUID, int]:
        """The jobs of ``rows`` whose preceding event is not there nor known as delivered, with the ``seq`` after it."""
        rows = list(rows)
        known = {(row.job_id, row.seq) for row in rows}
        return {
            row.job_id: row.seq
            for row in sorted(rows, key=lambda row: row.seq)
            if row.seq > 1 and (row.job_id, row.seq - 1) not in known and self._last.get(row.job_id) != row.seq - 1
        }

    def mark_delivered(self, rows: Sequence[EventRow]) -> None:
        """``rows`` are being delivered now."""
        for row in rows:
            self.samples.append((row.id, row.job_id))
            self._last[row.job_id] = max(row.seq, self._last.get(row.job_id, 0))
            self._last.move_to_end(row.job_id)
        while len(self._last) > REMEMBERED_JOBS:
            self._last.popitem(last=False)

    def delivered_range(self) -> DeliveredRange | None:
        """What was delivered so far; None for nothing."""
        if not self.samples:
            return None
        ahead = frozenset(sorted(self.delivered_ahead)[-REMEMBERED_EVENTS:])
        return DeliveredRange(self.start, self.cursor, ahead, self.samples[-1])

    def go_on(self, start: Start) -> None:
        """Read on from ``start``, on a copy of the server, where other events may have the ids of delivered ones."""
        self.start, self.cursor = start, start.position
        self.delivered_ahead.clear()


class Batch(NamedTuple):
    """What one read of the log gave."""

    scanned: list[EventRow]
    #: Of ``scanned`` what is to be delivered.
    fresh: list[EventRow]
    #: Events of the same jobs from beyond the scan: to be delivered before ``fresh`` or between them.
    earlier: list[EventRow]
    #: Where the scan ended.
    end: Position


class LogReader:
    """Reads events after a position, on one thread. ``read`` changes nothing; ``advance``, after delivery, moves on."""

    def __init__(self, engine: sa.Engine, start: Start) -> None:
        self._statements, self.position = statements_for(engine), ReadPosition(start)

    def read(self, ask: Ask, limit: int, *, queued: bool = False) -> Batch:
        """The next events: up to ``limit`` of them, and those ``earlier``."""
        scanned, end = self.scan(ask, limit)
        fresh = [row for row in scanned if self.is_fresh(row)]
        return Batch(scanned, fresh, self.earlier(ask, fresh, queued=queued), end)

    def scan(self, ask: Ask, limit: int) -> tuple[list[EventRow], Position]:
        """The log after the cursor, and where this part of it ends."""
        return ask(self._statements.scan, self.position.cursor, self.position.start, limit)

    def is_fresh(self, row: EventRow) -> bool:
        """Whether a scanned event is still to be delivered."""
        return self.position.is_due(row)

    def earlier(self, ask: Ask, rows: Sequence[EventRow], *, queued: bool = False) -> list[EventRow]:
        """The events of the same jobs that come before ``rows`` or between them, and are still to be delivered.

        ``queued``: also the ``queued`` event right before one of them when it is from before the start.
        """
        gaps = self.position.gaps(rows)
        if not gaps:
            return []
        known = {(row.job_id, row.seq) for row in rows}
        jobs = [{"job": job.hex, "seq": seq, "queued": queued} for job, seq in gaps.items()]
        found = ask(self._statements.earlier, self.position.cursor, self.position.start, jobs)
        due = (row for row in found if self.position.is_due(row) and self.is_fresh(row))
        return [row for row in due if (row.job_id, row.seq) not in known]

    def advance(self, batch: Batch) -> None:
        """``batch`` was delivered."""
        self.position.delivered_ahead.update(row.id for row in batch.earlier)
        self.position.delivered_ahead.difference_update(row.id for row in batch.scanned)
        self.position.cursor = batch.end


class FeedReader(LogReader):
    """Leaves out what this process has delivered before."""

    def __init__(self, engine: sa.Engine, start: Start, history: History) -> None:
        super().__init__(engine, start)
        self.history = history

    def is_fresh(self, row: EventRow) -> bool:
        return row.id not in self.position.delivered_ahead and row not in self.history

    def restart(self, start: Start) -> bool:
        """Go on from ``start``: what lies before it is owed to no receiver. Whether the cursor moved."""
        former, self.position = self.position, ReadPosition(start)
        self.history.add_range(former.delivered_range())
        return self.position.cursor != former.cursor


class Replay(FeedReader):
    """Reads up to the cursor of ``live``, a reader of the same log, what ``live`` has not delivered either."""

    def __init__(self, engine: sa.Engine, after: Position, live: FeedReader) -> None:
        super().__init__(engine, statements_for(engine).start_after(after), live.history)
        self._live = live
        self._delivered: DeliveredRange | None = None

    def scan(self, ask: Ask, limit: int) -> tuple[list[EventRow], Position]:
        self._delivered = self._live.position.delivered_range()
        rows, end = super().scan(ask, limit)
        cursor = self._live.position.cursor
        return [row for row in rows if Position(row.xid, row.id) <= cursor], min(end, cursor)

    def is_fresh(self, row: EventRow) -> bool:
        by_live = row.id in self._live.position.delivered_ahead or (self._delivered and self._delivered.covers(row))
        return super().is_fresh(row) and not by_live

    def finish(self) -> None:
        """Let ``live`` stand for both: from now on it leaves out only what was delivered."""
        live = self._live.position
        for position in (live, self.position):
            self.history.add_range(position.delivered_range())
        live.delivered_ahead |= self.position.delivered_ahead
        live.start = self._statements.start_after(live.cursor)


class History:
    """What this process delivered of one log. For one thread."""

    def __init__(self, events: DeliveredEvents, log: str) -> None:
        """``log``: the name under which ``events`` knows the log."""
        self.events, self.log = events, log
        # None until a replay asks: a reader that only goes forward cannot come upon these events again.
        self._ranges: tuple[DeliveredRange, ...] | None = None

    def __contains__(self, row: EventRow) -> bool:
        return row in self.events or any(delivered.covers(row) for delivered in self._ranges or ())

    def recall(self, ask: Ask) -> None:
        """Know the ranges of earlier readers, but for those of another database that was at the same place."""
        if self._ranges is None:
            ranges = self.events.ranges(self.log)
            there = ask(existing, [each.sample for each in ranges]) if ranges else ()
            self._ranges = tuple(each for each in ranges if each.sample in there)

    def add_range(self, delivered: DeliveredRange | None) -> None:
        """Remember what a reader delivered before it ended or moved on."""
        if delivered is not None:
            self.events.add_range(self.log, delivered)
            if self._ranges is not None:
                self._ranges = (*self._ranges, delivered)[-2 * REMEMBERED_RANGES :]


def in_order(rows: Sequence[EventRow]) -> list[EventRow]:
    """``rows`` in the order given, except that the events of one job follow their ``seq``."""
    by_job: defaultdict[UUID, deque[EventRow]] = defaultdict(deque)
    for row in sorted(rows, key=lambda row: row.seq):
        by_job[row.job_id].append(row)
    return [by_job[row.job_id].popleft() for row in rows]


def safe_cursors(scanned: Sequence[EventRow], due: Sequence[EventRow], cursor: Position) -> Iterator[Position]:
    """Positions below which every event is delivered: before the first of ``due``, then after each of them.

    ``scanned``: what a scan from ``cursor`` gave; ``due``: what is delivered now, of it and besides.
    """
    waiting = {row.id for row in due}
    passed = 0
    for row in (None, *due):
        if row is not None:
            waiting.discard(row.id)
        while passed < len(scanned) and scanned[passed].id not in waiting:
            cursor = Position(scanned[passed].xid, scanned[passed].id)
            passed += 1
        yield cursor


def _visible(xid: int, snapshot: str) -> bool:
    """``pg_visible_in_snapshot``."""
    if not snapshot:
        return False
    lowest, highest, running = _parsed(snapshot)
    return xid < lowest or (xid < highest and xid not in running)


@lru_cache(maxsize=32)
def _parsed(snapshot: str) -> tuple[int, int, frozenset[int]]:
    lowest, highest, running = snapshot.split(":")
    return int(lowest), int(highest), frozenset(map(int, running.split(","))) if running else frozenset()


def event_of(row: EventRow, cursor: Position) -> JobEvent:
    """A row of the log as receivers get it. ``cursor``: the position below which every event is delivered."""
    return JobEvent(row.id, row.seq, str(cursor), row.company_id, row.type, row.job_id, row.created_at, row.payload)


def existing(connection: sa.Connection, samples: Sequence[tuple[int, UUID]]) -> dict[tuple[int, UUID], int]:
    """Of these events, by id and job, those that are in the log, with the number in their row's ``xid``."""
    c = content_job_events.c
    ids = [event_id for event_id, _ in samples]
    found = connection.execute(sa.select(c.id, c.job_id, c.xid).where(c.id.in_(ids)))
    wanted = set(samples)
    return {(row.id, row.job_id): row.xid or 0 for row in found if (row.id, row.job_id) in wanted}


def may_run(row: EventRow) -> bool:
    """Whether the event puts its job into the queue."""
    return row.type in ("content_job.queued", "content_job.retrying")


def require_whole(connection: sa.Connection, cursor: Position) -> Position:
    """The position of this cursor; ``EventsPruned`` unless every event after it is in the log."""
    statements = statements_for(connection)
    after = statements.place(cursor)
    begins, ends = statements.log_begins(connection), statements.start(connection).position
    if after < begins:
        raise EventsPruned(str(cursor), "older ones were removed from the log")
    if after > ends:
        raise EventsPruned(str(cursor), f"the log ends at {ends}, so the cursor is another log's")
    return after
