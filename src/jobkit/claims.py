"""The runner's steps on rows: claim, record intents, finish, release. Each works in the caller's transaction.

Every change of a claimed job says ``WHERE id = … AND status = 'running' AND fence = …``: a claim that was lost
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit._dialects import statements_for
from jobkit._dialects.base import EventRow, Told
from jobkit.errors import AssetNotFound
from jobkit.ids import new_id
from jobkit.types import JobStatus, StoredObject

# How long nothing sweeps a key whose object may still be on its way.
INTENT_GRACE = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run a job, proved by ``fence``, and what a renderer is told of the job."""

    job_id: UUID
    company_id: str
    job_type: str
    input: dict[str, Any]
    source_task_id: str | None
    fence: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Intent:
    """A key that may soon hold an object."""

    company_id: str
    provider: str
    object_key: str


@dataclass(frozen=True, slots=True)
class Completion:
    """How a claimed job ends: done with the files that were published for it, or failed with a message."""

    claim: Claim
    files: tuple[StoredObject, ...] = ()
    error: str | None = None
    asset_ids: tuple[UUID, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "asset_ids", tuple(new_id() for _ in self.files))

    @property
    def status(self) -> JobStatus:
        return JobStatus.DONE if self.error is None else JobStatus.FAILED

    @property
    def payload(self) -> dict[str, Any]:
        job_id = str(self.claim.job_id)
        if self.error is None:
            return {"jobId": job_id, "assetId": str(self.asset_ids[0])}
        return {"jobId": job_id, "errorMessage": self.error}


def claim(
    connection: sa.Connection, *, limit: int, worker_id: str, lease: float, now: datetime
) -> tuple[list[Claim], list[EventRow]]:
    """Take up to ``limit`` queued jobs: running, fence + 1, attempt + 1, leased for ``lease`` seconds; with their
    events.
    """
    taken = statements_for(connection).claim(connection, limit=limit, worker_id=worker_id, lease=lease, now=now)
    claims = [Claim(t.job_id, t.company_id, t.job_type, t.input, t.source_task_id, t.fence, t.attempt) for t in taken]
    events = [
        EventRow(t.event_id, 0, t.seq, t.company_id, "content_job.running", t.job_id, now, {"jobId": str(t.job_id)})
        for t in taken
    ]
    return claims, events


def record_intents(connection: sa.Connection, intents: Sequence[Intent]) -> None:
    """Record every key before its object can exist. The caller commits, and only then publishes."""
    rows = [{"id": new_id().hex, "company": i.company_id, "provider": i.provider, "key": i.object_key} for i in intents]
    statements_for(connection).record_intents(connection, rows, grace=INTENT_GRACE)


def finish(connection: sa.Connection, completions: Sequence[Completion], *, now: datetime) -> list[EventRow]:
    """End jobs: their asset rows, their status and their event, their intents gone; nothing of those whose claim was
    lost.

    Returns the events of the jobs that ended. ``AssetNotFound`` when the sweep took an object first: the caller must
    then roll back, and the files of that job are lost.
    """
    told, gone = statements_for(connection).finish(
        connection, [_job(c) for c in completions], [row for c in completions for row in _files(c)], now=now
    )
    by_id = {c.claim.job_id: c for c in completions}
    recorded = sum(file.recorded for t in told for file in by_id[t.job_id].files)
    if gone != recorded:
        raise AssetNotFound(f"the sweep was faster: {recorded - gone} of {recorded} stored files are gone")
    return [_event(by_id[t.job_id], t, now) for t in told]


def release(connection: sa.Connection, claims: Sequence[Claim], *, now: datetime) -> list[EventRow]:
    """Put claimed jobs back into the queue, the attempt not charged; nothing happens to those whose claim was lost."""
    told = statements_for(connection).release(
        connection, [{"job": c.job_id.hex, "fence": c.fence} for c in claims], now=now
    )
    company = {c.job_id: c.company_id for c in claims}
    return [
        EventRow(t.event_id, 0, t.seq, company[t.job_id], "content_job.queued", t.job_id, now, {"jobId": str(t.job_id)})
        for t in told
    ]


def _job(completion: Completion) -> dict[str, Any]:
    return {
        "job": completion.claim.job_id.hex,
        "fence": completion.claim.fence,
        "status": completion.status.value,
        "asset": completion.asset_ids[0].hex if completion.asset_ids else None,
        "error": completion.error,
        "type": f"content_job.{completion.status.value}",
        "payload": completion.payload,
    }


def _files(completion: Completion) -> list[dict[str, Any]]:
    claim = completion.claim
    return [
        {
            "id": asset_id.hex,
            "job": claim.job_id.hex,
            "company": claim.company_id,
            "provider": file.provider,
            "key": file.object_key,
            "content_type": file.content_type,
            "size": file.byte_size,
            "sha256": file.sha256,
            "filename": file.original_filename,
            "task": claim.source_task_id,
            "position": position,
        }
        for position, (asset_id, file) in enumerate(zip(completion.asset_ids, completion.files, strict=True))
    ]


def _event(completion: Completion, told: Told, now: datetime) -> EventRow:
    kind = f"content_job.{completion.status.value}"
    return EventRow(told.event_id, 0, told.seq, completion.claim.company_id, kind, told.job_id, now, completion.payload)
