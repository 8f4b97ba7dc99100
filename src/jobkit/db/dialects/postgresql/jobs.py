"""Jobs: created, claimed, ended, rescued, on PostgreSQL. A step is one statement: a round trip costs more than anything
in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.base import AppendedEvent, Document, EventRow, Finished, Held, RescueTerms
from jobkit.db.dialects.sql import (
    APPENDED,
    CLAIMED,
    COMPANIES_BEYOND,
    COMPANIES_OF_BOTH,
    ENDING,
    EVENT,
    HELD,
    LEASES,
    LEVELS_OF,
    QUEUED_JOB,
    SELECT_COMPANIES_DUE,
    SELECT_HAS_QUEUED,
    Sql,
)

_INSERT_JOB = """
WITH job AS (
    INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, run_at, priority,
        idempotency_key, event_seq, created_at, updated_at)
    VALUES (:id, :company_id, :job_type, CAST(:input AS jsonb), :source_task_id, :run_at, :priority, :key, 1, :now,
        :now)
    {unless}
    RETURNING id
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    SELECT :company_id, id, 1, 'content_job.queued', CAST(:payload AS jsonb), :now FROM job
    RETURNING id
)
"""

_UNLESS = """
    ON CONFLICT (company_id, job_type, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING"""

# Without a payload, as a hint: PostgreSQL folds equal notifications of a transaction into one.
_NOTIFY = "SELECT id, pg_notify('jobkit', '') FROM told"

INSERT_JOB_NOTIFY = Sql(_INSERT_JOB.replace("{unless}", "") + _NOTIFY, id=sa.Uuid())
INSERT_JOB = Sql(_INSERT_JOB.replace("{unless}", "") + "SELECT id FROM told", id=sa.Uuid())
INSERT_JOB_ONCE_NOTIFY = Sql(_INSERT_JOB.replace("{unless}", _UNLESS) + _NOTIFY, id=sa.Uuid())
INSERT_JOB_ONCE = Sql(_INSERT_JOB.replace("{unless}", _UNLESS) + "SELECT id FROM told", id=sa.Uuid())

_INSERT_JOBS = """
WITH r AS (
    SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb))
    AS r(id uuid, type text, input jsonb, task text, run_at timestamptz, priority int)
), job AS (
    INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, run_at, priority, event_seq,
        created_at, updated_at)
    SELECT id, :company_id, type, input, task, run_at, priority, 1, :now, :now FROM r
    RETURNING id
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    SELECT :company_id, id, 1, 'content_job.queued', jsonb_build_object('jobId', id), :now FROM job
)
"""

INSERT_JOBS_NOTIFY = Sql(_INSERT_JOBS + "SELECT count(*), pg_notify('jobkit', '') FROM job")
INSERT_JOBS = Sql(_INSERT_JOBS + "SELECT count(*) FROM job")

# Not clock_timestamp(): no index can be searched for what changes within a statement.
_BY = "COALESCE(CAST(:by AS timestamptz), statement_timestamp())"
_EACH_COMPANY = "jsonb_array_elements_text(CAST(:companies AS jsonb)) AS c(value)"

COMPANIES_DUE = Sql(SELECT_COMPANIES_DUE.replace("{by}", _BY))
HAS_QUEUED = Sql(SELECT_HAS_QUEUED.replace("{by}", _BY))

FIRST_QUEUED = Sql(
    LEVELS_OF.replace("{by}", _BY).replace("{companies}", _EACH_COMPANY)
    + f"""
SELECT x.* FROM {_EACH_COMPANY} CROSS JOIN LATERAL (
    SELECT id, company_id, priority, created_at, false, rescues >= :suspect FROM {{s}}content_jobs
    WHERE status = 'queued' AND run_at IS NULL AND company_id = c.value
    ORDER BY company_id, priority DESC, created_at, id LIMIT :each
) x
UNION ALL
SELECT x.* FROM level CROSS JOIN LATERAL (
    SELECT id, company_id, priority, run_at, true, rescues >= :suspect FROM {{s}}content_jobs
    WHERE status = 'queued' AND run_at IS NOT NULL AND company_id = level.company_id AND priority = level.priority
        AND run_at <= {_BY}
    ORDER BY company_id, priority DESC, run_at, id LIMIT :each
) x
""",
    *QUEUED_JOB,
)

COMPANIES = Sql(
    COMPANIES_BEYOND
    + COMPANIES_OF_BOTH.replace(
        "{due}",
        "SELECT value FROM jsonb_array_elements_text(CAST(:due AS jsonb)) AS d(value) WHERE value > :beyond",
    )
)

# One index lookup for each company with scheduled jobs, and for each of its priorities down to one that is due.
ALL_COMPANIES = Sql(
    COMPANIES_BEYOND
    + f""", d(company_id, priority, run_at, n) AS (
    (SELECT company_id, priority, run_at, 0 FROM {{s}}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND company_id > :beyond
        ORDER BY company_id, priority DESC, run_at, id LIMIT 1)
  UNION ALL
    SELECT x.*, d.n + CASE WHEN d.run_at <= {_BY} THEN 1 ELSE 0 END FROM d CROSS JOIN LATERAL (
        (SELECT company_id, priority, run_at FROM {{s}}content_jobs
            WHERE status = 'queued' AND run_at IS NOT NULL AND company_id = d.company_id AND priority < d.priority
                AND d.run_at > {_BY}
            ORDER BY company_id, priority DESC, run_at, id LIMIT 1)
      UNION ALL
        (SELECT company_id, priority, run_at FROM {{s}}content_jobs
            WHERE status = 'queued' AND run_at IS NOT NULL AND company_id > d.company_id
            ORDER BY company_id, priority DESC, run_at, id LIMIT 1)
      LIMIT 1
    ) x WHERE d.n < :limit
)"""
    + COMPANIES_OF_BOTH.replace("{due}", f"SELECT company_id FROM d WHERE run_at <= {_BY}")
)

# The end of every claim. MATERIALIZED fixes the candidates: as a plain subquery, one plan claims more rows than LIMIT
# says.
_CLAIM = """, claimed AS (
    UPDATE {s}content_jobs j
    SET status = 'running', fence = j.fence + 1, attempt = j.attempt + 1, event_seq = j.event_seq + 1,
        worker_id = :worker_id, lease_until = clock_timestamp() + make_interval(secs => :lease),
        started_at = :now, updated_at = :now
    FROM picked WHERE j.id = picked.id
    RETURNING j.id, j.company_id, j.job_type, CAST(j.input AS text), j.source_task_id, j.fence, j.attempt, j.event_seq
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    SELECT company_id, id, event_seq, 'content_job.running', jsonb_build_object('jobId', id), :now FROM claimed
    RETURNING id, job_id
)
SELECT claimed.*, told.id AS event_id FROM claimed JOIN told ON told.job_id = claimed.id
"""

CLAIM = Sql(
    """
WITH picked AS MATERIALIZED (
    SELECT id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL
    ORDER BY company_id, priority DESC, created_at, id LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED
)"""
    + _CLAIM,
    *CLAIMED,
)

CLAIM_OF = Sql(
    """
WITH picked AS MATERIALIZED (
    SELECT x.id FROM jsonb_array_elements_text(CAST(:companies AS jsonb)) AS c(company) CROSS JOIN LATERAL (
        SELECT id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL AND company_id = c.company
        ORDER BY company_id, priority DESC, created_at, id LIMIT :each FOR NO KEY UPDATE SKIP LOCKED
    ) x LIMIT :limit
)"""
    + _CLAIM,
    *CLAIMED,
)

CLAIM_THESE = Sql(
    """
WITH picked AS MATERIALIZED (
    SELECT j.id FROM jsonb_array_elements_text(CAST(:ids AS jsonb)) WITH ORDINALITY AS w(id, n)
    JOIN {s}content_jobs j ON j.id = CAST(w.id AS uuid)
    WHERE j.status = 'queued' AND (j.run_at IS NULL OR j.run_at <= """
    + _BY
    + """)
    ORDER BY w.n LIMIT :limit FOR NO KEY UPDATE OF j SKIP LOCKED
)"""
    + _CLAIM,
    *CLAIMED,
)

# Those of ``f`` whose claims hold and whose rows nobody else has locked. NO KEY: a row that refers to a job is no such
# lock.
_FREE = """, free AS MATERIALIZED (
    SELECT f.* FROM f JOIN {s}content_jobs j ON j.id = f.job AND j.status = 'running' AND j.fence = f.fence
    FOR NO KEY UPDATE OF j SKIP LOCKED
)"""

FINISH = Sql(
    """
WITH f AS (
    SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb))
    AS f(job uuid, fence bigint, status text, asset uuid, error text, detail text, type text,
         payload jsonb, run_at timestamptz, refund int)
)"""
    + _FREE
    + """, a AS (
    SELECT * FROM jsonb_to_recordset(CAST(:files AS jsonb))
    AS a(id uuid, job uuid, company text, provider text, key text, content_type text, size bigint, sha256 text,
         filename text, task text, position int)
), won AS (
    UPDATE {s}content_jobs j
    SET status = f.status, result_asset_id = f.asset, error_message = f.error, error_detail = f.detail,
        event_seq = j.event_seq + 1, lease_until = NULL, worker_id = NULL, attempt = j.attempt - f.refund,
        updated_at = :now,
        rescues = CASE f.status WHEN 'queued' THEN 0 ELSE j.rescues END,
        run_at = CASE f.status WHEN 'queued' THEN f.run_at ELSE j.run_at END,
        started_at = CASE f.status WHEN 'queued' THEN NULL ELSE j.started_at END,
        finished_at = CASE f.status WHEN 'queued' THEN NULL ELSE CAST(:now AS timestamptz) END,
        progress = CASE WHEN f.status = 'done' AND j.progress IS NOT NULL THEN 1 ELSE j.progress END
    FROM free f WHERE j.id = f.job AND (f.status <> 'queued' OR j.cancel_requested_at IS NULL)
    RETURNING j.id, j.company_id, j.event_seq, f.type, f.payload
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    SELECT company_id, id, event_seq, type, payload, :now FROM won
    RETURNING id, job_id, seq
), kept AS (
    INSERT INTO {s}assets (id, company_id, provider, object_key, content_type, byte_size, sha256, original_filename,
        source_task_id, job_id, position, created_at, updated_at)
    SELECT a.id, a.company, a.provider, a.key, a.content_type, a.size, a.sha256, a.filename,
        a.task, a.job, a.position, :now, :now
    FROM a JOIN won ON won.id = a.job
), gone AS (
    DELETE FROM {s}asset_intents i USING a JOIN won ON won.id = a.job
    WHERE i.provider = a.provider AND i.object_key = a.key AND i.state = 'pending'
    RETURNING 1
)
SELECT job_id, id, seq, (SELECT count(*) FROM gone) AS gone FROM told
UNION ALL
SELECT j.id, NULL, NULL, 0 FROM f JOIN {s}content_jobs j ON j.id = f.job AND j.status = 'running' AND j.fence = f.fence
WHERE NOT EXISTS (SELECT FROM free WHERE free.job = f.job)
""",
    *APPENDED,
    sa.column("gone", sa.BigInteger()),
)

RENEW = Sql(
    """
WITH f AS (
    SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, fence bigint)
)"""
    + _FREE
    + """, renewed AS (
    UPDATE {s}content_jobs j SET lease_until = clock_timestamp() + make_interval(secs => :lease)
    FROM free WHERE j.id = free.job
    RETURNING j.id
)
SELECT j.id, j.cancel_requested_at IS NOT NULL, renewed.id IS NULL
FROM f JOIN {s}content_jobs j ON j.id = f.job AND j.status = 'running' AND j.fence = f.fence
LEFT JOIN renewed ON renewed.id = j.id
""",
    *HELD,
    sa.column("locked", sa.Boolean()),
)

SELECT_HELD = Sql(
    """
SELECT j.id, j.cancel_requested_at IS NOT NULL,
    COALESCE(j.lease_until < clock_timestamp() + make_interval(secs => :within), false)
FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, fence bigint)
JOIN {s}content_jobs j ON j.id = f.job AND j.status = 'running' AND j.fence = f.fence
""",
    *HELD,
    ENDING,
)

UPDATE_PROGRESS = Sql(
    """
WITH f AS (
    SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, fence bigint, progress float8, message text)
)"""
    + _FREE
    + """, moved AS (
    UPDATE {s}content_jobs j
    SET progress = GREATEST(j.progress, f.progress), progress_message = f.message, event_seq = j.event_seq + 1,
        lease_until = clock_timestamp() + make_interval(secs => :lease), updated_at = :now
    FROM free f WHERE j.id = f.job
    RETURNING j.id, j.company_id, j.event_seq, j.progress, j.progress_message
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    SELECT company_id, id, event_seq, 'content_job.progress',
        jsonb_build_object('jobId', id, 'progress', progress, 'message', progress_message), :now
    FROM moved
    RETURNING id, job_id, seq, company_id, type, payload
)
SELECT told.id, CAST(0 AS bigint), told.seq, told.company_id, told.type, j.id AS job_id, CAST(:now AS timestamptz),
    CAST(told.payload AS text), j.cancel_requested_at IS NOT NULL
FROM f JOIN {s}content_jobs j ON j.id = f.job AND j.status = 'running' AND j.fence = f.fence
LEFT JOIN told ON told.job_id = j.id
""",
    *EVENT,
    sa.column("cancelled", sa.Boolean()),
)

RESCUE = Sql(
    """
WITH lost AS MATERIALIZED (
    SELECT id, attempt FROM {s}content_jobs j
    WHERE status = 'running' AND lease_until < clock_timestamp() AND id > :after
        AND lease_until > clock_timestamp() + make_interval(secs => :since)
        AND NOT EXISTS (SELECT FROM jsonb_to_recordset(CAST(:mine AS jsonb)) AS m(job uuid, fence bigint)
            WHERE m.job = j.id AND m.fence = j.fence)
    ORDER BY id LIMIT :limit FOR NO KEY UPDATE OF j SKIP LOCKED
), freed AS (
    UPDATE {s}content_jobs j
    SET status = CASE WHEN j.cancel_requested_at IS NOT NULL THEN 'cancelled'
            WHEN j.rescues >= :max_rescues THEN 'failed' ELSE 'queued' END,
        attempt = CASE WHEN j.cancel_requested_at IS NULL AND j.rescues < :max_rescues THEN j.attempt - 1
            ELSE j.attempt END,
        started_at = CASE WHEN j.cancel_requested_at IS NULL AND j.rescues < :max_rescues THEN NULL
            ELSE j.started_at END,
        finished_at = CASE WHEN j.cancel_requested_at IS NULL AND j.rescues < :max_rescues THEN NULL
            ELSE CAST(:now AS timestamptz) END,
        error_message = CASE WHEN j.cancel_requested_at IS NOT NULL THEN NULL
            WHEN j.rescues >= :max_rescues THEN CAST(:stopped AS text) ELSE CAST(:reason AS text) END,
        run_at = CASE WHEN j.cancel_requested_at IS NULL AND j.rescues < :max_rescues AND j.rescues + 1 >= :suspect
            THEN LEAST(j.created_at, :now) END,
        rescues = j.rescues + 1, event_seq = j.event_seq + 1, lease_until = NULL, worker_id = NULL, updated_at = :now
    FROM lost WHERE j.id = lost.id
    RETURNING j.id, j.company_id, j.event_seq, j.status, j.error_message, lost.attempt
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    SELECT company_id, id, event_seq,
        CASE status WHEN 'queued' THEN 'content_job.retrying' ELSE 'content_job.' || status END,
        CASE status WHEN 'cancelled' THEN jsonb_build_object('jobId', id)
            WHEN 'failed' THEN jsonb_build_object('jobId', id, 'errorMessage', error_message)
            ELSE jsonb_build_object('jobId', id, 'attempt', attempt, 'errorMessage', error_message,
                'runAt', CAST(:run_at AS text)) END,
        :now
    FROM freed
    RETURNING id, job_id, seq, company_id, type, payload
)
SELECT id, CAST(0 AS bigint), seq, company_id, type, job_id, CAST(:now AS timestamptz), CAST(payload AS text) FROM told
""",
    *EVENT,
    run_at=sa.Text(),
    after=sa.Uuid(),
)

FIRST_EXPIRED = Sql(
    """
SELECT id FROM {s}content_jobs WHERE status = 'running' AND lease_until < clock_timestamp() AND id > :after
ORDER BY id LIMIT 1
""",
    sa.column("id", sa.Uuid()),
    after=sa.Uuid(),
)

LEASES_OF_RUNNING = Sql(
    """
SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS float8), CAST(EXTRACT(EPOCH FROM min(lease_until)) AS float8),
    CAST(EXTRACT(EPOCH FROM max(lease_until)) AS float8)
FROM {s}content_jobs WHERE status = 'running'
""",
    *LEASES,
)

CAP_LEASES = Sql(
    """
UPDATE {s}content_jobs SET lease_until = clock_timestamp() + make_interval(secs => :lease) WHERE id IN (
    SELECT id FROM {s}content_jobs
    WHERE status = 'running' AND lease_until > clock_timestamp() + make_interval(secs => :far)
    ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
"""
)


class Jobs(base.Jobs):
    """Jobs on PostgreSQL."""

    claim_locks = False

    _companies_due, _companies, _all_companies = COMPANIES_DUE, COMPANIES, ALL_COMPANIES
    _first_queued, _has_queued = FIRST_QUEUED, HAS_QUEUED
    _claim, _claim_of, _claim_these = CLAIM, CLAIM_OF, CLAIM_THESE
    _renew, _held, _first_expired = RENEW, SELECT_HELD, FIRST_EXPIRED
    _leases, _cap_leases = LEASES_OF_RUNNING, CAP_LEASES

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        plain, once = (INSERT_JOB_NOTIFY, INSERT_JOB_ONCE_NOTIFY) if notify else (INSERT_JOB, INSERT_JOB_ONCE)
        statement = plain if values["key"] is None else once
        row = connection.execute(statement(connection), values).one_or_none()
        return None if row is None else int(row[0])

    def insert_jobs(self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool) -> int:
        statement = INSERT_JOBS_NOTIFY if notify else INSERT_JOBS
        values = {"company_id": company_id, "jobs": jobs, "now": now}
        return int(connection.execute(statement(connection), values).scalar_one())

    def finish(self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime) -> Finished:
        values = {"jobs": json.dumps(jobs), "files": json.dumps(files), "now": now}
        rows = connection.execute(FINISH(connection), values).all()
        appended = [AppendedEvent(*row[:3]) for row in rows if row.id is not None]
        locked = {row.job_id for row in rows if row.id is None}
        return Finished(appended, max((row.gone for row in rows), default=0), locked)

    def update_progress(
        self, connection: sa.Connection, jobs: Document, *, lease: float, now: datetime
    ) -> tuple[list[EventRow], list[Held]]:
        values = {"jobs": json.dumps(jobs), "lease": lease, "now": now}
        rows = connection.execute(UPDATE_PROGRESS(connection), values).all()
        events = [EventRow(*row[:-1]) for row in rows if row.id is not None]
        return events, [Held(row.job_id, row.cancelled, row.id is None) for row in rows]

    def rescue(self, connection: sa.Connection, *, terms: RescueTerms) -> list[EventRow]:
        values = {**terms._asdict(), "run_at": terms.now.isoformat()}
        return [EventRow(*row) for row in connection.execute(RESCUE(connection), values)]
