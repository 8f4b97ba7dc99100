"""The runner's steps on rows: claim, record intents, finish, release. Each works in the caller's transaction.

Every change of a claimed job says ``WHERE id = … AND status = 'running' AND fence = …``: a claim that was lost
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.ids import new_id
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import AppendedEvent, ClaimedRow, ClaimTerms, EventRow, RescueTerms
from jobkit.errors import AssetNotFound
from jobkit.jobs.outcomes import Outcome
from jobkit.types import JobStatus, StoredObject

Pick = Callable[[sa.Connection, ClaimTerms], list[ClaimedRow]]
# How often a job may lose its worker before it is taken for what kills workers.
MAX_RESCUES = 5

DONE = Outcome(JobStatus.DONE)
CANCELLED = Outcome(JobStatus.CANCELLED)
RELEASED = Outcome(JobStatus.QUEUED, charged=False)


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
class Completion:
    """How an attempt at a claimed job ends: done with the files that were published for it, or as the verdict says."""

    claim: Claim
    files: tuple[StoredObject, ...] = ()
    outcome: Outcome = DONE
    asset_ids: tuple[UUID, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "asset_ids", tuple(new_id() for _ in self.files))

    @property
    def type(self) -> str:
        """The event that tells of it."""
        if self.outcome.status is JobStatus.QUEUED and self.outcome.error is not None:
            return "content_job.retrying"
        return f"content_job.{self.outcome.status.value}"

    @property
    def payload(self) -> dict[str, Any]:
        told: dict[str, Any] = {"jobId": str(self.claim.job_id)}
        if self.outcome.status is JobStatus.DONE:
            told["assetId"] = str(self.asset_ids[0])
        if self.type == "content_job.retrying":
            told["attempt"] = self.claim.attempt
        if self.outcome.error is not None:
            told["errorMessage"] = self.outcome.error
        if self.type == "content_job.retrying":
            told["runAt"] = None if self.outcome.run_at is None else self.outcome.run_at.isoformat()
        return told


def failed(claim: Claim, message: str) -> Completion:
    """The end of an attempt that is not repeated."""
    return Completion(claim, outcome=Outcome(JobStatus.FAILED, error=message))


def claim(
    connection: sa.Connection, *, limit: int, worker_id: str, lease: float, now: datetime, pick: Pick | None = None
) -> tuple[list[Claim], list[EventRow]]:
    """Take up to ``limit`` queued jobs: running, fence + 1, attempt + 1, leased for ``lease`` seconds; with their
    events. ``pick`` chooses which; without it those of any company.
    """
    terms = ClaimTerms(limit, worker_id, lease, now)
    taken = pick(connection, terms) if pick else statements_for(connection).claim(connection, terms=terms)
    claims = [Claim(t.job_id, t.company_id, t.job_type, t.input, t.source_task_id, t.fence, t.attempt) for t in taken]
    events = [
        EventRow(t.event_id, 0, t.seq, t.company_id, "content_job.running", t.job_id, now, {"jobId": str(t.job_id)})
        for t in taken
    ]
    return claims, events


def finish(connection: sa.Connection, completions: Sequence[Completion], *, now: datetime) -> list[EventRow]:
    """End attempts: asset rows, status, event, intents gone; nothing of those whose claim was lost.

    A job that would go back into the queue and was asked to stop is cancelled instead. Returns the events of the jobs
    that ended. ``AssetNotFound`` when the sweep took an object first: the caller must then roll back, and the files of
    that job are lost.
    """
    events = _finish(connection, completions, now)
    ended = {event.job_id for event in events}
    asked = [c for c in completions if c.outcome.status is JobStatus.QUEUED and c.claim.job_id not in ended]
    return events + (_finish(connection, [Completion(c.claim, outcome=CANCELLED) for c in asked], now) if asked else [])


def _finish(connection: sa.Connection, completions: Sequence[Completion], now: datetime) -> list[EventRow]:
    told, gone = statements_for(connection).finish(
        connection,
        [_job(c) for c in sorted(completions, key=lambda c: _by_id(c.claim))],
        [row for c in completions for row in _files(c)],
        now=now,
    )
    by_id = {c.claim.job_id: c for c in completions}
    recorded = sum(file.recorded for t in told for file in by_id[t.job_id].files)
    if gone != recorded:
        raise AssetNotFound(f"the sweep was faster: {recorded - gone} of {recorded} stored files are gone")
    return [_event(by_id[t.job_id], t, now) for t in told]


def release(connection: sa.Connection, claims: Sequence[Claim], *, now: datetime) -> list[EventRow]:
    """Put claimed jobs back into the queue, the attempt not charged; nothing happens to those whose claim was lost."""
    return finish(connection, [Completion(claim, outcome=RELEASED) for claim in claims], now=now)


def renew(connection: sa.Connection, claims: Sequence[Claim], *, lease: float) -> dict[UUID, bool]:
    """Prolong the claims that still hold; which those are, and whether the job was asked to stop."""
    return dict(statements_for(connection).renew(connection, _tokens(claims), lease=lease))


def check(connection: sa.Connection, claims: Sequence[Claim]) -> dict[UUID, bool]:
    """As ``renew``, and writes nothing."""
    return dict(statements_for(connection).held(connection, _tokens(claims)))


def update_progress(
    connection: sa.Connection, reports: Sequence[tuple[Claim, Report]], *, lease: float, now: datetime
) -> tuple[dict[UUID, bool], list[EventRow]]:
    """As ``renew``, and records how far the jobs are; with their events. A job's fraction never goes back."""
    jobs = [
        {"job": claim.job_id.hex, "fence": claim.fence, "progress": report.fraction, "message": report.message}
        for claim, report in sorted(reports, key=lambda reported: _by_id(reported[0]))
    ]
    moved = statements_for(connection).update_progress(connection, jobs, lease=lease, now=now)
    return {event.job_id: cancelled for event, cancelled in moved}, [event for event, _ in moved]


def rescue(connection: sa.Connection, *, limit: int, now: datetime) -> list[EventRow]:
    """Take up to ``limit`` jobs from workers whose lease is over: queued again, the attempt not charged; cancelled when
    asked to stop; failed when that happened ``MAX_RESCUES`` times before. Returns their events.
    """
    stopped = f"its worker was lost {MAX_RESCUES + 1} times in a row; perhaps this job is what kills it"
    terms = RescueTerms(limit, MAX_RESCUES, "the worker was lost", stopped, now)
    return statements_for(connection).rescue(connection, terms=terms)


def _tokens(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    return [{"job": claim.job_id.hex, "fence": claim.fence} for claim in sorted(claims, key=_by_id)]


# Statements of several jobs lock them in this order, as far as the plan lets them: two that want the same jobs in
# different orders would wait for each other.
def _by_id(claim: Claim) -> int:
    return claim.job_id.int


def _job(completion: Completion) -> dict[str, Any]:
    outcome = completion.outcome
    return {
        "job": completion.claim.job_id.hex,
        "fence": completion.claim.fence,
        "status": outcome.status.value,
        "asset": completion.asset_ids[0].hex if completion.asset_ids else None,
        "error": outcome.error,
        "type": completion.type,
        "payload": completion.payload,
        # Of one width, and in the zone of SQLite's texts, which are this less the zone.
        "run_at": outcome.run_at and outcome.run_at.astimezone(UTC).isoformat(" ", "microseconds"),
        "refund": int(not outcome.charged),
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


def _event(completion: Completion, told: AppendedEvent, now: datetime) -> EventRow:
    claim = completion.claim
    return EventRow(told.event_id, 0, told.seq, claim.company_id, completion.type, told.job_id, now, completion.payload)


class Report(NamedTuple):
    """A fraction from 0 to 1, and what is being done."""

    fraction: float
    message: str | None
