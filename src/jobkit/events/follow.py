"""Follow: the events of one company after a place in the log, for whoever shows them: a page, a stream.

It subscribes first, and then reads every committed event, also beyond the safe cursor. Duplicates are dropped by
``seq``; a cursor that was given out never skips an event.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Self

import sqlalchemy as sa

from jobkit.base.ids import CompanyId, require_company_id
from jobkit.base.text import error_message
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow, Start
from jobkit.db.dialects.position import Position
from jobkit.db.failures import may_pass
from jobkit.db.logs import log_of
from jobkit.events import hub
from jobkit.events.hub import Subscriber, Wake
from jobkit.events.log import Ask, LogReader, event_of, in_order, require_whole, safe_cursors
from jobkit.events.relay import feed_of
from jobkit.types import JobEvent

logger = logging.getLogger("jobkit")


class Follower(Subscriber):
    """``subscribe``, then ``take``, and again after each ``wake``; ``close``. For one thread; waits for no event."""

    def __init__(self, engine: sa.Engine, company_id: str, start: Start, *, wake: Wake) -> None:
        super().__init__(engine, wake=wake, company_id=company_id)
        self._reader = CompanyReader(engine, start, company_id)
        self._safe = start.position
        # While the log is read: the position that was safe when its first page was.
        self._horizon: Position | None = None
        self._missed, self._reading = True, False

    @classmethod
    def after(cls, engine: sa.Engine, company_id: CompanyId, cursor: str | None, *, wake: Wake) -> Self:
        """One that begins after ``cursor``, or now. Blocks on the database; ``ValueError``, ``EventsPruned``."""
        owner, statements = require_company_id(company_id), statements_for(engine)
        log_of(engine)
        position = None if cursor is None else Position.parse(cursor)
        with engine.connect() as connection:
            start = statements.start(connection)
            if position is not None:
                start = statements.start_after(require_whole(connection, position))
        return cls(engine, owner, start, wake=wake)

    @property
    def cursor(self) -> str:
        """The position below which every event was taken."""
        return str(self._safe)

    def take(self) -> list[JobEvent]:
        """The next events, each with a cursor after which none is missed; ``wake`` is called when there may be more.
        Empty when there are none, or the database is away.

        Blocks on the database only at first, and when more had come than are kept. ``EventsPruned`` when some may be
        gone with the server that had them: then ``begin_anew``.
        """
        while self._behind():
            try:
                found = self._page()
            except Exception as error:
                if not may_pass(error):
                    raise
                logger.warning("the log could not be read, and will be again: %s", error_message(error))
                self._mark_missed()
                return []
            if found:
                self._wake()
                return found
        with self._lock:
            heard, self._heard = self._heard, []
        return list(self._live(heard))

    def begin_anew(self) -> None:
        """Go on from now, without what came before. Blocks on the database."""
        with self._engine.connect() as connection:
            start = statements_for(connection).start(connection)
        with self._lock:
            self._reader = CompanyReader(self._engine, start, self._company)
            self._safe, self._missed, self._reading = start.position, True, False

    def advance(self) -> bool:
        """Move the cursor past events of others that were delivered meanwhile; whether it moved. Needs no database."""
        feed = feed_of(self.log)
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
                # Events heard from here on are kept, and those committed before are read.
                self._heard.clear()
                self._missed, self._reading = False, True
                self._reader.position.cursor, self._horizon = self._safe, None
            return self._reading

    def _page(self) -> list[JobEvent]:
        position = self._reader.position
        with self._engine.connect() as connection:
            batch = self._reader.read(lambda statement, *arguments: statement(connection, *arguments), hub.PAGE)
            if batch.end.epoch > position.cursor.epoch:  # another server has taken the place of the one before
                require_whole(connection, position.cursor)
        # Events that commit between two pages, below the position of the second, are heard, and given after the pages.
        self._horizon = horizon = self._horizon or batch.end
        due = in_order([*batch.earlier, *batch.fresh])
        position.mark_delivered(due)
        _, *after = safe_cursors(batch.scanned, due, position.cursor)
        events = [event_of(row, max(self._safe, min(horizon, cursor))) for row, cursor in zip(due, after, strict=True)]
        if len(batch.scanned) == hub.PAGE:
            position.cursor = Position(batch.scanned[-1].xid, batch.scanned[-1].id)
        else:
            self._reading = False
        self._safe = max(self._safe, min(horizon, position.cursor) if self._reading else horizon)
        return events

    def _live(self, heard: list[JobEvent]) -> Iterator[JobEvent]:
        position = self._reader.position
        for event in heard:
            row = EventRow(event.id, 0, event.seq, event.company_id, event.type, event.job_id, event.created_at, {})
            if position.is_due(row):
                position.mark_delivered([row])
                self._safe = max(self._safe, Position.parse(event.cursor))
                yield replace(event, cursor=str(self._safe))


class CompanyReader(LogReader):
    """Reads the committed events of one company, also beyond a position that is safe as a cursor."""

    def __init__(self, engine: sa.Engine, start: Start, company_id: str) -> None:
        super().__init__(engine, start)
        self._company_id = company_id

    def scan(self, ask: Ask, limit: int) -> tuple[list[EventRow], Position]:
        """The company's events after the cursor, and the position that is safe now."""
        place = self.position
        return ask(self._statements.of_company, place.cursor, place.start, self._company_id, limit)
