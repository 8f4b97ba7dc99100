"""The event log: every change of a job appends its event in the same transaction."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit._dialects import statements_for
from jobkit._dialects.base import EventRow, Position
from jobkit.types import JobEvent


def append(connection: sa.Connection, company_id: str, job_id: UUID, seq: int, type_: str, payload: dict[str, Any], at: datetime) -> int:
    """Append one event in the caller's transaction; return its id. ``seq`` is the job's new ``event_seq``."""
    values = {"company_id": company_id, "job_id": job_id, "seq": seq, "type": type_, "payload": json.dumps(payload), "now": at}
    return statements_for(connection).append_event(connection, values)


def event_of(row: EventRow, cursor: Position) -> JobEvent:
    """A row of the log as receivers get it. ``cursor`` is the position below which nothing is missing now."""
    return JobEvent(row.id, row.seq, str(cursor), row.company_id, row.type, row.job_id, row.created_at, row.payload)
