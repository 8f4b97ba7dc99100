"""Deleting old jobs that are over, on SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.base import MARK, PRUNED, PruneCounts, these
from jobkit.db.dialects.position import Position
from jobkit.db.dialects.sql import OVER, Sql
from jobkit.tables import SQLITE_NOW

_JOBS = "IN (SELECT value FROM json_each(:jobs))"
_ID = sa.column("id", sa.Uuid())

# One page of the table by its key: it reads a bounded number of rows, however few jobs are over.
ENDED_BEFORE = Sql(
    f"""
WITH page AS MATERIALIZED (
    SELECT id, {OVER} AS over FROM {{s}}content_jobs WHERE id > :after ORDER BY id LIMIT :limit
)
SELECT id, over FROM page WHERE over OR id = (SELECT max(id) FROM page) ORDER BY id
""",
    _ID,
    sa.column("over", sa.Boolean()),
    after=sa.Uuid(),
)

COUNT_RELATED = Sql(
    f"""
SELECT (SELECT count(*) FROM {{s}}content_job_events WHERE job_id {_JOBS}),
    (SELECT count(*) FROM {{s}}assets WHERE job_id {_JOBS} AND provider = :provider)
"""
)

# The first statement: being a write, it takes the lock, and nobody else changes anything after it.
DELETE_JOBS = Sql(f"DELETE FROM {{s}}content_jobs WHERE id {_JOBS} AND {OVER} RETURNING id", _ID)

COUNT_EVENTS = Sql(f"SELECT count(*), max(id) FROM {{s}}content_job_events WHERE job_id {_JOBS}")
DELETE_EVENTS = Sql(f"DELETE FROM {{s}}content_job_events WHERE job_id {_JOBS}")

INSERT_TOMBSTONES = Sql(
    f"""
INSERT INTO {{s}}asset_intents (id, company_id, provider, object_key, state, not_before)
SELECT lower(hex(randomblob(16))), company_id, provider, object_key, 'tombstone', {SQLITE_NOW}
FROM {{s}}assets WHERE job_id {_JOBS} AND provider = :provider
ON CONFLICT (provider, object_key) DO NOTHING
"""
)
DELETE_ASSETS = Sql(f"DELETE FROM {{s}}assets WHERE job_id {_JOBS} AND provider = :provider")

MARK_PRUNED = Sql(
    f"""
INSERT INTO {{s}}content_job_events (id, company_id, job_id, seq, type, payload)
VALUES (0, '', '{MARK.hex}', 0, '{PRUNED}', json_object('xid', 0, 'id', :id))
ON CONFLICT (job_id, seq) DO UPDATE SET payload = excluded.payload
WHERE json_extract(payload, '$.id') < :id
"""
)


class Prune(base.Prune):
    """Pruning on SQLite."""

    one_writer = True

    _ended_before, _count_related, _mark_pruned = ENDED_BEFORE, COUNT_RELATED, MARK_PRUNED

    def prune(
        self, connection: sa.Connection, jobs: Sequence[UUID], *, before: datetime, provider: str | None
    ) -> PruneCounts:
        gone = list(connection.execute(DELETE_JOBS(connection), these(jobs, before=before)).scalars())
        theirs, files = these(gone), 0
        events, upto = connection.execute(COUNT_EVENTS(connection), theirs).one()
        if events:
            connection.execute(DELETE_EVENTS(connection), theirs)
            self.mark_pruned(connection, Position(0, upto))
        if provider is not None:
            connection.execute(INSERT_TOMBSTONES(connection), {**theirs, "provider": provider})
            files = connection.execute(DELETE_ASSETS(connection), {**theirs, "provider": provider}).rowcount
        return PruneCounts(gone, events, files)
