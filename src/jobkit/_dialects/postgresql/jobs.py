"""Creating jobs, on PostgreSQL."""

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


class Jobs:
    """``jobkit._dialects.base.JobStatements`` for PostgreSQL."""

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        plain, once = (INSERT_NOTIFY, INSERT_ONCE_NOTIFY) if notify else (INSERT, INSERT_ONCE)
        statement = plain if values["key"] is None else once
        row = connection.execute(statement(connection), values).one_or_none()
        return None if row is None else int(row[0])

    def insert_jobs(
        self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool
    ) -> None:
        statement = INSERT_MANY_NOTIFY if notify else INSERT_MANY
        connection.execute(statement(connection), {"company_id": company_id, "jobs": jobs, "now": now})
