"""Jobs: created, claimed, ended, rescued, on SQLite. A step is a few statements, the first of them a write, which takes
the lock for all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.base import (
    ClaimedRow,
    ClaimTerms,
    Document,
    EventRow,
    Finished,
    Held,
    RescueTerms,
    event_payload,
)
from jobkit.db.dialects.sql import (
    CLAIMED,
    COMPANIES_BEYOND,
    COMPANIES_OF_BOTH,
    ENDING,
    HELD,
    LEASES,
    LEVELS_OF,
    QUEUED_JOB,
    SELECT_COMPANIES_DUE,
    SELECT_HAS_QUEUED,
    Sql,
)
from jobkit.db.dialects.sqlite.events import insert_event, insert_events
from jobkit.tables import SQLITE_NOW, sqlite_in

# The columns by which the event of a changed job is made.
_CHANGED = (sa.column("id", sa.Uuid()), sa.column("company_id", sa.Text()), sa.column("event_seq", sa.Integer()))

INSERT_JOB = Sql(
    """
INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, run_at, priority, idempotency_key,
    event_seq, created_at, updated_at)
VALUES (:id, :company_id, :job_type, :input, :source_task_id, :run_at, :priority, :key, 1, :now, :now)
ON CONFLICT (company_id, job_type, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
""",
    id=sa.Uuid(),
)

INSERT_JOBS = Sql(
    """
INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, run_at, priority, event_seq, created_at,
    updated_at)
SELECT replace(json_extract(value, '$.id'), '-', ''), :company_id, json_extract(value, '$.type'),
    json_extract(value, '$.input'), json_extract(value, '$.task'), substr(json_extract(value, '$.run_at'), 1, 26),
    json_extract(value, '$.priority'), 1, :now, :now
FROM json_each(:jobs) WHERE true
"""
)

INSERT_QUEUED_EVENTS = Sql(
    """
INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
SELECT :company_id, replace(json_extract(value, '$.id'), '-', ''), 1, 'content_job.queued',
    json_object('jobId', json_extract(value, '$.id')), :now
FROM json_each(:jobs)
WHERE EXISTS (SELECT 1 FROM {s}content_jobs WHERE id = replace(json_extract(value, '$.id'), '-', ''))
"""
)

_BY = f"COALESCE(:by, {SQLITE_NOW})"

COMPANIES_DUE = Sql(SELECT_COMPANIES_DUE.replace("{by}", _BY))
HAS_QUEUED = Sql(SELECT_HAS_QUEUED.replace("{by}", _BY))

FIRST_QUEUED = Sql(
    LEVELS_OF.replace("{by}", _BY).replace("{companies}", "json_each(:companies) AS c")
    + f"""
SELECT j.id, j.company_id, j.priority, j.created_at, 0, j.rescues >= :suspect
FROM json_each(:companies) AS c CROSS JOIN {{s}}content_jobs AS j ON j.id IN (
    SELECT id FROM {{s}}content_jobs WHERE status = 'queued' AND run_at IS NULL AND company_id = c.value
    ORDER BY company_id, priority DESC, created_at, id LIMIT :each
)
UNION ALL
SELECT j.id, j.company_id, j.priority, j.run_at, 1, j.rescues >= :suspect
FROM level CROSS JOIN {{s}}content_jobs AS j ON j.id IN (
    SELECT id FROM {{s}}content_jobs
    WHERE status = 'queued' AND run_at IS NOT NULL AND company_id = level.company_id AND priority = level.priority
        AND run_at <= {_BY}
    ORDER BY company_id, priority DESC, run_at, id LIMIT :each
)
""",
    *QUEUED_JOB,
)

COMPANIES = Sql(
    COMPANIES_BEYOND + COMPANIES_OF_BOTH.replace("{due}", "SELECT value FROM json_each(:due) WHERE value > :beyond")
)

# One index lookup for each company with scheduled jobs, and for each of its priorities down to one that is due.
ALL_COMPANIES = Sql(
    COMPANIES_BEYOND
    + f""", d(company_id, priority, run_at, n) AS (
    SELECT * FROM (SELECT company_id, priority, run_at, 0 FROM {{s}}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND company_id > :beyond
        ORDER BY company_id, priority DESC, run_at, id LIMIT 1)
  UNION ALL
    SELECT j.company_id, j.priority, j.run_at, d.n + (d.run_at <= {_BY})
    FROM d CROSS JOIN {{s}}content_jobs AS j ON j.id = COALESCE(
        CASE WHEN d.run_at > {_BY} THEN (SELECT id FROM {{s}}content_jobs
            WHERE status = 'queued' AND run_at IS NOT NULL AND company_id = d.company_id AND priority < d.priority
            ORDER BY company_id, priority DESC, run_at, id LIMIT 1) END,
        (SELECT id FROM {{s}}content_jobs
            WHERE status = 'queued' AND run_at IS NOT NULL AND company_id > d.company_id
            ORDER BY company_id, priority DESC, run_at, id LIMIT 1)
    )
    WHERE d.n < :limit
)"""
    + COMPANIES_OF_BOTH.replace("{due}", f"SELECT company_id FROM d WHERE run_at <= {_BY}")
)

# The end of every claim.
_CLAIM = f"""
UPDATE {{s}}content_jobs
SET status = 'running', fence = fence + 1, attempt = attempt + 1, event_seq = event_seq + 1, worker_id = :worker_id,
    lease_until = {sqlite_in(":lease")}, started_at = :now, updated_at = :now
WHERE id IN ({{picked}})
RETURNING id, company_id, job_type, input, source_task_id, fence, attempt, event_seq
"""

CLAIM = Sql(
    _CLAIM.replace(
        "{picked}",
        """
    SELECT id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL
    ORDER BY company_id, priority DESC, created_at, id LIMIT :limit
""",
    ),
    *CLAIMED[:-1],
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
)

CLAIM_THESE = Sql(
    _CLAIM.replace(
        "{picked}",
        """
    SELECT j.id FROM json_each(:ids) AS w CROSS JOIN {s}content_jobs AS j ON j.id = w.value
    WHERE j.status = 'queued' AND (j.run_at IS NULL OR j.run_at <= """
        + _BY
        + """)
    ORDER BY w.key LIMIT :limit
""",
    ),
    *CLAIMED[:-1],
)

FINISH = Sql(
    """
UPDATE {s}content_jobs
SET status = json_extract(f.value, '$.status'), result_asset_id = json_extract(f.value, '$.asset'),
    error_message = json_extract(f.value, '$.error'), error_detail = json_extract(f.value, '$.detail'),
    event_seq = event_seq + 1, lease_until = NULL, worker_id = NULL,
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
    *_CHANGED,
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
"""
)

DELETE_INTENTS = Sql(
    """
DELETE FROM {s}asset_intents WHERE state = 'pending' AND (provider, object_key) IN (
    SELECT json_extract(value, '$.provider'), json_extract(value, '$.key') FROM json_each(:files)
)
"""
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
)

SELECT_HELD = Sql(
    f"""
SELECT {{s}}content_jobs.id, cancel_requested_at IS NOT NULL, COALESCE(lease_until < {sqlite_in(":within")}, 0)
FROM json_each(:jobs) AS f JOIN {{s}}content_jobs ON {_HOLDS}
""",
    *HELD,
    ENDING,
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
    *_CHANGED,
    sa.column("progress", sa.Float()),
    sa.column("progress_message", sa.Text()),
    sa.column("cancelled", sa.Boolean()),
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
    run_at = CASE WHEN cancel_requested_at IS NULL AND rescues < :max_rescues AND rescues + 1 >= :suspect
        THEN min(created_at, :now) END,
    rescues = rescues + 1, event_seq = event_seq + 1, lease_until = NULL, worker_id = NULL, updated_at = :now
WHERE id IN (
    SELECT id FROM {{s}}content_jobs AS j
    WHERE status = 'running' AND lease_until < {SQLITE_NOW} AND id > :after AND lease_until > {sqlite_in(":since")}
        AND NOT EXISTS (SELECT 1 FROM json_each(:mine) AS m
            WHERE json_extract(m.value, '$.job') = j.id AND json_extract(m.value, '$.fence') = j.fence)
    ORDER BY id LIMIT :limit
)
RETURNING id, company_id, event_seq, status, attempt
""",
    *_CHANGED,
    sa.column("status", sa.Text()),
    sa.column("attempt", sa.Integer()),
    after=sa.Uuid(),
)

FIRST_EXPIRED = Sql(
    f"""
SELECT id FROM {{s}}content_jobs WHERE status = 'running' AND lease_until < {SQLITE_NOW} AND id > :after
ORDER BY id LIMIT 1
""",
    sa.column("id", sa.Uuid()),
    after=sa.Uuid(),
)

# From the number of days that julianday() gives.
_SECONDS = "(julianday({}) - 2440587.5) * 86400.0"

LEASES_OF_RUNNING = Sql(
    f"""
SELECT {_SECONDS.format("'now'")}, {_SECONDS.format("min(lease_until)")}, {_SECONDS.format("max(lease_until)")}
FROM {{s}}content_jobs WHERE status = 'running'
""",
    *LEASES,
)

CAP_LEASES = Sql(
    f"""
UPDATE {{s}}content_jobs SET lease_until = {sqlite_in(":lease")}
WHERE status = 'running' AND lease_until > {sqlite_in(":far")}
"""
)


class Jobs(base.Jobs):
    """Jobs on SQLite."""

    claim_locks = True

    _claim, _claim_of, _claim_these = CLAIM, CLAIM_OF, CLAIM_THESE
    _renew, _held, _first_expired = RENEW, SELECT_HELD, FIRST_EXPIRED
    _leases, _cap_leases = LEASES_OF_RUNNING, CAP_LEASES
    _companies_due, _companies, _all_companies = COMPANIES_DUE, COMPANIES, ALL_COMPANIES
    _first_queued, _has_queued = FIRST_QUEUED, HAS_QUEUED

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        if connection.execute(INSERT_JOB(connection), values).rowcount == 0:
            return None
        return insert_event(connection, {**values, "job_id": values["id"], "seq": 1, "type": "content_job.queued"})

    def insert_jobs(self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool) -> int:
        values = {"company_id": company_id, "jobs": jobs, "now": now}
        count = connection.execute(INSERT_JOBS(connection), values).rowcount
        connection.execute(INSERT_QUEUED_EVENTS(connection), values)
        return count

    def _claimed(
        self, connection: sa.Connection, statement: Sql, terms: ClaimTerms, **more: object
    ) -> list[ClaimedRow]:
        rows = sorted(connection.execute(statement(connection), {**terms._asdict(), **more}), key=lambda row: row.id)
        if not rows:
            return []
        running = "content_job.running"
        events = [_event(row, running, event_payload(running, row.id)) for row in rows]
        ids = {event.job_id: event.event_id for event in insert_events(connection, events, terms.now)}
        return [ClaimedRow.of((*row, ids[row.id])) for row in rows]

    def finish(self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime) -> Finished:
        rows = connection.execute(FINISH(connection), {"jobs": json.dumps(jobs), "now": now}).all()
        if not rows:
            return Finished([])
        ends = {job["job"]: job for job in jobs}
        events = [_event(row, ends[row.id.hex]["type"], ends[row.id.hex]["payload"]) for row in rows]
        appended = insert_events(connection, events, now)
        won = {row.id.hex for row in rows}
        kept = json.dumps([file for file in files if file["job"] in won])
        if kept == "[]":
            return Finished(appended)
        connection.execute(INSERT_ASSETS(connection), {"files": kept, "now": now})
        return Finished(appended, connection.execute(DELETE_INTENTS(connection), {"files": kept}).rowcount)

    def update_progress(
        self, connection: sa.Connection, jobs: Document, *, lease: float, now: datetime
    ) -> tuple[list[EventRow], list[Held]]:
        values = {"jobs": json.dumps(jobs), "lease": lease, "now": now}
        rows = connection.execute(UPDATE_PROGRESS(connection), values).all()
        kind = "content_job.progress"
        events = [
            _event(row, kind, event_payload(kind, row.id, progress=row.progress, message=row.progress_message))
            for row in rows
        ]
        return _appended(connection, events, now), [Held(row.id, row.cancelled) for row in rows]

    def rescue(self, connection: sa.Connection, *, terms: RescueTerms) -> list[EventRow]:
        rows = connection.execute(RESCUE(connection), terms._asdict()).all()
        return _appended(connection, [_rescued(row, terms) for row in rows], terms.now)


def _event(row: Any, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"company": row.company_id, "job": row.id.hex, "seq": row.event_seq, "type": kind, "payload": payload}


def _rescued(row: Any, terms: RescueTerms) -> dict[str, Any]:
    kind = f"content_job.{'retrying' if row.status == 'queued' else row.status}"
    error = terms.stopped if row.status == "failed" else terms.reason
    # The row's attempt is one less already: it is not charged. The event names the attempt that was lost.
    payload = event_payload(kind, row.id, error=error, attempt=row.attempt + 1, run_at=terms.now)
    return _event(row, kind, payload)


def _appended(connection: sa.Connection, events: Document, now: datetime) -> list[EventRow]:
    ids = {event.job_id.hex: event.event_id for event in insert_events(connection, events, now)}
    return [
        EventRow(ids[e["job"]], 0, e["seq"], e["company"], e["type"], UUID(e["job"]), now, e["payload"]) for e in events
    ]
