"""The statements for PostgreSQL, written out."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from jobkit._dialects.base import (
    CLAIMED,
    DUE,
    EVENT,
    HELD,
    JOB_PARAMETERS,
    MANY_PARAMETERS,
    TOLD,
    WAITING,
    Sql,
)
from jobkit.columns import UtcDateTime

_INSERT = """
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
# One notification without a payload: PostgreSQL folds equal ones of a transaction into one, and it is only a hint.
_NOTIFY = "SELECT id, pg_notify('jobkit', '') FROM told"
INSERT_NOTIFY = Sql(_INSERT.replace("{unless}", "") + _NOTIFY, **JOB_PARAMETERS)
INSERT = Sql(_INSERT.replace("{unless}", "") + "SELECT id FROM told", **JOB_PARAMETERS)
INSERT_ONCE_NOTIFY = Sql(_INSERT.replace("{unless}", _UNLESS) + _NOTIFY, **JOB_PARAMETERS)
INSERT_ONCE = Sql(_INSERT.replace("{unless}", _UNLESS) + "SELECT id FROM told", **JOB_PARAMETERS)

_INSERT_MANY = """
WITH r AS (
    SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb))
    AS r(id uuid, type text, input jsonb, task text, run_at timestamptz, priority int)
), job AS (
    INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, run_at, priority, event_seq,
        created_at, updated_at)
    SELECT id, :company_id, type, input, task, run_at, priority, 1, :now, :now FROM r
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    SELECT :company_id, id, 1, 'content_job.queued', jsonb_build_object('jobId', id), :now FROM r
)
"""
INSERT_MANY_NOTIFY = Sql(_INSERT_MANY + "SELECT pg_notify('jobkit', '')", **MANY_PARAMETERS)
INSERT_MANY = Sql(_INSERT_MANY + "SELECT 1", **MANY_PARAMETERS)

APPEND = Sql(
    """
INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
VALUES (:company_id, :job_id, :seq, :type, CAST(:payload AS jsonb), :now)
RETURNING id
""",
    company_id=sa.Text(),
    job_id=sa.Uuid(),
    seq=sa.Integer(),
    type=sa.Text(),
    payload=sa.Text(),
    now=UtcDateTime(),
)

# Each way to pick jobs ends in the same claim. MATERIALIZED fixes the candidates: as a plain subquery, one plan claims
# more rows than LIMIT says.
_CLAIM = """, claimed AS (
    UPDATE {s}content_jobs j
    SET status = 'running', fence = j.fence + 1, attempt = j.attempt + 1, event_seq = j.event_seq + 1,
        worker_id = :worker_id, lease_until = clock_timestamp() + make_interval(secs => :lease),
        started_at = :now, updated_at = :now
    FROM picked WHERE j.id = picked.id
    RETURNING j.id, j.company_id, j.job_type, j.input, j.source_task_id, j.fence, j.attempt, j.event_seq
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    SELECT company_id, id, event_seq, 'content_job.running', jsonb_build_object('jobId', id), :now FROM claimed
    RETURNING id, job_id
)
SELECT claimed.*, told.id AS event_id FROM claimed JOIN told ON told.job_id = claimed.id
"""
_CLAIM_PARAMETERS: dict[str, Any] = {
    "limit": sa.Integer(),
    "worker_id": sa.Text(),
    "lease": sa.Float(),
    "now": UtcDateTime(),
}

CLAIM = Sql(
    """
WITH picked AS MATERIALIZED (
    SELECT id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL
    ORDER BY company_id, priority DESC, created_at, id LIMIT :limit FOR UPDATE SKIP LOCKED
)"""
    + _CLAIM,
    *CLAIMED,
    **_CLAIM_PARAMETERS,
)

CLAIM_OF = Sql(
    """
WITH picked AS MATERIALIZED (
    SELECT x.id FROM jsonb_array_elements_text(CAST(:companies AS jsonb)) AS c(company) CROSS JOIN LATERAL (
        SELECT id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL AND company_id = c.company
        ORDER BY company_id, priority DESC, created_at, id LIMIT :each FOR UPDATE SKIP LOCKED
    ) x LIMIT :limit
)"""
    + _CLAIM,
    *CLAIMED,
    **_CLAIM_PARAMETERS,
    companies=sa.Text(),
    each=sa.Integer(),
)

CLAIM_THESE = Sql(
    """
WITH picked AS MATERIALIZED (
    SELECT j.id FROM jsonb_array_elements_text(CAST(:ids AS jsonb)) WITH ORDINALITY AS w(id, n)
    JOIN {s}content_jobs j ON j.id = CAST(w.id AS uuid)
    WHERE j.status = 'queued' AND (j.run_at IS NULL OR j.run_at <= :now)
    ORDER BY w.n LIMIT :limit FOR UPDATE OF j SKIP LOCKED
)"""
    + _CLAIM,
    *CLAIMED,
    **_CLAIM_PARAMETERS,
    ids=sa.Text(),
)

# One look at each priority, however many jobs wait for a later time.
_LEVELS = """
WITH RECURSIVE level(priority) AS (
    (SELECT priority FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NOT NULL
        ORDER BY priority DESC, run_at, id LIMIT 1)
  UNION ALL
    SELECT (SELECT priority FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND priority < level.priority
        ORDER BY priority DESC, run_at, id LIMIT 1)
    FROM level WHERE level.priority IS NOT NULL
)"""

DUE_JOBS = Sql(
    _LEVELS
    + """, turn AS (
    SELECT x.*, row_number() OVER (PARTITION BY x.company_id ORDER BY x.priority DESC, x.run_at, x.id) AS n
    FROM level CROSS JOIN LATERAL (
        SELECT id, company_id, priority, run_at FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND priority = level.priority AND run_at <= :now
        ORDER BY priority DESC, run_at, id LIMIT :window
    ) x
)
SELECT id, company_id, priority, run_at FROM turn ORDER BY n, priority DESC, run_at, id LIMIT :limit
""",
    *WAITING,
    window=sa.Integer(),
    limit=sa.Integer(),
    now=UtcDateTime(),
)

HEADS = Sql(
    """
SELECT x.* FROM jsonb_array_elements_text(CAST(:companies AS jsonb)) AS c(company) CROSS JOIN LATERAL (
    SELECT id, company_id, priority, created_at FROM {s}content_jobs
    WHERE status = 'queued' AND run_at IS NULL AND company_id = c.company
    ORDER BY company_id, priority DESC, created_at, id LIMIT :each
) x
""",
    *WAITING,
    companies=sa.Text(),
    each=sa.Integer(),
)

COMPANIES = Sql(
    """
WITH RECURSIVE c(company_id, n) AS (
    (SELECT company_id, 1 FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL ORDER BY company_id LIMIT 1)
  UNION ALL
    SELECT (SELECT company_id FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NULL AND company_id > c.company_id ORDER BY company_id LIMIT 1), c.n + 1
    FROM c WHERE c.company_id IS NOT NULL AND c.n < :limit
)
SELECT company_id FROM c WHERE company_id IS NOT NULL
""",
    limit=sa.Integer(),
)

INTEND = Sql(
    """
INSERT INTO {s}asset_intents (id, company_id, provider, object_key, not_before)
SELECT id, company, provider, key, clock_timestamp() + make_interval(secs => :grace)
FROM jsonb_to_recordset(CAST(:intents AS jsonb)) AS i(id uuid, company text, provider text, key text)
ON CONFLICT (provider, object_key) DO NOTHING
""",
    intents=sa.Text(),
    grace=sa.Float(),
)

# A key belongs to its row's company alone, so the company is part of the match: it is what the index begins with. And
# clock_timestamp(), which may change between two rows, cannot be compared by index.
_SWEEPABLE = """i.provider = :provider AND i.state = :state
    AND i.not_before <= statement_timestamp() + make_interval(secs => :early)
    AND NOT EXISTS (
        SELECT FROM {s}assets a
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
    early=sa.Float(),
    after=UtcDateTime(),
    limit=sa.Integer(),
)

# As an array the keys are looked up one by one; as a join, one plan compares each with every key of the provider.
_KEYS = "ANY (ARRAY(SELECT jsonb_array_elements_text(CAST(:keys AS jsonb))))"
# SKIP LOCKED leaves out a key that another sweep, or the transaction that gives it its row, is at just now.
CLAIM_INTENTS = Sql(
    f"""
WITH due AS MATERIALIZED (
    SELECT i.object_key FROM {{s}}asset_intents i
    WHERE i.object_key = {_KEYS} AND {_SWEEPABLE}
    FOR UPDATE OF i SKIP LOCKED
)
UPDATE {{s}}asset_intents i SET state = 'collected', not_before = clock_timestamp() + make_interval(secs => :hold)
FROM due WHERE i.provider = :provider AND i.object_key = due.object_key
RETURNING i.object_key
""",
    sa.column("object_key", sa.Text()),
    keys=sa.Text(),
    provider=sa.Text(),
    state=sa.Text(),
    early=sa.Float(),
    hold=sa.Float(),
)

DROP_INTENTS = Sql(
    f"DELETE FROM {{s}}asset_intents WHERE provider = :provider AND object_key = {_KEYS} AND state = 'collected'",
    keys=sa.Text(),
    provider=sa.Text(),
)

POSTPONE_INTENTS = Sql(
    f"""
UPDATE {{s}}asset_intents i
SET state = 'tombstone', attempts = i.attempts + 1, last_error = f.error,
    not_before = clock_timestamp() + make_interval(secs => 60 << least(i.attempts, 10))
FROM jsonb_to_recordset(CAST(:failures AS jsonb)) AS f(key text, error text)
WHERE i.provider = :provider AND i.object_key = f.key AND i.object_key = {_KEYS} AND i.state = 'collected'
""",
    failures=sa.Text(),
    keys=sa.Text(),
    provider=sa.Text(),
)

FINISH = Sql(
    """
WITH f AS (
    SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb))
    AS f(job uuid, fence bigint, status text, asset uuid, error text, type text, payload jsonb, run_at timestamptz,
         refund int)
), a AS (
    SELECT * FROM jsonb_to_recordset(CAST(:files AS jsonb))
    AS a(id uuid, job uuid, company text, provider text, key text, content_type text, size bigint, sha256 text,
         filename text, task text, position int)
), won AS (
    UPDATE {s}content_jobs j
    SET status = f.status, result_asset_id = f.asset, error_message = f.error, event_seq = j.event_seq + 1,
        lease_until = NULL, worker_id = NULL, attempt = j.attempt - f.refund, updated_at = :now,
        run_at = CASE f.status WHEN 'queued' THEN f.run_at ELSE j.run_at END,
        started_at = CASE f.status WHEN 'queued' THEN NULL ELSE j.started_at END,
        finished_at = CASE f.status WHEN 'queued' THEN NULL ELSE CAST(:now AS timestamptz) END
    FROM f WHERE j.id = f.job AND j.status = 'running' AND j.fence = f.fence
        AND (f.status <> 'queued' OR j.cancel_requested_at IS NULL)
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
""",
    *TOLD,
    sa.column("gone", sa.BigInteger()),
    jobs=sa.Text(),
    files=sa.Text(),
    now=UtcDateTime(),
)

RENEW = Sql(
    """
UPDATE {s}content_jobs j SET lease_until = clock_timestamp() + make_interval(secs => :lease)
FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, fence bigint)
WHERE j.id = f.job AND j.status = 'running' AND j.fence = f.fence
RETURNING j.id, j.cancel_requested_at IS NOT NULL
""",
    *HELD,
    jobs=sa.Text(),
    lease=sa.Float(),
)

LOOK = Sql(
    """
SELECT j.id, j.cancel_requested_at IS NOT NULL
FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, fence bigint)
JOIN {s}content_jobs j ON j.id = f.job AND j.status = 'running' AND j.fence = f.fence
""",
    *HELD,
    jobs=sa.Text(),
)

RESCUE = Sql(
    """
WITH lost AS MATERIALIZED (
    SELECT id, attempt FROM {s}content_jobs WHERE status = 'running' AND lease_until < clock_timestamp()
    ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
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
        rescues = j.rescues + 1, event_seq = j.event_seq + 1, run_at = NULL, lease_until = NULL, worker_id = NULL,
        updated_at = :now
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
SELECT id, CAST(0 AS bigint), seq, company_id, type, job_id, CAST(:now AS timestamptz), payload FROM told
""",
    *EVENT,
    limit=sa.Integer(),
    max_rescues=sa.Integer(),
    stopped=sa.Text(),
    reason=sa.Text(),
    run_at=sa.Text(),
    now=UtcDateTime(),
)

EXPIRED = Sql(
    "SELECT EXISTS (SELECT FROM {s}content_jobs WHERE status = 'running' AND lease_until < clock_timestamp())"
)

START = Sql("SELECT CAST(CAST(pg_snapshot_xmin(s) AS text) AS bigint), CAST(s AS text) FROM pg_current_snapshot() AS s")

_HORIZON = "CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)"
_SINCE_START = "NOT pg_visible_in_snapshot(CAST(CAST(xid AS text) AS xid8), CAST(:snapshot AS pg_snapshot))"
# Ids become visible out of order, transaction ids below every running transaction's do not: (xid, id) skips nothing.
SCAN = Sql(
    f"""
SELECT h.horizon, e.* FROM (SELECT {_HORIZON} AS horizon) h LEFT JOIN LATERAL (
    SELECT id, xid, seq, company_id, type, job_id, created_at, payload FROM {{s}}content_job_events
    WHERE (xid, id) > (:xid, :id) AND xid < h.horizon AND {_SINCE_START}
    ORDER BY xid, id LIMIT :limit
) e ON true
ORDER BY e.xid, e.id
""",
    sa.column("horizon", sa.BigInteger()),
    *EVENT,
    xid=sa.BigInteger(),
    id=sa.BigInteger(),
    snapshot=sa.Text(),
    limit=sa.Integer(),
)

# A job's row lock orders its transactions, so all events below a committed one are committed too.
EARLIER = Sql(
    f"""
SELECT e.id, e.xid, e.seq, e.company_id, e.type, e.job_id, e.created_at, e.payload
FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, seq int, queued boolean)
JOIN {{s}}content_job_events e ON e.job_id = f.job AND e.seq < f.seq
WHERE (e.xid, e.id) > (:xid, :id) AND {_SINCE_START}
    OR f.queued AND e.seq = f.seq - 1 AND e.type = 'content_job.queued'
ORDER BY e.job_id, e.seq
""",
    *EVENT,
    jobs=sa.Text(),
    xid=sa.BigInteger(),
    id=sa.BigInteger(),
    snapshot=sa.Text(),
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
