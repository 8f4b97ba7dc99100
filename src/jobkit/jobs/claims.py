"""The runner's steps on rows: claim, renew, finish, release, rescue. Each works in the caller's transaction.

Every change of a claimed job says ``WHERE id = … AND status = 'running' AND fence = …``: a claim that was lost
changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import CENTURY
from jobkit.base.ids import new_id
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import (
    SUSPECT_AFTER,
    AppendedEvent,
    ClaimedRow,
    ClaimTerms,
    EventRow,
    Held,
    RescueTerms,
    event_payload,
)
from jobkit.db.dialects.base import Claim as Claim  # noqa: PLC0414 - the name of this module's users
from jobkit.errors import AssetNotFound
from jobkit.jobs.outcomes import Outcome
from jobkit.types import JobStatus, StoredObject

Pick = Callable[[sa.Connection, ClaimTerms], list[ClaimedRow]]
# Gets the events of each commit.
OnCommit = Callable[[Sequence[EventRow]], object]
# A job that lost its worker this many times in a row, and then once more, has failed: it may be what kills workers.
MAX_RESCUES = 5

DONE = Outcome(JobStatus.DONE)
CANCELLED = Outcome(JobStatus.CANCELLED)
RELEASED = Outcome(JobStatus.QUEUED, charged=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """The end of an attempt: done with ``files``, which are stored already; or as ``outcome`` says."""

    claim: Claim
    files: tuple[StoredObject, ...] = ()
    outcome: Outcome = DONE
    asset_ids: tuple[UUID, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "asset_ids", tuple(new_id() for _ in self.files))

    @property
    def type(self) -> str:
        """The type of its event."""
        if self.outcome.status is JobStatus.QUEUED and self.outcome.error is not None:
            return "content_job.retrying"
        return f"content_job.{self.outcome.status.value}"

    @property
    def payload(self) -> dict[str, Any]:
        return event_payload(
            self.type,
            self.claim.job_id,
            asset_id=self.asset_ids[0] if self.asset_ids else None,
            error=self.outcome.error,
            attempt=self.claim.attempt,
            run_at=self.outcome.run_at,
        )


def failed(claim: Claim, message: str, detail: str | None = None) -> Completion:
    """The end of an attempt that is not repeated."""
    return Completion(claim, outcome=Outcome(JobStatus.FAILED, error=message, detail=detail))


def claim(
    connection: sa.Connection, *, limit: int, worker_id: str, lease: float, now: datetime, pick: Pick | None = None
) -> tuple[list[Claim], list[EventRow]]:
    """Claim up to ``limit`` queued jobs: running, fence + 1, attempt + 1, leased for ``lease`` seconds. Returns claims
    and events. ``pick`` chooses the jobs; without it, of any company.
    """
    terms = ClaimTerms(limit, worker_id, lease, now)
    taken = pick(connection, terms) if pick else statements_for(connection).claim(connection, terms=terms)
    kind = "content_job.running"
    events = [
        EventRow(event_id, 0, seq, claim.company_id, kind, claim.job_id, now, event_payload(kind, claim.job_id))
        for claim, seq, event_id in taken
    ]
    return [row.claim for row in taken], events


class Ended(NamedTuple):
    """The events of a ``finish``, and the jobs whose rows other transactions have locked: to be finished later."""

    events: list[EventRow]
    locked: Set[UUID]


def finish(connection: sa.Connection, completions: Sequence[Completion], *, now: datetime) -> Ended:
    """End attempts: their status, event and asset rows are written, their intents deleted. Nothing is written for a
    lost claim, or for a job whose row is locked.

    A job that would be queued again and was asked to stop is cancelled instead. ``AssetNotFound`` when the sweep took
    an object first: the caller must roll back, and that job's files are lost.
    """
    events, locked = _finish(connection, completions, now)
    settled = {event.job_id for event in events} | locked
    asked = [c for c in completions if c.outcome.status is JobStatus.QUEUED and c.claim.job_id not in settled]
    if asked:
        more = _finish(connection, [Completion(c.claim, outcome=CANCELLED) for c in asked], now)
        return Ended(events + more.events, locked | more.locked)
    return Ended(events, locked)


def _finish(connection: sa.Connection, completions: Sequence[Completion], now: datetime) -> Ended:
    told, gone, locked = statements_for(connection).finish(
        connection,
        [_job(c) for c in sorted(completions, key=lambda c: _by_id(c.claim))],
        [row for c in completions for row in _files(c)],
        now=now,
    )
    by_id = {c.claim.job_id: c for c in completions}
    recorded = sum(file.recorded for t in told for file in by_id[t.job_id].files)
    if gone != recorded:
        raise AssetNotFound(f"the sweep was faster: {recorded - gone} of {recorded} stored files are gone")
    return Ended([_event(by_id[t.job_id], t, now) for t in told], locked)


def release(connection: sa.Connection, claims: Sequence[Claim], *, now: datetime) -> list[EventRow]:
    """Queue claimed jobs again, the attempt not charged. Nothing is written for a lost claim, or for a job whose row is
    locked. Returns the events.
    """
    return finish(connection, [Completion(claim, outcome=RELEASED) for claim in claims], now=now).events


def renew(connection: sa.Connection, claims: Sequence[Claim], *, lease: float) -> list[Held]:
    """Prolong the claims that still hold to ``lease`` seconds from now."""
    return statements_for(connection).renew(connection, _tokens(claims), lease=lease)


def check(connection: sa.Connection, claims: Sequence[Claim]) -> list[Held]:
    """As ``renew``, but writes nothing."""
    return look(connection, claims, within=0.0)[0]


def look(connection: sa.Connection, claims: Sequence[Claim], *, within: float) -> tuple[list[Held], set[UUID]]:
    """The claims that still hold, and the jobs whose lease ends within so many seconds. Writes nothing."""
    return statements_for(connection).held(connection, _tokens(claims), within=within)


def update_progress(
    connection: sa.Connection, reports: Sequence[tuple[Claim, Report]], *, lease: float, now: datetime
) -> tuple[list[EventRow], list[Held]]:
    """As ``renew``, and writes the reports; with their events. A job's fraction never falls."""
    jobs = [
        {"job": claim.job_id.hex, "fence": claim.fence, "progress": report.fraction, "message": report.message}
        for claim, report in sorted(reports, key=lambda reported: _by_id(reported[0]))
    ]
    return statements_for(connection).update_progress(connection, jobs, lease=lease, now=now)


def rescue(
    connection: sa.Connection,
    *,
    limit: int,
    now: datetime,
    after: UUID = UUID(int=0),
    age: float = CENTURY,
    mine: Sequence[Claim] = (),
) -> list[EventRow]:
    """Take up to ``limit`` jobs by id, beyond ``after``, whose lease ended in the last ``age`` seconds, but none of
    ``mine``, from their lost workers: queued again, the attempt not charged; cancelled when asked to stop; failed after
    ``MAX_RESCUES`` rescues. Returns their events.
    """
    stopped = f"its worker was lost {MAX_RESCUES + 1} times in a row; perhaps this job is what kills it"
    terms = RescueTerms(
        limit, MAX_RESCUES, SUSPECT_AFTER, "the worker was lost", stopped, now, -age, json.dumps(_tokens(mine)), after
    )
    return statements_for(connection).rescue(connection, terms=terms)


def _tokens(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    return [{"job": claim.job_id.hex, "fence": claim.fence} for claim in sorted(claims, key=_by_id)]


# Statements about several jobs lock them in this order, as far as the plan keeps it: in different orders, two could
# deadlock.
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
        "detail": outcome.detail,
        "type": completion.type,
        "payload": completion.payload,
        # In UTC and of one width: SQLite stores this text without the zone, and compares texts.
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
    """A job's progress: a fraction from 0 to 1, and a message."""

    fraction: float
    message: str | None
