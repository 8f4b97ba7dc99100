"""PostgreSQL 14 and newer: every step is one statement, because a round trip costs more than anything in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

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
from jobkit.columns import UtcDateTime

_INSERT = """
WITH job AS (
    INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, event_seq, created_at, updated_at)
    VALUES (:id, :company_id, :job_type, CAST(:input AS jsonb), :source_task_id, 1, :now, :now)
), told AS (
    INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
    VALUES (:company_id, :id, 1, 'content_job.queued', CAST(:payload AS jsonb), :now)
    RETURNING id
)
"""
# One notification without a payload: PostgreSQL folds equal ones of a transaction into one, and it is only a hint.
INSERT_NOTIFY = Sql(_INSERT + "SELECT id, pg_notify('jobkit', '') FROM told", **JOB_PARAMETERS)
INSERT = Sql(_INSERT + "SELECT id FROM told", **JOB_PARAMETERS)

_INSERT_MANY = """
WITH r AS (
    SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS r(id uuid, type text, input jsonb, task text)
), job AS (
    INSERT INTO {s}content_jobs (id, company_id, job_type, input, source_task_id, event_seq, created_at, updated_at)
    SELECT id, :company_id, type, input, task, 1, :now, :now FROM r
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

# MATERIALIZED fixes the candidates: as a plain subquery, one plan claims more rows than LIMIT says.
CLAIM = Sql(
    """
WITH picked AS MATERIALIZED (
    SELECT id FROM {s}content_jobs WHERE status = 'queued'
    ORDER BY priority DESC, created_at, id LIMIT :limit FOR UPDATE SKIP LOCKED
), claimed AS (
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
""",
    *CLAIMED,
    limit=sa.Integer(),
    worker_id=sa.Text(),
    lease=sa.Float(),
    now=UtcDateTime(),
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
    AS f(job uuid, fence bigint, status text, asset uuid, error text, type text, payload jsonb)
), a AS (
    SELECT * FROM jsonb_to_recordset(CAST(:files AS jsonb))
    AS a(id uuid, job uuid, company text, provider text, key text, content_type text, size bigint, sha256 text,
         filename text, task text, position int)
), won AS (
    UPDATE {s}content_jobs j
    SET status = f.status, result_asset_id = f.asset, error_message = f.error, event_seq = j.event_seq + 1,
        lease_until = NULL, worker_id = NULL, finished_at = :now, updated_at = :now
    FROM f WHERE j.id = f.job AND j.status = 'running' AND j.fence = f.fence
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

RELEASE = Sql(
    """
WITH f AS (
    SELECT * FROM jsonb_to_recordset(CAST(:jobs AS jsonb)) AS f(job uuid, fence bigint)
), freed AS (
    UPDATE {s}content_jobs j
    SET status = 'queued', attempt = j.attempt - 1, event_seq = j.event_seq + 1, lease_until = NULL, worker_id = NULL,
        started_at = NULL, updated_at = :now
    FROM f WHERE j.id = f.job AND j.status = 'running' AND j.fence = f.fence
    RETURNING j.id, j.company_id, j.event_seq
)
INSERT INTO {s}content_job_events (company_id, job_id, seq, type, payload, created_at)
SELECT company_id, id, event_seq, 'content_job.queued', jsonb_build_object('jobId', id), :now FROM freed
RETURNING job_id, id, seq
""",
    *TOLD,
    jobs=sa.Text(),
    now=UtcDateTime(),
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

HAS_QUEUED = Sql("SELECT EXISTS (SELECT FROM {s}content_jobs WHERE status = 'queued')")


class Postgresql:
    """``jobkit._dialects.base.Statements`` for PostgreSQL."""

    claim_locks = False

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int:
        statement = INSERT_NOTIFY if notify else INSERT
        return int(connection.execute(statement(connection), values).one()[0])

    def insert_jobs(
        self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool
    ) -> None:
        statement = INSERT_MANY_NOTIFY if notify else INSERT_MANY
        connection.execute(statement(connection), {"company_id": company_id, "jobs": jobs, "now": now})

    def append_event(self, connection: sa.Connection, values: Mapping[str, Any]) -> int:
        return int(connection.execute(APPEND(connection), values).scalar_one())

    def claim(
        self, connection: sa.Connection, *, limit: int, worker_id: str, lease: float, now: datetime
    ) -> list[Claimed]:
        values = {"limit": limit, "worker_id": worker_id, "lease": lease, "now": now}
        return [Claimed(*row) for row in connection.execute(CLAIM(connection), values)]

    def has_queued(self, connection: sa.Connection) -> bool:
        return bool(connection.execute(HAS_QUEUED(connection)).scalar())

    def record_intents(self, connection: sa.Connection, intents: Document, *, grace: float) -> None:
        connection.execute(INTEND(connection), {"intents": json.dumps(intents), "grace": grace})

    def due_intents(
        self, connection: sa.Connection, *, provider: str, state: str, early: float, after: datetime, limit: int
    ) -> Iterator[Due]:
        values = {"provider": provider, "state": state, "early": early, "after": after, "limit": limit}
        for row in connection.execute(DUE_INTENTS(connection), values):
            yield Due(*row)

    def claim_intents(
        self, connection: sa.Connection, keys: Sequence[str], *, provider: str, state: str, early: float, hold: float
    ) -> list[str]:
        values = {"keys": json.dumps(keys), "provider": provider, "state": state, "early": early, "hold": hold}
        return list(connection.execute(CLAIM_INTENTS(connection), values).scalars())

    def drop_intents(self, connection: sa.Connection, keys: Sequence[str], *, provider: str) -> None:
        connection.execute(DROP_INTENTS(connection), {"keys": json.dumps(keys), "provider": provider})

    def postpone_intents(self, connection: sa.Connection, failures: Document, *, provider: str) -> None:
        keys = json.dumps([failure["key"] for failure in failures])
        values = {"failures": json.dumps(failures), "keys": keys, "provider": provider}
        connection.execute(POSTPONE_INTENTS(connection), values)

    def finish(
        self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime
    ) -> tuple[list[Told], int]:
        values = {"jobs": json.dumps(jobs), "files": json.dumps(files), "now": now}
        rows = connection.execute(FINISH(connection), values).all()
        return [Told(*row[:3]) for row in rows], rows[0].gone if rows else 0

    def release(self, connection: sa.Connection, jobs: Document, *, now: datetime) -> list[Told]:
        rows = connection.execute(RELEASE(connection), {"jobs": json.dumps(jobs), "now": now})
        return [Told(*row) for row in rows]

    def start(self, connection: sa.Connection) -> Start:
        xmin, snapshot = connection.execute(START(connection)).one()
        return Start(Position(xmin, 0), snapshot)

    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        values = {"xid": after.xid, "id": after.id, "snapshot": start.snapshot, "limit": limit}
        rows = connection.execute(SCAN(connection), values).all()
        events = [EventRow(*row[1:]) for row in rows if row[1] is not None]
        if len(events) == limit:
            return events, Position(events[-1].xid, events[-1].id)
        return events, max(after, Position(rows[0].horizon, 0))

    def earlier(self, connection: sa.Connection, after: Position, start: Start, jobs: Document) -> Sequence[EventRow]:
        values = {"jobs": json.dumps(jobs), "xid": after.xid, "id": after.id, "snapshot": start.snapshot}
        return [EventRow(*row) for row in connection.execute(EARLIER(connection), values)]
