"""What jobkit's rows should be: a state machine's idea of them, and the laws that hold whatever was done.

A claim is an object here as it is in a runner, and goes on existing after its job was taken from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects.base import EventRow
from jobkit.jobs.claims import Claim, Completion
from jobkit.tables import asset_intents, assets, content_job_events, content_jobs

TERMINAL = ("done", "failed", "cancelled")
LIVE, OVER = "live", "over"


@dataclass
class ModelJob:
    """A job; ``events`` are the short names of all that was told of it, ``lease`` is None without one."""

    id: UUID
    company: str
    input: dict[str, Any]
    key: str | None
    priority: int
    run_at: datetime | None
    created_at: datetime
    status: str = "queued"
    fence: int = 0
    attempt: int = 0
    rescues: int = 0
    lease: str | None = None
    asked: bool = False
    result: UUID | None = None
    error: str | None = None
    events: list[str] = field(default_factory=lambda: ["queued"])

    def may_run(self, now: datetime) -> bool:
        return self.status == "queued" and (self.run_at is None or self.run_at <= now)

    @property
    def place(self) -> tuple[int, datetime]:
        """Where it stands in its company's queue."""
        return -self.priority, self.run_at or self.created_at

    def holds(self, claim: Claim) -> bool:
        return self.status == "running" and self.fence == claim.fence

    def become(self, status: str, event: str | None = None) -> None:
        """Change the status by whatever means; its claim is over."""
        self.status, self.lease = status, None
        self.events.append(event or status)

    def begin(self) -> None:
        self.become("running")
        self.fence, self.attempt, self.lease = self.fence + 1, self.attempt + 1, LIVE

    def by_hand(self, status: str) -> None:
        self.become(status)
        self.asked = False
        self.fence += status == "running"

    def again(self) -> None:
        """As ``JobStore.retry``."""
        self.by_hand("queued")
        self.attempt = self.rescues = 0
        self.result = self.error = self.run_at = None

    def lose(self, most: int, reason: str, stopped: str) -> None:
        """As a rescue does."""
        if self.asked:
            self.become("cancelled")
            self.error = None
        elif self.rescues >= most:
            self.become("failed")
            self.error = stopped
        else:
            self.become("queued", "retrying")
            self.attempt, self.error = self.attempt - 1, reason
        self.rescues, self.run_at = self.rescues + 1, None

    def end(self, completion: Completion) -> None:
        """As the holder of its claim does."""
        outcome = completion.outcome
        if outcome.status == "queued" and self.asked:
            self.become("cancelled")
            self.error = None
            return
        self.become(outcome.status.value, completion.type.removeprefix("content_job."))
        self.error = outcome.error
        if outcome.status == "queued":
            self.run_at, self.rescues = outcome.run_at, 0
            self.attempt -= not outcome.charged
        if outcome.status == "done":
            self.result = completion.asset_ids[0]


@dataclass
class Record:
    """A row of ``asset_intents``; ``due`` is whether a sweep may visit it."""

    state: str = "pending"
    due: bool = True


@dataclass
class Model:
    """Every row and object. ``rows``: the asset of each live key."""

    jobs: dict[UUID, ModelJob] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    rows: dict[str, UUID] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def of_key(self, company: str, key: str) -> ModelJob | None:
        return next((job for job in self.jobs.values() if (job.company, job.key) == (company, key)), None)

    def winners(self, completions: Iterable[Completion]) -> list[Completion]:
        """Those of the completions that find their claim still held."""
        return [end for end in completions if self.jobs[end.claim.job_id].holds(end.claim)]

    def swept(self, key: str) -> bool:
        """Whether nobody can give this key a row any more."""
        return key not in self.records or self.records[key].state != "pending"

    def finish(self, completions: Sequence[Completion]) -> None:
        for end in self.winners(completions):
            self.jobs[end.claim.job_id].end(end)
            for file, asset_id in zip(end.files, end.asset_ids, strict=True):
                del self.records[file.object_key]
                self.rows[file.object_key] = asset_id


class Found(NamedTuple):
    """All rows as they are committed."""

    jobs: dict[UUID, Any]
    events: list[EventRow]
    assets: dict[str, Any]
    records: dict[str, Any]


_EVENT_COLUMNS = [content_job_events.c[name] for name in EventRow._fields]


def read(connection: sa.Connection) -> Found:
    return Found(
        {row.id: row for row in connection.execute(sa.select(content_jobs))},
        [EventRow(*row) for row in connection.execute(sa.select(*_EVENT_COLUMNS).order_by(content_job_events.c.id))],
        {row.object_key: row for row in connection.execute(sa.select(assets))},
        {row.object_key: row for row in connection.execute(sa.select(asset_intents))},
    )


def differences(model: Model, found: Found, now: datetime) -> list[str]:
    """Where the rows are not what the model says; ``now`` is the database's."""
    told: dict[UUID, list[str]] = {}
    for event in sorted(found.events, key=lambda event: event.seq):
        told.setdefault(event.job_id, []).append(event.type.removeprefix("content_job."))
    wrong = []
    for job in model.jobs.values():
        row = found.jobs.get(job.id)
        if row is None:
            wrong.append(f"I1: job {job.id} is gone")
            continue
        lease = None if row.lease_until is None else LIVE if row.lease_until > now else OVER
        was = {
            "status": row.status, "fence": row.fence, "attempt": row.attempt, "rescues": row.rescues, "lease": lease,
            "asked": row.cancel_requested_at is not None, "result": row.result_asset_id, "error": row.error_message,
            "run_at": row.run_at, "input": row.input, "company": row.company_id, "key": row.idempotency_key,
            "priority": row.priority, "events": told.get(job.id, []),
        }  # fmt: skip
        wrong += [
            f"job {job.id}: {n} is {v!r}, not {getattr(job, n)!r}" for n, v in was.items() if v != getattr(job, n)
        ]
    wrong += [f"job {job_id} came from nowhere" for job_id in found.jobs.keys() - model.jobs.keys()]
    rows = {key: row.id for key, row in found.assets.items()}
    states = {key: row.state for key, row in found.records.items()}
    if rows != model.rows:
        wrong.append(f"I5: the assets are {rows}, not {model.rows}")
    if states != {key: record.state for key, record in model.records.items()}:
        wrong.append(f"I7: the recorded keys are {states}, not {model.records}")
    return wrong


def broken_laws(found: Found, objects: dict[str, bytes]) -> list[str]:
    """What can never be, whatever was done: judged by the rows and objects alone."""
    broken = []
    told: dict[UUID, list[EventRow]] = {job_id: [] for job_id in found.jobs}
    for event in found.events:
        told[event.job_id].append(event)
    for job in found.jobs.values():
        broken += _broken_laws_of_a_job(job, told[job.id], [a for a in found.assets.values() if a.job_id == job.id])
    for key, row in found.assets.items():
        if len(objects.get(key, b"")) != row.byte_size:
            broken.append(f"I6: asset {row.id} has {len(objects.get(key, b''))} of {row.byte_size} bytes")
        if key in found.records:
            broken.append(f"I7: {key} has a row, and a sweep would take it")
        if row.job_id is not None and row.company_id != found.jobs[row.job_id].company_id:
            broken.append(f"I14: asset {row.id} is another company's than its job")
    nameless = objects.keys() - found.assets.keys() - found.records.keys()
    return broken + [f"I7: object {key} has neither a row nor a record" for key in nameless]


def _broken_laws_of_a_job(job: Any, events: list[EventRow], files: list[Any]) -> list[str]:
    """``events`` in the order of their ids."""
    broken = []
    types = [event.type.removeprefix("content_job.") for event in events]
    if [event.seq for event in events] != list(range(1, job.event_seq + 1)):
        broken.append(f"I10: job {job.id} counts {job.event_seq} events, the log has {[e.seq for e in events]}")
    if types[-1:] not in ([job.status], ["retrying"] if job.status == "queued" else []):
        broken.append(f"I8: job {job.id} is {job.status} and was last told to be {types[-1:]}")
    if types.count("running") != job.fence:
        broken.append(f"I3: job {job.id} began {types.count('running')} times, its fence is {job.fence}")
    # Between two ends somebody put it back by hand or by retry, or took it by hand.
    if any(one in TERMINAL and other in TERMINAL for one, other in itertools.pairwise(types)):
        broken.append(f"I2: job {job.id} ended twice: {types}")
    if files and types.count("done") != 1:
        broken.append(f"I5: job {job.id} was done {types.count('done')} times and has {len(files)} files")
    if job.status != "running" and (job.lease_until, job.worker_id) != (None, None):
        broken.append(f"I4: job {job.id} is {job.status} and still leased")
    if any(e.company_id != job.company_id or e.payload["jobId"] != str(job.id) for e in events):
        broken.append(f"I14: an event of job {job.id} names another company or job")
    return broken
