"""The event log: appended to and read, on PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.base import MARK, Document, EventRow, Start
from jobkit.db.dialects.position import EPOCH, Position
from jobkit.db.dialects.postgresql import moves
from jobkit.db.dialects.postgresql.moves import BASE
from jobkit.db.dialects.sql import EVENT, Sql

# Channels of NOTIFY, without payload: there may be jobs to run; the log has grown.
JOBS, LOG = "jobkit", "jobkit_log"

_INSERT_EVENT = """
WITH told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    VALUES (:company_id, :job_id, :seq, :type, CAST(:payload AS jsonb), :now)
    RETURNING id
)
"""
INSERT_EVENT = Sql(_INSERT_EVENT + "SELECT id FROM told")
# An event of a queued job wakes idle runners; any other only the readers of the log.
INSERT_EVENT_NOTIFY = Sql(
    _INSERT_EVENT
    + f"""SELECT id, pg_notify(CASE :type WHEN 'content_job.queued' THEN '{JOBS}' ELSE '{LOG}' END, '')
FROM told"""
)

START = Sql(
    f"SELECT CAST(CAST(pg_snapshot_xmin(s) AS text) AS bigint) + {BASE}, CAST(s AS text) FROM pg_current_snapshot() s"
)
# A scan reads the events below this transaction id; while it stays the same, there is nothing new.
_HORIZON = "CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)"
_HERE = f"(SELECT {_HORIZON} AS horizon, {BASE} AS base) h"
# Whether an event was not in the snapshot with which the reader began, in the epoch whose numbers begin at ``:began``.
_SINCE_START = """CASE WHEN e.xid + h.base - :began < 3 THEN :snapshot = '1:1:'
    ELSE NOT pg_visible_in_snapshot(
        CAST(CAST(e.xid + h.base - :began AS text) AS xid8), CAST(:snapshot AS pg_snapshot)) END"""
_EVENT = """e.id, e.xid + h.base AS xid, e.seq, e.company_id, e.type, e.job_id, e.created_at,
        CAST(e.payload AS text) AS payload"""

# Ids become visible out of order; below the oldest running transaction no event can appear: (xid, id) skips none.
_NEXT = f"""
SELECT h.horizon + h.base, e.* FROM {_HERE} LEFT JOIN LATERAL (
    SELECT {_EVENT} FROM {{s}}content_job_events e
    WHERE (e.xid, e.id) > (:xid - h.base, :id) AND {{which}} AND e.seq > 0 AND {_SINCE_START}
    ORDER BY e.xid, e.id LIMIT :limit
) e ON true
ORDER BY e.xid, e.id
"""
_NEXT_COLUMNS = (sa.column("horizon", sa.BigInteger()), *EVENT)
SCAN = Sql(_NEXT.replace("{which}", "e.xid < h.horizon"), *_NEXT_COLUMNS)
OF_COMPANY = Sql(_NEXT.replace("{which}", "e.company_id = :company"), *_NEXT_COLUMNS)

# A job's row lock orders its transactions, so all events below a committed one are committed too.
EARLIER = Sql(
    f"""
SELECT {_EVENT}
FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, seq int, queued boolean)
JOIN {{s}}content_job_events e ON e.job_id = f.job AND e.seq < f.seq
CROSS JOIN {_HERE}
WHERE (e.xid, e.id) > (:xid - h.base, :id) AND {_SINCE_START}
    OR f.queued AND e.seq = f.seq - 1 AND e.type = 'content_job.queued'
ORDER BY e.job_id, e.seq
""",
    *EVENT,
)

LOG_BEGINS = Sql(
    f"""
SELECT CAST(payload->>'xid' AS bigint), CAST(payload->>'id' AS bigint) FROM {{s}}content_job_events
WHERE job_id = '{MARK}' AND seq = 0
""",
    sa.column("xid", sa.BigInteger()),
    sa.column("id", sa.BigInteger()),
)


class Events(base.Events):
    """The event log on PostgreSQL."""

    channels = (JOBS, LOG)
    # No transaction has a number below 3.
    nothing_visible = "1:1:"

    def append_event(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int:
        statement = INSERT_EVENT_NOTIFY if notify else INSERT_EVENT
        return int(connection.execute(statement(connection), values).scalar_one())

    def version(self, connection: sa.Connection) -> int:
        # Past SQLAlchemy, for its cost: a feed without notifications asks a dozen times a second.
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(f"SELECT {_HORIZON}")
            found: Any = cursor.fetchone()
            return int(found[0])

    def log_name(self, connection: sa.Connection) -> str | None:
        return moves.log_name(connection)

    def note_moves(self, connection: sa.Connection) -> bool:
        return moves.note(connection)

    def place(self, cursor: Position) -> Position:
        return cursor

    def start(self, connection: sa.Connection) -> Start:
        xmin, snapshot = connection.execute(START(connection)).one()
        return Start(Position(xmin, 0), snapshot)

    def log_begins(self, connection: sa.Connection) -> Position:
        row = connection.execute(LOG_BEGINS(connection)).one_or_none()
        return Position(0, 0) if row is None else Position(*row)

    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        rows = connection.execute(SCAN(connection), {**_place(after, start), "limit": limit}).all()
        events = [EventRow(*row[1:]) for row in rows if row[1] is not None]
        if len(events) == limit:
            return events, Position(events[-1].xid, events[-1].id)
        return events, max(after, Position(rows[0].horizon, 0))

    def of_company(
        self, connection: sa.Connection, after: Position, start: Start, company_id: str, limit: int
    ) -> tuple[list[EventRow], Position]:
        values = {**_place(after, start), "company": company_id, "limit": limit}
        rows = connection.execute(OF_COMPANY(connection), values).all()
        events = [EventRow(*row[1:]) for row in rows if row[1] is not None]
        return events, Position(rows[0].horizon, 0)

    def earlier(self, connection: sa.Connection, after: Position, start: Start, jobs: Document) -> Sequence[EventRow]:
        values = {**_place(after, start), "jobs": json.dumps(jobs)}
        return [EventRow(*row) for row in connection.execute(EARLIER(connection), values)]


def _place(after: Position, start: Start) -> dict[str, Any]:
    """The parameters of a statement that reads on from ``after`` for a reader that began at ``start``."""
    return {**after._asdict(), "snapshot": start.snapshot, "began": start.position.epoch * EPOCH}
