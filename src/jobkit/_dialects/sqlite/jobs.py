"""Creating jobs, on SQLite."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from jobkit._dialects.base import (
    JOB_PARAMETERS,
    MANY_PARAMETERS,
    Sql,
)
from jobkit._dialects.sqlite.events import append

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
