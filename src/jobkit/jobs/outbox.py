"""The event log: every change of a job appends its event in the same transaction."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from jobkit.db.dialects import statements_for
from jobkit.types import Job, JobStatus


def append(connection: sa.Connection, job: Job, *, notify: bool) -> int:
    """Append the event of the status that ``job`` was just given, in the caller's transaction; return its id.

    ``notify``: hint at it to other processes when the transaction commits, where the database can.
    """
    values = {
        "company_id": job.company_id,
        "job_id": job.id,
        "seq": job.event_seq,
        "type": f"content_job.{job.status.value}",
        "payload": json.dumps(payload_of(job)),
        "now": job.updated_at,
    }
    return statements_for(connection).append_event(connection, values, notify=notify)


def payload_of(job: Job) -> dict[str, Any]:
    """What the event of the job's status says of it, as JSON has it."""
    payload: dict[str, Any] = {"jobId": str(job.id)}
    if job.status is JobStatus.DONE:
        payload["assetId"] = None if job.result_asset_id is None else str(job.result_asset_id)
    if job.status is JobStatus.FAILED:
        payload["errorMessage"] = job.error_message
    return payload
