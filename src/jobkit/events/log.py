"""How far a reader of the event log has come: its cursor, what it told beyond that, and what earlier readers told."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow, Position, Start
from jobkit.errors import EventsPruned
from jobkit.tables import content_job_events
from jobkit.types import JobEvent

# Jobs whose last told seq is remembered; of others it is read from the log.
REMEMBERED_JOBS = 10_000
# ``queued`` events, and those told without a feed, that are remembered beyond the feed.
REMEMBERED_EVENTS = 10_000
# Readers that have ended, and of each how many events that it told beyond its cursor.
REMEMBERED_STRETCHES = 20


class DeliveredRange(NamedTuple):
    """A part of the log that was told: beyond ``start`` and up to ``end``, and single events beyond that."""

    start: Start
    end: Position
    ahead: frozenset[int]
    #: Id and job of an event in it, by which it is known that the log still is the same.
    witness: tuple[int, UUID]

    def covers(self, row: EventRow) -> bool:
        """Whether ``row``, as a scan gave it, is in this part."""
        if row.id in self.ahead:
            return True
        position = Position(row.xid, row.id)
        return self.start.position < position <= self.end and not _visible(row.xid, self.start.snapshot)


class DeliveredEvents:
    """Which events this process told, as far as a later reader of the same log could come upon them again.

    Single events are known by job and seq, of any database: event ids begin anew when a database is made anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[UUID, int], None] = OrderedDict()
        self._stretches: dict[str, deque[DeliveredRange]] = defaultdict(lambda: deque(maxlen=REMEMBERED_STRETCHES))

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

    def keep(self, log: str, stretch: DeliveredRange | None) -> None:
        """Remember what an ended reader of ``log`` told."""
        if stretch is not None:
            with self._lock:
                self._stretches[log].append(stretch)

    def told(self, log: str) -> tuple[DeliveredRange, ...]:
        """What ended readers of ``log`` told."""
        with self._lock:
            return tuple(self._stretches.get(log, ()))


class ReadPosition:
    """The place of one reader in the log. For one thread."""

    def __init__(self, start: Start) -> None:
        self.start, self.cursor = start, start.position
        #: Told beyond the cursor, so that a scan skips them.
        self.ahead: set[int] = set()
        #: Id and job of the last event told.
        self.witness: tuple[int, UUID] | None = None
        self._last: OrderedDict[UUID, int] = OrderedDict()

    def is_due(self, row: EventRow) -> bool:
        """Whether an event that may lie beyond the cursor is still to be told."""
        return row.id not in self.ahead and row.seq > self._last.get(row.job_id, 0)

    def gaps(self, rows: Iterable[EventRow]) -> dict[UUID, int]:
        """The jobs of ``rows`` whose event just before is neither among ``rows`` nor known to be told, each with the
        seq after the gap.
        """
        rows = list(rows)
        known = {(row.job_id, row.seq) for row in rows}
        return {
            row.job_id: row.seq
            for row in by_seq(rows)
            if row.seq > 1 and (row.job_id, row.seq - 1) not in known and self._last.get(row.job_id) != row.seq - 1
        }

    def tell(self, rows: Sequence[EventRow]) -> None:
        """These are being told now."""
        for row in rows:
            self.witness = row.id, row.job_id
            self._last[row.job_id] = max(row.seq, self._last.get(row.job_id, 0))
            self._last.move_to_end(row.job_id)
        while len(self._last) > REMEMBERED_JOBS:
            self._last.popitem(last=False)

    def advance(self, scanned: Iterable[EventRow], cursor: Position) -> None:
        """Everything up to ``cursor`` is told; ``scanned`` is what a scan gave on the way there."""
        self.cursor = cursor
        self.ahead.difference_update(row.id for row in scanned)

    def stretch(self) -> DeliveredRange | None:
        """What was told so far; None for nothing."""
        if self.witness is None:
            return None
        return DeliveredRange(self.start, self.cursor, frozenset(sorted(self.ahead)[-REMEMBERED_EVENTS:]), self.witness)


def by_seq(rows: Iterable[EventRow]) -> list[EventRow]:
    return sorted(rows, key=lambda row: row.seq)


def in_order(rows: Sequence[EventRow]) -> list[EventRow]:
    """``rows`` in the order given, except that the events of one job follow their ``seq``."""
    by_job: defaultdict[UUID, deque[EventRow]] = defaultdict(deque)
    for row in by_seq(rows):
        by_job[row.job_id].append(row)
    return [by_job[row.job_id].popleft() for row in rows]


def cursors(
    scanned: Sequence[EventRow], told: Iterable[EventRow], cursor: Position
) -> Iterator[tuple[EventRow, Position]]:
    """Each event of ``told`` with the position up to which everything is told before it.

    ``scanned`` is what a scan from ``cursor`` gave, ``told`` those of it that were not told before, and more.
    """
    told = list(told)
    waiting = {row.id for row in told}
    passed = 0
    for row in told:
        while passed < len(scanned) and scanned[passed].id not in waiting:
            cursor = Position(scanned[passed].xid, scanned[passed].id)
            passed += 1
        yield row, cursor
        waiting.discard(row.id)


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
    """A row of the log as receivers get it. ``cursor`` is the position below which nothing is missing now."""
    return JobEvent(row.id, row.seq, str(cursor), row.company_id, row.type, row.job_id, row.created_at, row.payload)


def known(connection: sa.Connection, witnesses: Sequence[tuple[int, UUID]]) -> set[tuple[int, UUID]]:
    """Those of these events, by id and job, that the log has."""
    c = content_job_events.c
    found = connection.execute(sa.select(c.id, c.job_id).where(c.id.in_([event_id for event_id, _ in witnesses])))
    return {(row.id, row.job_id) for row in found} & set(witnesses)


def may_run(row: EventRow) -> bool:
    """Whether the event puts its job into the queue."""
    return row.type in ("content_job.queued", "content_job.retrying")


def require_whole(engine: sa.Engine, after: Position | None) -> None:
    """``EventsPruned`` unless every event after this position is in the log."""
    if after is None:
        return
    statements = statements_for(engine)
    with engine.connect() as connection:
        begins, ends = statements.log_begins(connection), statements.start(connection).position
    if after < begins:
        raise EventsPruned(str(after), "older ones were removed from the log")
    if after > ends:
        raise EventsPruned(str(after), f"the log ends at {ends}, so the cursor is another log's")
