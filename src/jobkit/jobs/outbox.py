"""The event log: every change of a job appends its event in the same transaction."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import event_payload
from jobkit.types import Job


def append(connection: sa.Connection, job: Job, *, notify: bool) -> int:
    """Append the event of the status that ``job`` was just given, in the caller's transaction; return its id.

    ``notify``: hint at it to other processes when the transaction commits, where the database can.
    """
    values = {
        "company_id": job.company_id,
        "job_id": job.id,
        "seq": job.event_seq,
        "type": type_of(job),
        "payload": json.dumps(payload_of(job)),
        "now": job.updated_at,
    }
    return statements_for(connection).append_event(connection, values, notify=notify)


def payload_of(job: Job) -> dict[str, Any]:
    """The payload of the event of the job's status, as JSON has it."""
    return event_payload(type_of(job), job.id, asset_id=job.result_asset_id, error=job.error_message)


def type_of(job: Job) -> str:
    """The type of the event of the job's status."""
    return f"content_job.{job.status.value}"
