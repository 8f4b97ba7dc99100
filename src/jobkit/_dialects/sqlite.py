"""SQLite 3.35 and newer: one writer at a time, so a step is a few statements under ``BEGIN IMMEDIATE``, the first of
them a write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit._dialects.base import (
    CLAIMED,
    DUE,
    EVENT,
    JOB_PARAMETERS,
    MANY_PARAMETERS,
    TOLD,
    Claimed,
    Document,
    Due,
    EventRow,
    Position,
    Sql,
    Start,
    Told,
)
from jobkit.columns import SQLITE_TIME, UtcDateTime

INSERT = Sql(
    """
INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, event_seq, created_at, updated_at)
VALUES (:id, :company_id, :job_type, :input, :source_task_id, 1, :now, :now)
""",
    **{name: kind for name, kind in JOB_PARAMETERS.items() if name != "payload"},
)

INSERT_MANY = Sql(
    """
INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, event_seq, created_at, updated_at)
SELECT replace(json_extract(value, '$.id'), '-', ''), :company_id, json_extract(value, '$.type'),
    json_extract(value, '$.input'), json_extract(value, '$.task'), 1, :now, :now
FROM json_each(:jobs) WHERE true
""",
    **MANY_PARAMETERS,
)

TELL_MANY = Sql(
    """
INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
SELECT :company_id, replace(json_extract(value, '$.id'), '-', ''), 1, 'content_job.queued',
    json_object('jobId', json_extract(value, '$.id')), :now
FROM json_each(:jobs) WHERE true
""",
    **MANY_PARAMETERS,
)

APPEND = Sql(
    """
INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
VALUES (:company_id, :job_id, :seq, :type, :payload, :now)
RETURNING id
""",
    company_id=sa.Text(),
    job_id=sa.Uuid(),
    seq=sa.Integer(),
    type=sa.Text(),
    payload=sa.Text(),
    now=UtcDateTime(),
)

TELL = Sql(
    """
INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
SELECT json_extract(value, '$.company'), json_extract(value, '$.job'), json_extract(value, '$.seq'),
    json_extract(value, '$.type'), json_extract(value, '$.payload'), :now
FROM json_each(:events) WHERE true
RETURNING job_id, id, seq
""",
    *TOLD,
    events=sa.Text(),
    now=UtcDateTime(),
)

_IN_SECONDS = f"strftime({SQLITE_TIME}, 'now', :{{}} || ' seconds')"

CLAIM = Sql(
    f"""
UPDATE {{s}}content_jobs
SET status = 'running', fence = fence + 1, attempt = attempt + 1, event_seq = event_seq + 1, worker_id = :worker_id,
    lease_until = {_IN_SECONDS.format("lease")}, started_at = :now, updated_at = :now
WHERE id IN (
    SELECT id FROM {{s}}content_jobs WHERE status = 'queued' ORDER BY priority DESC, created_at, id LIMIT :limit
)
RETURNING id, company_id, job_type, input, source_task_id, fence, attempt, event_seq
""",
    *CLAIMED[:-1],
    limit=sa.Integer(),
    worker_id=sa.Text(),
    lease=sa.Text(),
    now=UtcDateTime(),
)

INTEND = Sql(
    f"""
INSERT INTO {{s}}asset_intents (id, company_id, provider, object_key, not_before)
SELECT json_extract(value, '$.id'), json_extract(value, '$.company'), json_extract(value, '$.provider'),
    json_extract(value, '$.key'), {_IN_SECONDS.format("grace")}
FROM json_each(:intents) WHERE true
ON CONFLICT (provider, object_key) DO NOTHING
""",
    intents=sa.Text(),
    grace=sa.Text(),
)

# A key belongs to its row's company alone, so the company is part of the match: it is what the index begins with.
# The plus signs keep the planner from reading every key of the provider rather than those that are due.
_SWEEPABLE = f"""+i.provider = :provider AND i.state = :state AND i.not_before <= {_IN_SECONDS.format("early")}
    AND NOT EXISTS (
        SELECT 1 FROM {{s}}assets a
        WHERE a.company_id = i.company_id AND a.object_key = i.object_key AND a.provider = i.provider
    )"""
DUE_INTENTS = Sql(
    f"""
SELECT i.company_id, i.object_key, i.not_before FROM {{s}}asset_intents i
WHERE i.not_before >= :after AND {_SWEEPABLE}
ORDER BY i.not_before LIMIT :limit
""",
    *DUE,
    provider=sa.Text(),
    state=sa.Text(),
    early=sa.Text(),
    after=UtcDateTime(),
    limit=sa.Integer(),
)

CLAIM_INTENTS = Sql(
    f"""
UPDATE {{s}}asset_intents AS i SET state = 'collected', not_before = {_IN_SECONDS.format("hold")}
WHERE i.provider = :provider AND i.object_key IN (SELECT value FROM json_each(:keys))
    AND {_SWEEPABLE.replace("i.not_before", "+i.not_before")}
RETURNING object_key
""",
    sa.column("object_key", sa.Text()),
    keys=sa.Text(),
    provider=sa.Text(),
    state=sa.Text(),
    early=sa.Text(),
    hold=sa.Text(),
)

DROP_INTENTS = Sql(
    """
DELETE FROM {s}asset_intents
WHERE provider = :provider AND object_key IN (SELECT value FROM json_each(:keys)) AND state = 'collected'
""",
    keys=sa.Text(),
    provider=sa.Text(),
)

POSTPONE_INTENTS = Sql(
    f"""
UPDATE {{s}}asset_intents AS i
SET state = 'tombstone', attempts = attempts + 1, last_error = json_extract(f.value, '$.error'),
    not_before = strftime({SQLITE_TIME}, 'now', (60 << min(attempts, 10)) || ' seconds')
FROM json_each(:failures) AS f
WHERE i.provider = :provider AND i.object_key = json_extract(f.value, '$.key') AND i.state = 'collected'
""",
    failures=sa.Text(),
    provider=sa.Text(),
)

FINISH = Sql(
    """
UPDATE {s}content_jobs
SET status = json_extract(f.value, '$.status'), result_asset_id = json_extract(f.value, '$.asset'),
    error_message = json_extract(f.value, '$.error'), event_seq = event_seq + 1, lease_until = NULL, worker_id = NULL,
    finished_at = :now, updated_at = :now
FROM json_each(:jobs) AS f
WHERE {s}content_jobs.id = json_extract(f.value, '$.job') AND {s}content_jobs.status = 'running'
    AND fence = json_extract(f.value, '$.fence')
RETURNING id, company_id, event_seq
""",
    sa.column("id", sa.Uuid()),
    sa.column("company_id", sa.Text()),
    sa.column("event_seq", sa.Integer()),
    jobs=sa.Text(),
    now=UtcDateTime(),
)

KEEP = Sql(
    """
INSERT INTO {s}assets (id, company_id, provider, object_key, content_type, byte_size, sha256, original_filename,
    source_task_id, job_id, position, created_at, updated_at)
SELECT json_extract(value, '$.id'), json_extract(value, '$.company'), json_extract(value, '$.provider'),
    json_extract(value, '$.key'), json_extract(value, '$.content_type'), json_extract(value, '$.size'),
    json_extract(value, '$.sha256'), json_extract(value, '$.filename'), json_extract(value, '$.task'),
    json_extract(value, '$.job'), json_extract(value, '$.position'), :now, :now
FROM json_each(:files) WHERE true
""",
    files=sa.Text(),
    now=UtcDateTime(),
)

FORGET = Sql(
    """
DELETE FROM {s}asset_intents WHERE state = 'pending' AND (provider, object_key) IN (
    SELECT json_extract(value, '$.provider'), json_extract(value, '$.key') FROM json_each(:files)
)
""",
    files=sa.Text(),
)

RELEASE = Sql(
    """
UPDATE {s}content_jobs
SET status = 'queued', attempt = attempt - 1, event_seq = event_seq + 1, lease_until = NULL, worker_id = NULL,
    started_at = NULL, updated_at = :now
FROM json_each(:jobs) AS f
WHERE {s}content_jobs.id = json_extract(f.value, '$.job') AND {s}content_jobs.status = 'running'
    AND fence = json_extract(f.value, '$.fence')
RETURNING id, company_id, event_seq
""",
    sa.column("id", sa.Uuid()),
    sa.column("company_id", sa.Text()),
    sa.column("event_seq", sa.Integer()),
    jobs=sa.Text(),
    now=UtcDateTime(),
)

START = Sql("SELECT COALESCE((SELECT seq FROM {s}sqlite_sequence WHERE name = 'content_job_events'), 0)")

_COLUMNS = "id, 0 AS xid, seq, company_id, type, job_id, created_at, payload"
SCAN = Sql(
    f"SELECT {_COLUMNS} FROM {{s}}content_job_events WHERE id > :id ORDER BY id LIMIT :limit",
    *EVENT,
    id=sa.BigInteger(),
    limit=sa.Integer(),
)

EARLIER = Sql(
    """
SELECT e.id, 0 AS xid, e.seq, e.company_id, e.type, e.job_id, e.created_at, e.payload
FROM json_each(:jobs) AS f
JOIN {s}content_job_events e ON e.job_id = json_extract(f.value, '$.job') AND e.seq < json_extract(f.value, '$.seq')
WHERE e.id > :id
    OR json_extract(f.value, '$.queued') AND e.type = 'content_job.queued'
        AND e.seq = json_extract(f.value, '$.seq') - 1
ORDER BY e.job_id, e.seq
""",
    *EVENT,
    jobs=sa.Text(),
    id=sa.BigInteger(),
)

HAS_QUEUED = Sql("SELECT EXISTS (SELECT 1 FROM {s}content_jobs WHERE status = 'queued')")


class Sqlite:
    """``jobkit._dialects.base.Statements`` for SQLite."""

    claim_locks = True

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int:
        connection.execute(INSERT(connection), {name: values[name] for name in values if name != "payload"})
        event = {"job_id": values["id"], "seq": 1, "type": "content_job.queued"}
        shared = {name: values[name] for name in ("company_id", "payload", "now")}
        return self.append_event(connection, {**event, **shared})

    def insert_jobs(
        self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool
    ) -> None:
        values = {"company_id": company_id, "jobs": jobs, "now": now}
        connection.execute(INSERT_MANY(connection), values)
        connection.execute(TELL_MANY(connection), values)

    def append_event(self, connection: sa.Connection, values: Mapping[str, Any]) -> int:
        return int(connection.execute(APPEND(connection), values).scalar_one())

    def claim(
        self, connection: sa.Connection, *, limit: int, worker_id: str, lease: float, now: datetime
    ) -> list[Claimed]:
        values = {"limit": limit, "worker_id": worker_id, "lease": str(lease), "now": now}
        rows = connection.execute(CLAIM(connection), values).all()
        if not rows:
            return []
        rows = sorted(rows, key=lambda row: row.id)
        events = [
            _event(row.id, row.company_id, row.event_seq, "content_job.running", {"jobId": str(row.id)}) for row in rows
        ]
        ids = {told.job_id: told.event_id for told in self._tell(connection, events, now)}
        return [Claimed._make((*row, ids[row.id])) for row in rows]

    def has_queued(self, connection: sa.Connection) -> bool:
        return bool(connection.execute(HAS_QUEUED(connection)).scalar())

    def record_intents(self, connection: sa.Connection, intents: Document, *, grace: float) -> None:
        connection.execute(INTEND(connection), {"intents": json.dumps(intents), "grace": str(grace)})

    def due_intents(
        self, connection: sa.Connection, *, provider: str, state: str, early: float, after: datetime, limit: int
    ) -> Iterator[Due]:
        values = {"provider": provider, "state": state, "early": str(early), "after": after, "limit": limit}
        for row in connection.execute(DUE_INTENTS(connection), values):
            yield Due(*row)

    def claim_intents(
        self, connection: sa.Connection, keys: Sequence[str], *, provider: str, state: str, early: float, hold: float
    ) -> list[str]:
        values = {
            "keys": json.dumps(keys),
            "provider": provider,
            "state": state,
            "early": str(early),
            "hold": str(hold),
        }
        return list(connection.execute(CLAIM_INTENTS(connection), values).scalars())

    def drop_intents(self, connection: sa.Connection, keys: Sequence[str], *, provider: str) -> None:
        connection.execute(DROP_INTENTS(connection), {"keys": json.dumps(keys), "provider": provider})

    def postpone_intents(self, connection: sa.Connection, failures: Document, *, provider: str) -> None:
        connection.execute(POSTPONE_INTENTS(connection), {"failures": json.dumps(failures), "provider": provider})

    def finish(
        self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime
    ) -> tuple[list[Told], int]:
        rows = connection.execute(FINISH(connection), {"jobs": json.dumps(jobs), "now": now}).all()
        if not rows:
            return [], 0
        ends = {job["job"]: job for job in jobs}
        events = [
            _event(row.id, row.company_id, row.event_seq, ends[row.id.hex]["type"], ends[row.id.hex]["payload"])
            for row in rows
        ]
        told = self._tell(connection, events, now)
        won = {row.id.hex for row in rows}
        kept = json.dumps([file for file in files if file["job"] in won])
        if kept == "[]":
            return told, 0
        connection.execute(KEEP(connection), {"files": kept, "now": now})
        return told, connection.execute(FORGET(connection), {"files": kept}).rowcount

    def release(self, connection: sa.Connection, jobs: Document, *, now: datetime) -> list[Told]:
        rows = connection.execute(RELEASE(connection), {"jobs": json.dumps(jobs), "now": now}).all()
        events = [
            _event(row.id, row.company_id, row.event_seq, "content_job.queued", {"jobId": str(row.id)}) for row in rows
        ]
        return self._tell(connection, events, now)

    def start(self, connection: sa.Connection) -> Start:
        return Start(Position(0, connection.execute(START(connection)).scalar_one()), "")

    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        events = [EventRow(*row) for row in connection.execute(SCAN(connection), {"id": after.id, "limit": limit})]
        return events, Position(0, events[-1].id) if events else after

    def earlier(self, connection: sa.Connection, after: Position, start: Start, jobs: Document) -> Sequence[EventRow]:
        values = {"jobs": json.dumps(jobs), "id": after.id}
        return [EventRow(*row) for row in connection.execute(EARLIER(connection), values)]

    def _tell(self, connection: sa.Connection, events: Document, now: datetime) -> list[Told]:
        rows = connection.execute(TELL(connection), {"events": json.dumps(events), "now": now})
        return [Told(*row) for row in rows]


def _event(job_id: UUID, company_id: str, seq: int, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"company": company_id, "job": job_id.hex, "seq": seq, "type": kind, "payload": payload}
