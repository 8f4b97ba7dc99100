"""A worker on PostgreSQL, written by hand with SQLAlchemy Core, through psycopg."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from tests.benchmarks.workers.files import ClaimedRow, File, new_id
from tests.benchmarks.workers.loop import LEASE, drain
from tests.benchmarks.workers.report import Report

# A scalar subquery, so that it is called once a statement.
NOTIFY = "(SELECT pg_notify('jobkit_log', ''))"
CLAIM = sa.text(f"""
WITH picked AS MATERIALIZED (
    SELECT id FROM content_jobs WHERE status = 'queued' AND run_at IS NULL
    ORDER BY company_id, priority DESC, created_at, id LIMIT :limit FOR UPDATE SKIP LOCKED
), claimed AS (
    UPDATE content_jobs j SET status = 'running', fence = fence + 1, attempt = attempt + 1, event_seq = event_seq + 1,
        worker_id = 'by hand', lease_until = now() + interval '{LEASE} seconds', started_at = now(), updated_at = now()
    FROM picked WHERE j.id = picked.id
    RETURNING j.id, j.company_id, j.input, j.fence, j.event_seq
), told AS (
    INSERT INTO content_job_events (company_id, job_id, seq, type, payload)
    SELECT company_id, id, event_seq, 'content_job.running', jsonb_build_object('jobId', id) FROM claimed
)
SELECT id, company_id, input, fence, {NOTIFY} FROM claimed
""")
INTEND = sa.text("""
INSERT INTO asset_intents (id, company_id, provider, object_key, not_before)
SELECT id, company, 'local_disk', key, now() + interval '1 day'
FROM jsonb_to_recordset(CAST(:intents AS jsonb)) AS i(id uuid, company text, key text)
""")
FINISH = sa.text(f"""
WITH f AS (
    SELECT * FROM jsonb_to_recordset(CAST(:files AS jsonb))
    AS f(job uuid, fence bigint, asset uuid, key text, size bigint, sha256 text)
), won AS (
    UPDATE content_jobs j SET status = 'done', result_asset_id = f.asset, event_seq = event_seq + 1,
        lease_until = NULL, worker_id = NULL, finished_at = now(), updated_at = now()
    FROM f WHERE j.id = f.job AND j.status = 'running' AND j.fence = f.fence
    RETURNING j.id, j.company_id, j.event_seq, f.asset, f.key, f.size, f.sha256
), gone AS (
    DELETE FROM asset_intents i USING won
    WHERE i.provider = 'local_disk' AND i.object_key = won.key AND i.state = 'pending'
), kept AS (
    INSERT INTO assets (id, company_id, provider, object_key, content_type, byte_size, sha256, original_filename,
        job_id)
    SELECT asset, company_id, 'local_disk', key, 'text/plain', size, sha256, 'note.txt', id FROM won
), told AS (
    INSERT INTO content_job_events (company_id, job_id, seq, type, payload)
    SELECT company_id, id, event_seq, 'content_job.done', jsonb_build_object('jobId', id, 'assetId', asset) FROM won
)
SELECT {NOTIFY}
""")


class CoreTables:
    """``Tables`` on PostgreSQL."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def claim(self, limit: int) -> list[ClaimedRow]:
        with self._connection.begin():
            rows = self._connection.execute(CLAIM, {"limit": limit}).all()
        return [ClaimedRow(row.id, row.company_id, row.input["n"], row.fence) for row in rows]

    def intend(self, files: Sequence[File]) -> None:
        intents = [{"id": new_id().hex, "company": file.job.company_id, "key": file.key} for file in files]
        with self._connection.begin():
            self._connection.execute(INTEND, {"intents": json.dumps(intents)})

    def finish(self, files: Sequence[File]) -> None:
        rows = [
            {"job": file.job.job_id.hex, "fence": file.job.fence, "asset": file.asset_id.hex, "key": file.key}
            | {"size": file.size, "sha256": file.sha256}
            for file in files
        ]
        with self._connection.begin():
            self._connection.execute(FINISH, {"files": json.dumps(rows)})


def work(url: str, root: Path, jobs: int, report: Report) -> None:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        drain(CoreTables(connection), root, jobs, report)
    engine.dispose()
