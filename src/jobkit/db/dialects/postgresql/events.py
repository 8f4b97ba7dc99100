"""The event log: appended to and read, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.base import MARK, EventRow, Position, Start
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

START = Sql("SELECT CAST(CAST(pg_snapshot_xmin(s) AS text) AS bigint), CAST(s AS text) FROM pg_current_snapshot() AS s")
# A scan reads the events below this transaction id; while it stays the same, there is nothing new.
_HORIZON = "CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)"
_SINCE_START = "NOT pg_visible_in_snapshot(CAST(CAST(xid AS text) AS xid8), CAST(:snapshot AS pg_snapshot))"

# Ids become visible out of order; below the oldest running transaction no event can appear: (xid, id) skips none.
_NEXT = f"""
SELECT h.horizon, e.* FROM (SELECT {_HORIZON} AS horizon) h LEFT JOIN LATERAL (
    SELECT id, xid, seq, company_id, type, job_id, created_at, CAST(payload AS text) FROM {{s}}content_job_events
    WHERE (xid, id) > (:xid, :id) AND {{which}} AND seq > 0 AND {_SINCE_START}
    ORDER BY xid, id LIMIT :limit
) e ON true
ORDER BY e.xid, e.id
"""
_NEXT_COLUMNS = (sa.column("horizon", sa.BigInteger()), *EVENT)
SCAN = Sql(_NEXT.replace("{which}", "xid < h.horizon"), *_NEXT_COLUMNS)
OF_COMPANY = Sql(_NEXT.replace("{which}", "company_id = :company"), *_NEXT_COLUMNS, company=sa.Text())

# A job's row lock orders its transactions, so all events below a committed one are committed too.
EARLIER = Sql(
    f"""
SELECT e.id, e.xid, e.seq, e.company_id, e.type, e.job_id, e.created_at, CAST(e.payload AS text)
FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, seq int, queued boolean)
JOIN {{s}}content_job_events e ON e.job_id = f.job AND e.seq < f.seq
WHERE (e.xid, e.id) > (:xid, :id) AND {_SINCE_START}
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

    _earlier = EARLIER

    def append_event(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int:
        statement = INSERT_EVENT_NOTIFY if notify else INSERT_EVENT
        return int(connection.execute(statement(connection), values).scalar_one())

    def version(self, connection: sa.Connection) -> int:
        # Past SQLAlchemy, for its cost: a feed without notifications asks a dozen times a second.
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(f"SELECT {_HORIZON}")
            found: Any = cursor.fetchone()
            return int(found[0])

    def start(self, connection: sa.Connection) -> Start:
        xmin, snapshot = connection.execute(START(connection)).one()
        return Start(Position(xmin, 0), snapshot)

    def log_begins(self, connection: sa.Connection) -> Position:
        row = connection.execute(LOG_BEGINS(connection)).one_or_none()
        return Position(0, 0) if row is None else Position(*row)

    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        values = {"xid": after.xid, "id": after.id, "snapshot": start.snapshot, "limit": limit}
        rows = connection.execute(SCAN(connection), values).all()
        events = [EventRow(*row[1:]) for row in rows if row[1] is not None]
        if len(events) == limit:
            return events, Position(events[-1].xid, events[-1].id)
        return events, max(after, Position(rows[0].horizon, 0))

    def of_company(
        self, connection: sa.Connection, after: Position, start: Start, company_id: str, limit: int
    ) -> tuple[list[EventRow], Position]:
        values = {"xid": after.xid, "id": after.id, "snapshot": start.snapshot, "company": company_id, "limit": limit}
        rows = connection.execute(OF_COMPANY(connection), values).all()
        events = [EventRow(*row[1:]) for row in rows if row[1] is not None]
        return events, Position(rows[0].horizon, 0)
