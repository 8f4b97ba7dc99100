"""The statements for SQLite, written out."""

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
from jobkit.columns import SQLITE_NOW, SQLITE_TIME, UtcDateTime

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

_ENDED = (sa.column("id", sa.Uuid()), sa.column("company_id", sa.Text()), sa.column("event_seq", sa.Integer()))
_IN_SECONDS = f"strftime({SQLITE_TIME}, 'now', :{{}} || ' seconds')"

# Each way to pick jobs ends in the same claim.
_CLAIM = f"""
UPDATE {{s}}content_jobs
SET status = 'running', fence = fence + 1, attempt = attempt + 1, event_seq = event_seq + 1, worker_id = :worker_id,
    lease_until = {_IN_SECONDS.format("lease")}, started_at = :now, updated_at = :now
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

HEADS = Sql(
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
    attempt = attempt - json_extract(f.value, '$.refund'), updated_at = :now,
    run_at = CASE json_extract(f.value, '$.status') WHEN 'queued' THEN substr(json_extract(f.value, '$.run_at'), 1, 26)
        ELSE run_at END,
    started_at = CASE json_extract(f.value, '$.status') WHEN 'queued' THEN NULL ELSE started_at END,
    finished_at = CASE json_extract(f.value, '$.status') WHEN 'queued' THEN NULL ELSE :now END
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

_HOLDS = """
{s}content_jobs.id = json_extract(f.value, '$.job') AND {s}content_jobs.status = 'running'
    AND fence = json_extract(f.value, '$.fence')
"""

# Not IS NOT NULL: in RETURNING after UPDATE FROM, SQLite 3.40 answers that with true whatever the column holds.
RENEW = Sql(
    f"""
UPDATE {{s}}content_jobs SET lease_until = {_IN_SECONDS.format("lease")}
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
