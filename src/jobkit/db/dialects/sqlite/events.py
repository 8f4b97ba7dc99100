"""The event log: appended to and read, on SQLite."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.base import MARK, AppendedEvent, Document, EventRow, Start
from jobkit.db.dialects.position import Position
from jobkit.db.dialects.sql import APPENDED, EVENT, Sql

INSERT_EVENT = Sql(
    """
INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
VALUES (:company_id, :job_id, :seq, :type, :payload, :now)
RETURNING id
"""
)

INSERT_EVENTS = Sql(
    """
INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
SELECT json_extract(value, '$.company'), json_extract(value, '$.job'), json_extract(value, '$.seq'),
    json_extract(value, '$.type'), json_extract(value, '$.payload'), :now
FROM json_each(:events) WHERE true
RETURNING job_id, id, seq
""",
    *APPENDED,
)

START = Sql("SELECT COALESCE((SELECT seq FROM {s}sqlite_sequence WHERE name = 'content_job_events'), 0)")
# An id alone orders events, as one transaction writes at a time.
XID = 1
_COLUMNS = f"id, {XID} AS xid, seq, company_id, type, job_id, created_at, payload"

SCAN = Sql(
    f"SELECT {_COLUMNS} FROM {{s}}content_job_events WHERE id > :id AND seq > 0 ORDER BY id LIMIT :limit", *EVENT
)

OF_COMPANY = Sql(
    f"""
SELECT {_COLUMNS} FROM {{s}}content_job_events
WHERE id > :id AND company_id = :company AND xid IS NULL AND seq > 0 ORDER BY id LIMIT :limit
""",
    *EVENT,
)

EARLIER = Sql(
    f"""
SELECT e.id, {XID} AS xid, e.seq, e.company_id, e.type, e.job_id, e.created_at, e.payload
FROM json_each(:jobs) AS f
JOIN {{s}}content_job_events e ON e.job_id = json_extract(f.value, '$.job') AND e.seq < json_extract(f.value, '$.seq')
WHERE e.id > :id
    OR json_extract(f.value, '$.queued') AND e.type = 'content_job.queued'
        AND e.seq = json_extract(f.value, '$.seq') - 1
ORDER BY e.job_id, e.seq
""",
    *EVENT,
)

LOG_BEGINS = Sql(
    f"""
SELECT json_extract(payload, '$.id') AS id FROM {{s}}content_job_events
WHERE job_id = '{MARK.hex}' AND seq = 0
""",
    sa.column("id", sa.BigInteger()),
)


class Events(base.Events):
    """The event log on SQLite."""

    def append_event(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int:
        return insert_event(connection, values)

    def version(self, connection: sa.Connection) -> int:
        # Past SQLAlchemy, for its cost: a feed asks a hundred times a second.
        driver: Any = connection.connection.driver_connection
        return int(driver.execute("PRAGMA data_version").fetchone()[0])

    def log_name(self, connection: sa.Connection) -> str | None:
        # The file as SQLite opened it, whatever the URL and the working directory are now.
        schema = (connection.get_execution_options().get("schema_translate_map") or {}).get(None) or "main"
        driver: Any = connection.connection.driver_connection
        file = {name: file for _, name, file in driver.execute("PRAGMA database_list")}.get(schema)
        if not file:
            return None
        try:
            found = os.stat(file)
        except OSError:  # a virtual file system of the host's keeps it elsewhere
            return f"sqlite:{file}"
        return f"sqlite:{found.st_dev}:{found.st_ino}"

    def note_moves(self, connection: sa.Connection) -> bool:
        return True  # a file's positions are its ids, wherever it is

    def place(self, cursor: Position) -> Position:
        return Position(XID, cursor.id)

    def start(self, connection: sa.Connection) -> Start:
        return Start(Position(XID, connection.execute(START(connection)).scalar_one()), self.nothing_visible)

    def log_begins(self, connection: sa.Connection) -> Position:
        row = connection.execute(LOG_BEGINS(connection)).one_or_none()
        return Position(0, 0) if row is None else Position(XID, row.id)

    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        events = [EventRow(*row) for row in connection.execute(SCAN(connection), {"id": after.id, "limit": limit})]
        return events, Position(XID, events[-1].id) if events else after

    def of_company(
        self, connection: sa.Connection, after: Position, start: Start, company_id: str, limit: int
    ) -> tuple[list[EventRow], Position]:
        values = {"id": after.id, "company": company_id, "limit": limit}
        horizon = self.start(connection).position
        return [EventRow(*row) for row in connection.execute(OF_COMPANY(connection), values)], horizon

    def earlier(self, connection: sa.Connection, after: Position, start: Start, jobs: Document) -> Sequence[EventRow]:
        values = {"id": after.id, "jobs": json.dumps(jobs)}
        return [EventRow(*row) for row in connection.execute(EARLIER(connection), values)]


def insert_event(connection: sa.Connection, values: Mapping[str, Any]) -> int:
    """Append one event; its id."""
    return int(connection.execute(INSERT_EVENT(connection), values).scalar_one())


def insert_events(connection: sa.Connection, events: Document, now: datetime) -> list[AppendedEvent]:
    """Append each ``{company, job, seq, type, payload}``."""
    rows = connection.execute(INSERT_EVENTS(connection), {"events": json.dumps(events), "now": now})
    return [AppendedEvent(*row) for row in rows]
