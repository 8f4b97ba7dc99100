"""What the two databases are asked to do: signatures, what both do alike, and the rows that come back.

Every method works in the transaction of the connection it is given, and commits nothing. A batch goes in as one JSON
document, which both databases read as rows, with any driver.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects.position import Position
from jobkit.db.dialects.sql import Sql

Document = list[dict[str, Any]]
# The row of the event log, of no job, that says up to where events were removed. No scan gives it.
MARK = UUID(int=0)
PRUNED = "pruned"


class Start(NamedTuple):
    """Where a reader of the log began: its position, and the snapshot whose events it leaves out (empty on SQLite)."""

    position: Position
    snapshot: str


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run a job, proved by ``fence``, with what its renderer is given."""

    job_id: UUID
    company_id: str
    job_type: str
    input: dict[str, Any]
    source_task_id: str | None
    fence: int
    attempt: int


class ClaimedRow(NamedTuple):
    """A claimed job, with the ``seq`` and id of its ``running`` event."""

    claim: Claim
    seq: int
    event_id: int

    @classmethod
    def of(cls, row: Sequence[Any]) -> ClaimedRow:
        """A row of the columns ``CLAIMED``."""
        *claim, seq, event_id = row
        return cls(Claim(*claim), seq, event_id)


class ClaimTerms(NamedTuple):
    """At most ``limit`` jobs for ``worker_id``, leased for ``lease`` seconds of the database's clock."""

    limit: int
    worker_id: str
    lease: float
    now: datetime


class QueuedJob(NamedTuple):
    """A queued job that may run now, with its place within its company: by ``priority``, then by ``at``, which is its
    ``run_at`` or, without one, its ``created_at``.
    """

    job_id: UUID
    company_id: str
    priority: int
    at: datetime


class RescueTerms(NamedTuple):
    """At most ``limit`` jobs by id, beyond ``after``; the error message ``reason`` for those that are queued again,
    ``stopped`` for those that were rescued ``max_rescues`` times already, which fail.
    """

    limit: int
    max_rescues: int
    reason: str
    stopped: str
    now: datetime
    after: UUID = MARK


class Held(NamedTuple):
    """A claim that still holds, and whether its job was asked to stop. ``locked``: another transaction has locked the
    row, which was left as it is.
    """

    job_id: UUID
    cancelled: bool
    locked: bool = False


class AppendedEvent(NamedTuple):
    """An event that a statement appended."""

    job_id: UUID
    event_id: int
    seq: int


class Finished(NamedTuple):
    """The events of the jobs that ended, how many intents were deleted, and the jobs that other transactions have
    locked, whose claims still held a moment ago: nothing of them was written.
    """

    events: Sequence[AppendedEvent]
    gone: int = 0
    locked: AbstractSet[UUID] = frozenset()


class EventRow(NamedTuple):
    """A row of the event log."""

    id: int
    xid: int
    seq: int
    company_id: str
    type: str
    job_id: UUID
    created_at: datetime
    payload: dict[str, Any]


class DueKey(NamedTuple):
    """A recorded object key that a sweep may visit from ``not_before`` on."""

    company_id: str
    object_key: str
    not_before: datetime


class PruneCounts(NamedTuple):
    """The jobs of a batch that are deleted, and how many events and assets with them."""

    jobs: Sequence[UUID]
    events: int
    assets: int


def event_payload(
    kind: str,
    job_id: UUID,
    *,
    asset_id: UUID | None = None,
    error: str | None = None,
    attempt: int | None = None,
    run_at: datetime | None = None,
    progress: float | None = None,
    message: str | None = None,
) -> dict[str, Any]:
    """The payload of a job's event of type ``kind``, as JSON has it. PostgreSQL's statements make the same."""
    payload: dict[str, Any] = {"jobId": str(job_id)}
    match kind:
        case "content_job.done":
            payload["assetId"] = None if asset_id is None else str(asset_id)
        case "content_job.failed":
            payload["errorMessage"] = error
        case "content_job.retrying":
            payload |= {
                "attempt": attempt,
                "errorMessage": error,
                "runAt": None if run_at is None else run_at.isoformat(),
            }
        case "content_job.progress":
            payload |= {"progress": progress, "message": message}
    return payload


class Jobs(ABC):
    """Jobs: created, claimed, ended, rescued; each change with its event."""

    #: Whether a claim that finds nothing still takes the database's write lock, so that a poll should look first.
    claim_locks: bool

    _due: Sql
    _first_queued: Sql
    _companies: Sql
    _has_queued: Sql
    _claim: Sql
    _claim_of: Sql
    _claim_these: Sql
    _renew: Sql
    _held: Sql
    _first_expired: Sql

    @abstractmethod
    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        """Insert a queued job with its event; the event's id, or None when a job has its idempotency key already."""

    @abstractmethod
    def insert_jobs(self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool) -> int:
        """Insert a company's queued jobs, each with its event; ``jobs`` is a JSON array of ``{id, type, input, task,
        run_at, priority}``. How many are there: a trigger may leave some out.
        """

    def due(self, connection: sa.Connection, *, window: int, limit: int, now: datetime) -> list[QueuedJob]:
        """Jobs whose ``run_at`` has come: the first ``limit``, companies in turn, among the first ``window`` of each
        priority. Locks nothing.
        """
        values = {"window": window, "limit": limit, "now": now}
        return [QueuedJob(*row) for row in connection.execute(self._due(connection), values)]

    def first_queued(self, connection: sa.Connection, companies: Sequence[str], each: int) -> list[QueuedJob]:
        """The first ``each`` jobs without ``run_at`` of each of these companies. Locks nothing."""
        values = {"companies": json.dumps(companies), "each": each}
        return [QueuedJob(*row) for row in connection.execute(self._first_queued(connection), values)]

    def companies(self, connection: sa.Connection, *, limit: int) -> list[str]:
        """The first ``limit`` companies, in order, that have queued jobs without ``run_at``. Locks nothing."""
        return list(connection.execute(self._companies(connection), {"limit": limit}).scalars())

    def has_queued(self, connection: sa.Connection, *, now: datetime) -> bool:
        """Whether a claim would find a job. Locks nothing, so the answer is only a hint."""
        return bool(connection.execute(self._has_queued(connection), {"now": now}).scalar())

    def claim(self, connection: sa.Connection, *, terms: ClaimTerms) -> list[ClaimedRow]:
        """Claim queued jobs without ``run_at``, by company, then priority and creation: running, fence + 1, leased,
        each with its event.
        """
        return self._claimed(connection, self._claim, terms)

    def claim_of(
        self, connection: sa.Connection, companies: Sequence[str], each: int, *, terms: ClaimTerms
    ) -> list[ClaimedRow]:
        """As ``claim``, up to ``each`` jobs of each of these companies."""
        return self._claimed(connection, self._claim_of, terms, companies=json.dumps(companies), each=each)

    def claim_these(self, connection: sa.Connection, job_ids: Sequence[UUID], *, terms: ClaimTerms) -> list[ClaimedRow]:
        """As ``claim``, of these jobs those that still may run, in this order."""
        return self._claimed(connection, self._claim_these, terms, ids=json.dumps([job_id.hex for job_id in job_ids]))

    def _claimed(
        self, connection: sa.Connection, statement: Sql, terms: ClaimTerms, **more: object
    ) -> list[ClaimedRow]:
        return [ClaimedRow.of(row) for row in connection.execute(statement(connection), {**terms._asdict(), **more})]

    @abstractmethod
    def finish(self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime) -> Finished:
        """End the jobs whose fence still holds, with their files. Waits for no lock on a job."""

    def renew(self, connection: sa.Connection, jobs: Document, *, lease: float) -> list[Held]:
        """Prolong the claims that still hold to ``lease`` seconds from now, by the database's clock. Waits for no lock
        on a job.
        """
        values = {"jobs": json.dumps(jobs), "lease": lease}
        return [Held(*row) for row in connection.execute(self._renew(connection), values)]

    def held(self, connection: sa.Connection, jobs: Document) -> list[Held]:
        """The claims that still hold. Writes nothing."""
        return [Held(*row) for row in connection.execute(self._held(connection), {"jobs": json.dumps(jobs)})]

    @abstractmethod
    def update_progress(
        self, connection: sa.Connection, jobs: Document, *, lease: float, now: datetime
    ) -> tuple[list[EventRow], list[Held]]:
        """As ``renew``, with each job's ``message`` and its ``progress``, which never falls; with their events."""

    @abstractmethod
    def rescue(self, connection: sa.Connection, *, terms: RescueTerms) -> list[EventRow]:
        """Take running jobs whose lease is over from their lost workers, each with its event; the attempt is not
        charged.
        """

    def first_expired(self, connection: sa.Connection, *, after: UUID) -> UUID | None:
        """The first job beyond ``after`` that a rescue would find. Locks nothing, so the answer is only a hint."""
        found: UUID | None = connection.execute(self._first_expired(connection), {"after": after}).scalar()
        return found


class Events(ABC):
    """The event log: appended to and read."""

    #: Channels of NOTIFY: that there may be jobs to run, and that the log has grown. None where there is no NOTIFY.
    channels: tuple[str, ...] = ()
    #: A snapshot that no event of the log is visible in.
    nothing_visible = ""

    @abstractmethod
    def append_event(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int:
        """Append one event; its id. ``notify``: hint at it when the transaction commits, where there is NOTIFY."""

    @abstractmethod
    def version(self, connection: sa.Connection) -> int:
        """Changes with every commit of others; while it is the same, a scan would find nothing. Cheaper than one."""

    @abstractmethod
    def log_name(self, connection: sa.Connection) -> str | None:
        """The identity of the log, the same through whichever engine; None when there is none, or it is in memory."""

    @abstractmethod
    def note_moves(self, connection: sa.Connection) -> None:
        """Make positions hold although the log has come to another server since it was read last."""

    @abstractmethod
    def place(self, cursor: Position) -> Position:
        """The position that a client means by a cursor."""

    @abstractmethod
    def start(self, connection: sa.Connection) -> Start:
        """The end of the log as of now."""

    def start_after(self, after: Position) -> Start:
        """A start that leaves out nothing beyond ``after``."""
        return Start(after, self.nothing_visible)

    @abstractmethod
    def log_begins(self, connection: sa.Connection) -> Position:
        """The position up to which events were removed: a reader from below it may miss some."""

    @abstractmethod
    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        """The next events that no later commit can precede, in order, and the position after them."""

    @abstractmethod
    def of_company(
        self, connection: sa.Connection, after: Position, start: Start, company_id: str, limit: int
    ) -> tuple[list[EventRow], Position]:
        """The next committed events of a company by position, also those that later commits may precede; and the
        position up to which no later commit can.
        """

    @abstractmethod
    def earlier(self, connection: sa.Connection, after: Position, start: Start, jobs: Document) -> Sequence[EventRow]:
        """Events of each job before its ``seq`` that lie beyond ``after``; with ``queued`` also the one just before, if
        that is ``queued``.
        """


class Intents(ABC):
    """Keys recorded before an object exists: they may hold one without a live row."""

    _insert_intents: Sql
    _due_intents: Sql
    _claim_intents: Sql
    _drop_intents: Sql
    _postpone_intents: Sql

    def record_intents(self, connection: sa.Connection, intents: Document, *, grace: float) -> None:
        """Record each key; nothing sweeps it for ``grace`` seconds of the database's clock."""
        connection.execute(self._insert_intents(connection), {"intents": json.dumps(intents), "grace": grace})

    def due_intents(
        self, connection: sa.Connection, *, provider: str, state: str, early: float, after: datetime, limit: int
    ) -> Iterator[DueKey]:
        """Keys of ``state`` without a live row that are due, or will be within ``early`` seconds of the database's
        clock; the longest due first, from ``after`` on. A hint: only ``claim_intents`` decides.
        """
        values = {"provider": provider, "state": state, "early": early, "after": after, "limit": limit}
        for row in connection.execute(self._due_intents(connection), values):
            yield DueKey(*row)

    def claim_intents(
        self, connection: sa.Connection, keys: Sequence[str], *, provider: str, state: str, early: float, hold: float
    ) -> list[str]:
        """Make those of ``keys`` that still are due ``collected``, due again in ``hold`` seconds; return them."""
        values = {"keys": json.dumps(keys), "provider": provider, "state": state, "early": early, "hold": hold}
        return list(connection.execute(self._claim_intents(connection), values).scalars())

    def drop_intents(self, connection: sa.Connection, keys: Sequence[str], *, provider: str) -> None:
        """Delete the records of collected keys."""
        connection.execute(self._drop_intents(connection), {"keys": json.dumps(keys), "provider": provider})

    def postpone_intents(self, connection: sa.Connection, failures: Document, *, provider: str) -> None:
        """Make collected keys tombstones again, each with its ``error``, due after a pause that doubles with every
        failure.
        """
        keys = json.dumps([failure["key"] for failure in failures])
        values = {"failures": json.dumps(failures), "keys": keys, "provider": provider}
        connection.execute(self._postpone_intents(connection), values)


class Prune(ABC):
    """Jobs that ended at ``before`` or earlier, and what is deleted with them."""

    #: Whether a transaction that writes keeps every other one from writing.
    one_writer: bool

    _ended_before: Sql
    _count_related: Sql
    _mark_pruned: Sql

    def ended_before(
        self, connection: sa.Connection, *, before: datetime, after: UUID, limit: int
    ) -> tuple[list[UUID], UUID | None]:
        """Those among the next ``limit`` jobs by id, and the last id of these, None at the end. A hint."""
        values = {"before": before, "after": after, "limit": limit}
        rows = connection.execute(self._ended_before(connection), values).all()
        return [row.id for row in rows if row.over], rows[-1].id if rows else None

    def count_related(self, connection: sa.Connection, jobs: Sequence[UUID], *, provider: str | None) -> PruneCounts:
        """What ``prune`` would delete. Writes nothing."""
        values = these(jobs, provider=provider)
        return PruneCounts(jobs, *connection.execute(self._count_related(connection), values).one())

    @abstractmethod
    def prune(
        self, connection: sa.Connection, jobs: Sequence[UUID], *, before: datetime, provider: str | None
    ) -> PruneCounts:
        """Delete those of ``jobs`` that still are over and that nobody else is changing, with their events, moving the
        mark, and the assets that ``provider`` has of them, leaving tombstones. Waits for no lock on a row of a host.
        """

    def mark_pruned(self, connection: sa.Connection, upto: Position) -> None:
        """Remember, in the transaction that removes events, up to where that is. Never moves back."""
        connection.execute(self._mark_pruned(connection), upto._asdict())


class Dialect(Jobs, Events, Intents, Prune):
    """Everything that SQLite and PostgreSQL are asked with statements of their own."""


def these(jobs: Sequence[UUID], **others: Any) -> dict[str, Any]:
    """The parameters of a statement about ``jobs``: SQLite's tables and PostgreSQL both know an id without dashes."""
    return {"jobs": json.dumps([job.hex for job in jobs]), **others}
