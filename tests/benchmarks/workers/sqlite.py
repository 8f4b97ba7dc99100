"""A worker on SQLite, written by hand with the standard library's sqlite3."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.workers.files import ClaimedRow, File, new_id
from tests.benchmarks.workers.loop import LEASE, drain
from tests.benchmarks.workers.report import Report

NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
# What configure_sqlite sets by default.
SETTINGS = ("PRAGMA busy_timeout = 10000", "PRAGMA synchronous = FULL", "PRAGMA journal_mode = WAL")
CLAIM = f"""
UPDATE content_jobs SET status = 'running', fence = fence + 1, attempt = attempt + 1, event_seq = event_seq + 1,
    worker_id = 'by hand', lease_until = strftime('%Y-%m-%d %H:%M:%f000', 'now', '{LEASE} seconds'),
    started_at = {NOW}, updated_at = {NOW}
WHERE id IN (
    SELECT id FROM content_jobs WHERE status = 'queued' AND run_at IS NULL
    ORDER BY company_id, priority DESC, created_at, id LIMIT ?
)
RETURNING id, company_id, input, fence, event_seq
"""
TELL = f"""
INSERT INTO content_job_events (company_id, job_id, seq, type, payload, created_at) VALUES (?, ?, ?, ?, ?, {NOW})
"""
INTEND = """
INSERT INTO asset_intents (id, company_id, provider, object_key, not_before)
VALUES (?, ?, 'local_disk', ?, strftime('%Y-%m-%d %H:%M:%f000', 'now', '1 day'))
"""
END = f"""
UPDATE content_jobs SET status = 'done', result_asset_id = ?, event_seq = event_seq + 1, lease_until = NULL,
    worker_id = NULL, finished_at = {NOW}, updated_at = {NOW}
WHERE id = ? AND status = 'running' AND fence = ?
RETURNING event_seq
"""
KEEP = f"""
INSERT INTO assets (id, company_id, provider, object_key, content_type, byte_size, sha256, original_filename, job_id,
    created_at, updated_at)
VALUES (?, ?, 'local_disk', ?, 'text/plain', ?, ?, 'note.txt', ?, {NOW}, {NOW})
"""
FORGET = "DELETE FROM asset_intents WHERE provider = 'local_disk' AND object_key = ? AND state = 'pending'"


class SqliteTables:
    """``Tables`` over a connection that commits when it is told to: sqlite3's, or one that has its methods."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        for setting in SETTINGS:
            connection.execute(setting)

    def claim(self, limit: int) -> list[ClaimedRow]:
        with self._transaction() as connection:
            rows = connection.execute(CLAIM, (limit,)).fetchall()
            events = [
                (company, job, seq, "content_job.running", json.dumps({"jobId": str(uuid.UUID(job))}))
                for job, company, _, _, seq in rows
            ]
            connection.executemany(TELL, events)
        return [
            ClaimedRow(uuid.UUID(job), company, json.loads(given)["n"], fence) for job, company, given, fence, _ in rows
        ]

    def intend(self, files: Sequence[File]) -> None:
        with self._transaction() as connection:
            connection.executemany(INTEND, [(new_id().hex, file.job.company_id, file.key) for file in files])

    def finish(self, files: Sequence[File]) -> None:
        with self._transaction() as connection:
            won: list[tuple[File, int]] = []
            for file in files:
                row = connection.execute(END, (file.asset_id.hex, file.job.job_id.hex, file.job.fence)).fetchone()
                won += [] if row is None else [(file, row[0])]
            connection.executemany(FORGET, [(file.key,) for file, _ in won])
            connection.executemany(KEEP, [_asset(file) for file, _ in won])
            connection.executemany(TELL, [_done(file, seq) for file, seq in won])

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self._connection
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def _asset(file: File) -> tuple[Any, ...]:
    return file.asset_id.hex, file.job.company_id, file.key, file.size, file.sha256, file.job.job_id.hex


def _done(file: File, seq: int) -> tuple[Any, ...]:
    payload = json.dumps({"jobId": str(file.job.job_id), "assetId": str(file.asset_id)})
    return file.job.company_id, file.job.job_id.hex, seq, "content_job.done", payload


def work(url: str, root: Path, jobs: int, report: Report) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
        drain(SqliteTables(connection), root, jobs, report)
