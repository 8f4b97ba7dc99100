"""The event log: every change of a job appends its event in the same transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit._dialects import statements_for
from jobkit._dialects.base import EventRow, Position
from jobkit.tables import content_job_events
from jobkit.types import Job, JobEvent, JobStatus


def append(connection: sa.Connection, job: Job, *, notify: bool) -> int:
    """Append the event of the status that ``job`` was just given, in the caller's transaction; return its id.

    ``notify``: hint at it to other processes when the transaction commits, where the database can.
    """
    values = {
        "company_id": job.company_id,
        "job_id": job.id,
        "seq": job.event_seq,
        "type": f"content_job.{job.status.value}",
        "payload": json.dumps(_payload(job)),
        "now": job.updated_at,
    }
    return statements_for(connection).append_event(connection, values, notify=notify)


def event_of(row: EventRow, cursor: Position) -> JobEvent:
    """A row of the log as receivers get it. ``cursor`` is the position below which nothing is missing now."""
    return JobEvent(row.id, row.seq, str(cursor), row.company_id, row.type, row.job_id, row.created_at, row.payload)


def known(connection: sa.Connection, witnesses: Sequence[tuple[int, UUID]]) -> set[tuple[int, UUID]]:
    """Those of these events, by id and job, that the log has."""
    c = content_job_events.c
    found = connection.execute(sa.select(c.id, c.job_id).where(c.id.in_([event_id for event_id, _ in witnesses])))
    return {(row.id, row.job_id) for row in found} & set(witnesses)


def may_run(row: EventRow) -> bool:
    """Whether the event puts its job into the queue."""
    return row.type in ("content_job.queued", "content_job.retrying")


def _payload(job: Job) -> dict[str, Any]:
    payload: dict[str, Any] = {"jobId": str(job.id)}
    if job.status is JobStatus.DONE:
        payload["assetId"] = None if job.result_asset_id is None else str(job.result_asset_id)
    if job.status is JobStatus.FAILED:
        payload["errorMessage"] = job.error_message
    return payload
