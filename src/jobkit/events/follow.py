"""Follow: the events of one company from a place in the log on, for whoever shows them: a page, a stream.

Subscribed first, read then, as ``watching`` does. What is read is all that is committed, also beyond the place up to
which a cursor is safe; what is heard besides is known by its ``seq``, and a cursor never says more than was told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import sqlalchemy as sa

from jobkit.base.text import error_message, require_company_id
from jobkit.db.connections import is_outage
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow, Position
from jobkit.events.hub import PAGE, Subscriber
from jobkit.events.log import ReadPosition, event_of, in_order, require_whole
from jobkit.events.relay import running_feed
from jobkit.types import JobEvent

logger = logging.getLogger("jobkit")


class Follower(Subscriber):
    """``locate``, ``subscribe``, then ``take`` whenever ``wake`` was called, until it gives nothing; ``close`` in the
    end. Used by one thread at a time. It never waits for an event.
    """

    def __init__(self, engine: sa.Engine, company_id: object, *, wake: Callable[[], object]) -> None:
        super().__init__(engine, None, wake)
        self._company = require_company_id(company_id)
        self.key = self.log, self._company
        self._place: ReadPosition
        self._safe: Position
        self._horizon: Position | None = None
        self._missed, self._reading = True, False

    @property
    def cursor(self) -> str:
        """The position below which everything was told."""
        return str(self._safe)

    def locate(self, cursor: str | None = None) -> None:
        """Begin at ``cursor``, or now. Blocks on the database; ``ValueError``, ``EventsPruned``."""
        statements = statements_for(self._engine)
        after = None if cursor is None else Position.parse(cursor)
        require_whole(self._engine, after)
        if after is None:
            with self._engine.connect() as connection:
                start = statements.start(connection)
        else:
            start = statements.start_after(after)
        self._place, self._safe = ReadPosition(start), start.position

    def take(self) -> list[JobEvent]:
        """The next events, each with a cursor from which nothing after it is missed; of a great many the first. Empty
        when there are none, or the database is away.

        Blocks on the database only at first, and when more had come than are kept.
        """
        while self._behind():
            try:
                found = self._page()
            except Exception as error:
                if not is_outage(error):
                    raise
                logger.warning("the log could not be read, and will be again: %s", error_message(error))
                self._miss()
                return []
            if found:
                return found
        with self._lock:
            heard, self._heard = self._heard, []
        return list(self._live(heard))

    def advance(self) -> bool:
        """Move the cursor past what was told meanwhile to others; whether it moved. Asks nobody."""
        feed = running_feed(self._engine)
        if feed is None:
            return False
        cursor, before = feed.cursor, self._safe
        with self._lock:
            if not (self._heard or self._missed or self._reading):
                self._safe = max(self._safe, cursor)
        return self._safe != before

    def _behind(self) -> bool:
        with self._lock:
            if self._missed and not self._reading:
                # What is heard from here on is kept, and what was committed before is read.
                self._heard.clear()
                self._missed, self._reading = False, True
                self._place.cursor, self._horizon = self._safe, None
            return self._reading

    def _page(self) -> list[JobEvent]:
        place, statements = self._place, statements_for(self._engine)
        with self._engine.connect() as connection:
            rows, now = statements.of_company(connection, place.cursor, place.start, self._company, PAGE)
            fresh = [row for row in rows if place.is_due(row)]
            known = {(row.job_id, row.seq) for row in fresh}
            gaps = [{"job": job.hex, "seq": seq, "queued": False} for job, seq in place.gaps(fresh).items()]
            earlier = statements.earlier(connection, place.cursor, place.start, gaps) if gaps else []
        # What commits between two pages, before the place of the second, is heard, and told after them.
        self._horizon = horizon = self._horizon or now
        ordered = in_order([*(r for r in earlier if place.is_due(r) and (r.job_id, r.seq) not in known), *fresh])
        place.tell(ordered)
        events = [event_of(row, position) for row, position in self._positions(rows, ordered, horizon)]
        if len(rows) == PAGE:
            place.cursor = Position(rows[-1].xid, rows[-1].id)
        else:
            self._reading = False
        self._safe = max(self._safe, min(horizon, place.cursor) if self._reading else horizon)
        return events

    def _positions(
        self, rows: Sequence[EventRow], told: Sequence[EventRow], horizon: Position
    ) -> Iterator[tuple[EventRow, Position]]:
        """Each event with the position up to which all of ``rows`` are told after it."""
        waiting, passed, position = {row.id for row in told}, 0, self._safe
        for row in told:
            waiting.discard(row.id)
            while passed < len(rows) and rows[passed].id not in waiting:
                position = max(position, min(horizon, Position(rows[passed].xid, rows[passed].id)))
                passed += 1
            yield row, position

    def _live(self, heard: list[JobEvent]) -> Iterator[JobEvent]:
        for event in heard:
            row = EventRow(event.id, 0, event.seq, event.company_id, event.type, event.job_id, event.created_at, {})
            if self._place.is_due(row):
                self._place.tell([row])
                self._safe = max(self._safe, Position.parse(event.cursor))
                yield replace(event, cursor=str(self._safe))
