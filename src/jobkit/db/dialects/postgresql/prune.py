"""Deleting old jobs that are over, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.base import MARK, PRUNED, PruneCounts, these
from jobkit.db.dialects.position import Position
from jobkit.db.dialects.postgresql.moves import BASE
from jobkit.db.dialects.sql import OVER, Sql

_JOBS = "ANY (ARRAY(SELECT CAST(jsonb_array_elements_text(CAST(:jobs AS jsonb)) AS uuid)))"
_ID = sa.column("id", sa.Uuid())

# One page of the table by its key: it reads a bounded number of rows, however few jobs are over.
ENDED_BEFORE = Sql(
    f"""
WITH page AS MATERIALIZED (
    SELECT id, {OVER} AS over FROM {{s}}content_jobs WHERE id > :after ORDER BY id LIMIT :limit
)
SELECT id, over FROM page WHERE over OR id = (SELECT id FROM page ORDER BY id DESC LIMIT 1) ORDER BY id
""",
    _ID,
    sa.column("over", sa.Boolean()),
    after=sa.Uuid(),
)

COUNT_RELATED = Sql(
    f"""
SELECT (SELECT count(*) FROM {{s}}content_job_events WHERE job_id = {_JOBS}),
    (SELECT count(*) FROM {{s}}assets WHERE job_id = {_JOBS} AND provider = :provider)
"""
)

LOCK_JOBS = Sql(f"SELECT id FROM {{s}}content_jobs WHERE id = {_JOBS} AND {OVER} FOR UPDATE SKIP LOCKED", _ID)

# The jobs with an asset that another transaction is changing: to wait for it could deadlock with a host.
SELECT_BUSY = Sql(
    f"""
WITH held AS MATERIALIZED (
    SELECT id FROM {{s}}assets WHERE job_id = {_JOBS} AND provider = :provider FOR UPDATE SKIP LOCKED
)
SELECT DISTINCT job_id AS id FROM {{s}}assets
WHERE job_id = {_JOBS} AND provider = :provider AND id NOT IN (SELECT id FROM held)
""",
    _ID,
)

# A statement of its own, after the locks: it sees every event that was committed before them.
DELETE = Sql(
    f"""
WITH gone AS (
    DELETE FROM {{s}}content_jobs WHERE id = {_JOBS}
), told AS (
    DELETE FROM {{s}}content_job_events WHERE job_id = {_JOBS} RETURNING COALESCE(xid, 0) + {BASE} AS xid, id
), files AS (
    DELETE FROM {{s}}assets WHERE job_id = {_JOBS} AND provider = :provider
    RETURNING company_id, provider, object_key
), buried AS (
    INSERT INTO {{s}}asset_intents (id, company_id, provider, object_key, state, not_before)
    SELECT gen_random_uuid(), company_id, provider, object_key, 'tombstone', now() FROM files
    ON CONFLICT (provider, object_key) DO NOTHING
)
SELECT (SELECT count(*) FROM told), (SELECT count(*) FROM files), last.xid, last.id
FROM (SELECT) AS one LEFT JOIN (SELECT xid, id FROM told ORDER BY xid DESC, id DESC LIMIT 1) AS last ON true
"""
)

MARK_PRUNED = Sql(
    f"""
INSERT INTO {{s}}content_job_events AS e (id, xid, company_id, job_id, seq, type, payload)
VALUES (0, 0, '', '{MARK}', 0, '{PRUNED}',
    jsonb_build_object('xid', CAST(:xid AS bigint), 'id', CAST(:id AS bigint)))
ON CONFLICT (job_id, seq) DO UPDATE SET payload = excluded.payload
WHERE (CAST(e.payload->>'xid' AS bigint), CAST(e.payload->>'id' AS bigint)) < (:xid, :id)
"""
)


class Prune(base.Prune):
    """Pruning on PostgreSQL."""

    one_writer = False

    _ended_before, _count_related, _mark_pruned = ENDED_BEFORE, COUNT_RELATED, MARK_PRUNED

    def prune(
        self, connection: sa.Connection, jobs: Sequence[UUID], *, before: datetime, provider: str | None
    ) -> PruneCounts:
        locked = list(connection.execute(LOCK_JOBS(connection), these(jobs, before=before)).scalars())
        if provider is not None:
            busy = set(connection.execute(SELECT_BUSY(connection), these(locked, provider=provider)).scalars())
            locked = [job for job in locked if job not in busy]
        events, files, *upto = connection.execute(DELETE(connection), these(locked, provider=provider)).one()
        if events:
            # Last, because other prunes wait for this row.
            self.mark_pruned(connection, Position(*upto))
        return PruneCounts(locked, events, files)
