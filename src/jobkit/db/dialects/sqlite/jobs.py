"""Claims: taken, prolonged, ended, rescued, on SQLite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects import base as shared
from jobkit.db.dialects.base import (
    CLAIMED,
    HELD,
    JOB_PARAMETERS,
    MANY_PARAMETERS,
    WAITING,
    AppendedEvent,
    ClaimedRow,
    ClaimTerms,
    Document,
    EventRow,
    Held,
    RescueTerms,
    Sql,
)
from jobkit.db.dialects.sqlite.events import append, tell
from jobkit.tables import SQLITE_NOW, UtcDateTime, sqlite_in

_ENDED = (sa.column("id", sa.Uuid()), sa.column("company_id", sa.Text()), sa.column("event_seq", sa.Integer()))

# Each way to pick jobs ends in the same claim.
_CLAIM = f"""
UPDATE {{s}}content_jobs
SET status = 'running', fence = fence + 1, attempt = attempt + 1, event_seq = event_seq + 1, worker_id = :worker_id,
    lease_until = {sqlite_in(":lease")}, started_at = :now, updated_at = :now
WHERE id IN ({{picked}})
RETURNING id, company_id, job_type, input, source_task_id, fence, attempt, event_seq
"""

_CLAIM_PARAMETERS: dict[str, Any] = {
    "limit": sa.Integer(),
    "worker_id": sa.Text(),
    "lease": sa.Text(),
    "now": UtcDateTime(),
}

CLAIM = Sql(
    _CLAIM.replace(
        "{picked}",
        """
    SELECT id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL
    ORDER BY company_id, priority DESC, created_at, id LIMIT :limit
""",
    ),
    *CLAIMED[:-1],
    **_CLAIM_PARAMETERS,
)

CLAIM_OF = Sql(
    _CLAIM.replace(
        "{picked}",
        """
    SELECT j.id FROM json_each(:companies) AS c JOIN {s}content_jobs AS j ON j.id IN (
        SELECT id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL AND company_id = c.value
        ORDER BY company_id, priority DESC, created_at, id LIMIT :each
    ) LIMIT :limit
""",
    ),
    *CLAIMED[:-1],
    **_CLAIM_PARAMETERS,
    companies=sa.Text(),
    each=sa.Integer(),
)

CLAIM_THESE = Sql(
    _CLAIM.replace(
        "{picked}",
        """
    SELECT j.id FROM json_each(:ids) AS w CROSS JOIN {s}content_jobs AS j ON j.id = w.value
    WHERE j.status = 'queued' AND (j.run_at IS NULL OR j.run_at <= :now)
    ORDER BY w.key LIMIT :limit
""",
    ),
    *CLAIMED[:-1],
    **_CLAIM_PARAMETERS,
    ids=sa.Text(),
)

FINISH = Sql(
    """
UPDATE {s}content_jobs
SET status = json_extract(f.value, '$.status'), result_asset_id = json_extract(f.value, '$.asset'),
    error_message = json_extract(f.value, '$.error'), event_seq = event_seq + 1, lease_until = NULL, worker_id = NULL,
    attempt = attempt - json_extract(f.value, '$.refund'), updated_at = :now,
    rescues = CASE json_extract(f.value, '$.status') WHEN 'queued' THEN 0 ELSE rescues END,
    run_at = CASE json_extract(f.value, '$.status') WHEN 'queued' THEN substr(json_extract(f.value, '$.run_at'), 1, 26)
        ELSE run_at END,
    started_at = CASE json_extract(f.value, '$.status') WHEN 'queued' THEN NULL ELSE started_at END,
    finished_at = CASE json_extract(f.value, '$.status') WHEN 'queued' THEN NULL ELSE :now END,
    progress = CASE WHEN json_extract(f.value, '$.status') = 'done' AND progress IS NOT NULL THEN 1 ELSE progress END
FROM json_each(:jobs) AS f
WHERE {s}content_jobs.id = json_extract(f.value, '$.job') AND {s}content_jobs.status = 'running'
    AND fence = json_extract(f.value, '$.fence')
    AND (json_extract(f.value, '$.status') <> 'queued' OR cancel_requested_at IS NULL)
RETURNING id, company_id, event_seq
""",
    *_ENDED,
    jobs=sa.Text(),
    now=UtcDateTime(),
)

INSERT_ASSETS = Sql(
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

DELETE_INTENTS = Sql(
    """
DELETE FROM {s}asset_intents WHERE state = 'pending' AND (provider, object_key) IN (
    SELECT json_extract(value, '$.provider'), json_extract(value, '$.key') FROM json_each(:files)
)
""",
    files=sa.Text(),
)

_HOLDS = """
{s}content_jobs.id = json_extract(f.value, '$.job') AND {s}content_jobs.status = 'running'
    AND fence = json_extract(f.value, '$.fence')
"""

# Not IS NOT NULL: in RETURNING after UPDATE FROM, SQLite 3.40 answers that with true whatever the column holds.
RENEW = Sql(
    f"""
UPDATE {{s}}content_jobs SET lease_until = {sqlite_in(":lease")}
FROM json_each(:jobs) AS f WHERE {_HOLDS}
RETURNING id, COALESCE(cancel_requested_at, '') <> ''
""",
    *HELD,
    jobs=sa.Text(),
    lease=sa.Text(),
)

LOOK = Sql(
    f"""
SELECT {{s}}content_jobs.id, cancel_requested_at IS NOT NULL
FROM json_each(:jobs) AS f JOIN {{s}}content_jobs ON {_HOLDS}
""",
    *HELD,
    jobs=sa.Text(),
)

UPDATE_PROGRESS = Sql(
    f"""
UPDATE {{s}}content_jobs
SET progress = max(COALESCE(progress, 0.0), json_extract(f.value, '$.progress')),
    progress_message = json_extract(f.value, '$.message'), event_seq = event_seq + 1,
    lease_until = {sqlite_in(":lease")}, updated_at = :now
FROM json_each(:jobs) AS f WHERE {_HOLDS}
RETURNING id, company_id, event_seq, progress, progress_message, COALESCE(cancel_requested_at, '') <> '' AS cancelled
""",
    *_ENDED,
    sa.column("progress", sa.Float()),
    sa.column("progress_message", sa.Text()),
    sa.column("cancelled", sa.Boolean()),
    jobs=sa.Text(),
    lease=sa.Text(),
    now=UtcDateTime(),
)

RESCUE = Sql(
    f"""
UPDATE {{s}}content_jobs
SET status = CASE WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
        WHEN rescues >= :max_rescues THEN 'failed' ELSE 'queued' END,
    attempt = CASE WHEN cancel_requested_at IS NULL AND rescues < :max_rescues THEN attempt - 1 ELSE attempt END,
    started_at = CASE WHEN cancel_requested_at IS NULL AND rescues < :max_rescues THEN NULL ELSE started_at END,
    finished_at = CASE WHEN cancel_requested_at IS NULL AND rescues < :max_rescues THEN NULL ELSE :now END,
    error_message = CASE WHEN cancel_requested_at IS NOT NULL THEN NULL
        WHEN rescues >= :max_rescues THEN :stopped ELSE :reason END,
    rescues = rescues + 1, event_seq = event_seq + 1, run_at = NULL, lease_until = NULL, worker_id = NULL,
    updated_at = :now
WHERE id IN (
    SELECT id FROM {{s}}content_jobs WHERE status = 'running' AND lease_until < {SQLITE_NOW} ORDER BY id LIMIT :limit
)
RETURNING id, company_id, event_seq, status, attempt
""",
    *_ENDED,
    sa.column("status", sa.Text()),
    sa.column("attempt", sa.Integer()),
    limit=sa.Integer(),
    max_rescues=sa.Integer(),
    stopped=sa.Text(),
    reason=sa.Text(),
    now=UtcDateTime(),
)

EXPIRED = Sql(
    f"SELECT EXISTS (SELECT 1 FROM {{s}}content_jobs WHERE status = 'running' AND lease_until < {SQLITE_NOW})"
)


class Claims:
    """``jobkit._dialects.base.ClaimStatements`` for SQLite."""

    claim_locks = True

    def claim(self, connection: sa.Connection, *, terms: ClaimTerms) -> list[ClaimedRow]:
        return self._claimed(connection, CLAIM, terms, {})

    def claim_of(
        self, connection: sa.Connection, companies: Sequence[str], each: int, *, terms: ClaimTerms
    ) -> list[ClaimedRow]:
        return self._claimed(connection, CLAIM_OF, terms, {"companies": json.dumps(companies), "each": each})

    def claim_these(self, connection: sa.Connection, job_ids: Sequence[UUID], *, terms: ClaimTerms) -> list[ClaimedRow]:
        ids = json.dumps([job_id.hex for job_id in job_ids])
        return self._claimed(connection, CLAIM_THESE, terms, {"ids": ids})

    def _claimed(
        self, connection: sa.Connection, statement: Sql, terms: ClaimTerms, more: Mapping[str, Any]
    ) -> list[ClaimedRow]:
        values = {**terms._asdict(), "lease": str(terms.lease), **more}
        rows = sorted(connection.execute(statement(connection), values), key=lambda row: row.id)
        if not rows:
            return []
        events = [
            _event(row.id, row.company_id, row.event_seq, "content_job.running", {"jobId": str(row.id)}) for row in rows
        ]
        ids = {told.job_id: told.event_id for told in tell(connection, events, terms.now)}
        return [ClaimedRow._make((*row, ids[row.id])) for row in rows]

    def finish(
        self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime
    ) -> tuple[list[AppendedEvent], int]:
        rows = connection.execute(FINISH(connection), {"jobs": json.dumps(jobs), "now": now}).all()
        if not rows:
            return [], 0
        ends = {job["job"]: job for job in jobs}
        events = [
            _event(row.id, row.company_id, row.event_seq, ends[row.id.hex]["type"], ends[row.id.hex]["payload"])
            for row in rows
        ]
        told = tell(connection, events, now)
        won = {row.id.hex for row in rows}
        kept = json.dumps([file for file in files if file["job"] in won])
        if kept == "[]":
            return told, 0
        connection.execute(INSERT_ASSETS(connection), {"files": kept, "now": now})
        return told, connection.execute(DELETE_INTENTS(connection), {"files": kept}).rowcount

    def renew(self, connection: sa.Connection, jobs: Document, *, lease: float) -> list[Held]:
        rows = connection.execute(RENEW(connection), {"jobs": json.dumps(jobs), "lease": str(lease)})
        return [Held(*row) for row in rows]

    def look(self, connection: sa.Connection, jobs: Document) -> list[Held]:
        return [Held(*row) for row in connection.execute(LOOK(connection), {"jobs": json.dumps(jobs)})]

    def advance(
        self, connection: sa.Connection, jobs: Document, *, lease: float, now: datetime
    ) -> list[tuple[EventRow, bool]]:
        values = {"jobs": json.dumps(jobs), "lease": str(lease), "now": now}
        rows = connection.execute(UPDATE_PROGRESS(connection), values).all()
        events = [_event(row.id, row.company_id, row.event_seq, "content_job.progress", _advanced(row)) for row in rows]
        told = _told(connection, events, now)
        return [(event, row.cancelled) for event, row in zip(told, rows, strict=True)]

    def rescue(self, connection: sa.Connection, *, terms: RescueTerms) -> list[EventRow]:
        rows = connection.execute(RESCUE(connection), terms._asdict()).all()
        events = [
            _event(row.id, row.company_id, row.event_seq, *_rescued(str(row.id), row.status, row.attempt, terms))
            for row in rows
        ]
        return _told(connection, events, terms.now)

    def has_expired(self, connection: sa.Connection) -> bool:
        return bool(connection.execute(EXPIRED(connection)).scalar())


def _event(job_id: UUID, company_id: str, seq: int, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"company": company_id, "job": job_id.hex, "seq": seq, "type": kind, "payload": payload}


def _told(connection: sa.Connection, events: Document, now: datetime) -> list[EventRow]:
    ids = {told.job_id.hex: told.event_id for told in tell(connection, events, now)}
    return [
        EventRow(ids[e["job"]], 0, e["seq"], e["company"], e["type"], UUID(e["job"]), now, e["payload"]) for e in events
    ]


def _advanced(row: Any) -> dict[str, Any]:
    return {"jobId": str(row.id), "progress": row.progress, "message": row.progress_message}


def _rescued(job_id: str, status: str, attempt: int, terms: RescueTerms) -> tuple[str, dict[str, Any]]:
    if status == "cancelled":
        return "content_job.cancelled", {"jobId": job_id}
    if status == "failed":
        return "content_job.failed", {"jobId": job_id, "errorMessage": terms.stopped}
    lost = {"jobId": job_id, "attempt": attempt + 1, "errorMessage": terms.reason, "runAt": terms.now.isoformat()}
    return "content_job.retrying", lost


INSERT = Sql(
    """
INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, run_at, priority, idempotency_key,
    event_seq, created_at, updated_at)
VALUES (:id, :company_id, :job_type, :input, :source_task_id, :run_at, :priority, :key, 1, :now, :now)
ON CONFLICT (company_id, job_type, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
""",
    **{name: kind for name, kind in JOB_PARAMETERS.items() if name != "payload"},
)

INSERT_MANY = Sql(
    """
INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, run_at, priority, event_seq, created_at,
    updated_at)
SELECT replace(json_extract(value, '$.id'), '-', ''), :company_id, json_extract(value, '$.type'),
    json_extract(value, '$.input'), json_extract(value, '$.task'), substr(json_extract(value, '$.run_at'), 1, 26),
    json_extract(value, '$.priority'), 1, :now, :now
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


class Jobs:
    """``jobkit._dialects.base.JobStatements`` for SQLite."""

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        row = {name: values[name] for name in values if name != "payload"}
        if connection.execute(INSERT(connection), row).rowcount == 0:
            return None
        event = {"job_id": values["id"], "seq": 1, "type": "content_job.queued"}
        shared = {name: values[name] for name in ("company_id", "payload", "now")}
        return append(connection, {**event, **shared})

    def insert_jobs(
        self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool
    ) -> None:
        values = {"company_id": company_id, "jobs": jobs, "now": now}
        connection.execute(INSERT_MANY(connection), values)
        connection.execute(TELL_MANY(connection), values)


# One look at each priority, however many jobs wait for a later time. After ANALYZE the planner would rather sort them.
_LEVELS = """
WITH RECURSIVE level(priority) AS (
    SELECT * FROM (SELECT priority FROM {s}content_jobs INDEXED BY content_jobs_scheduled_idx
        WHERE status = 'queued' AND run_at IS NOT NULL ORDER BY priority DESC, run_at, id LIMIT 1)
  UNION ALL
    SELECT (SELECT priority FROM {s}content_jobs INDEXED BY content_jobs_scheduled_idx
        WHERE status = 'queued' AND run_at IS NOT NULL AND priority < level.priority
        ORDER BY priority DESC, run_at, id LIMIT 1)
    FROM level WHERE level.priority IS NOT NULL
)"""

DUE_JOBS = Sql(
    _LEVELS
    + """, turn AS (
    SELECT j.id, j.company_id, j.priority, j.run_at,
        row_number() OVER (PARTITION BY j.company_id ORDER BY j.priority DESC, j.run_at, j.id) AS n
    FROM level CROSS JOIN {s}content_jobs AS j ON j.id IN (
        SELECT id FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND priority = level.priority AND run_at <= :now
        ORDER BY priority DESC, run_at, id LIMIT :window
    )
)
SELECT id, company_id, priority, run_at FROM turn ORDER BY n, priority DESC, run_at, id LIMIT :limit
""",
    *WAITING,
    window=sa.Integer(),
    limit=sa.Integer(),
    now=UtcDateTime(),
)

FIRST_QUEUED = Sql(
    """
SELECT j.id, j.company_id, j.priority, j.created_at
FROM json_each(:companies) AS c CROSS JOIN {s}content_jobs AS j ON j.id IN (
    SELECT id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL AND company_id = c.value
    ORDER BY company_id, priority DESC, created_at, id LIMIT :each
)
""",
    *WAITING,
    companies=sa.Text(),
    each=sa.Integer(),
)

COMPANIES = Sql(
    """
WITH RECURSIVE c(company_id, n) AS (
    SELECT * FROM (SELECT company_id, 1 FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL
        ORDER BY company_id LIMIT 1)
  UNION ALL
    SELECT (SELECT company_id FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NULL AND company_id > c.company_id ORDER BY company_id LIMIT 1), c.n + 1
    FROM c WHERE c.company_id IS NOT NULL AND c.n < :limit
)
SELECT company_id FROM c WHERE company_id IS NOT NULL
""",
    limit=sa.Integer(),
)

HAS_QUEUED = Sql(
    _LEVELS
    + """
SELECT EXISTS (SELECT 1 FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL)
    OR EXISTS (SELECT 1 FROM level WHERE EXISTS (
        SELECT 1 FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND priority = level.priority AND run_at <= :now))
""",
    now=UtcDateTime(),
)


class Queue(shared.Queue):
    """``jobkit._dialects.base.QueueStatements`` for SQLite."""

    _due, _heads, _companies, _has_queued = DUE_JOBS, FIRST_QUEUED, COMPANIES, HAS_QUEUED
