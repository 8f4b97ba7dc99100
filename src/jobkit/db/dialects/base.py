"""What the two databases are asked to do: signatures, what both do alike, and the rows that come back.

Every method works in the transaction of the connection it is given, and commits nothing. A batch goes in as one JSON
document, which both databases read as rows, with any driver.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects.keys import DueKey as DueKey  # noqa: PLC0414 - with the other rows
from jobkit.db.dialects.keys import Intents as Intents  # noqa: PLC0414
from jobkit.db.dialects.position import Position
from jobkit.db.dialects.sql import Sql

Document = list[dict[str, Any]]
# The row of the event log, of no job, that says up to where events were removed. No scan gives it.
MARK = UUID(int=0)
PRUNED = "pruned"
# A job that lost so many workers in a row is a suspect, and runs alone in its runner: then a loss is its own doing.
SUSPECT_AFTER = 2


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
    """At most ``limit`` jobs for ``worker_id``, leased for ``lease`` seconds of the database's clock.

    ``by`` is the time up to which a ``run_at`` has come; None: the database's clock says so.
    """

    limit: int
    worker_id: str
    lease: float
    now: datetime
    by: datetime | None = None


class QueuedJob(NamedTuple):
    """A queued job that may run now, with its place within its company: by ``priority``, then by ``at``, which is its
    ``run_at`` if it is ``scheduled``, else its ``created_at``. ``suspect``: it has lost so many workers that it has to
    run alone.
    """

    job_id: UUID
    company_id: str
    priority: int
    at: datetime
    scheduled: bool
    suspect: bool


class RescueTerms(NamedTuple):
    """At most ``limit`` jobs by id, beyond ``after``; the error message ``reason`` for those that are queued again,
    ``stopped`` for those that were rescued ``max_rescues`` times already, which fail. From the ``suspect``-th rescue on
    a job has a ``run_at``, the time of its creation: claims look at those one by one.

    Only leases that ended after ``since`` seconds from now, which is negative; none of the claims of ``mine``, JSON.
    """

    limit: int
    max_rescues: int
    suspect: int
    reason: str
    stopped: str
    now: datetime
    since: float
    mine: str
    after: UUID = MARK


class Held(NamedTuple):
    """A claim that still holds, and whether its job was asked to stop. ``locked``: another transaction has locked the
    row, which was left as it is.
    """

    job_id: UUID
    cancelled: bool
    locked: bool = False


class Leases(NamedTuple):
    """The database's clock, and when the first and the last lease of a running job end, in seconds since 1970."""

    clock: float
    first: float | None
    last: float | None


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

    _companies_due: Sql
    _companies: Sql
    _all_companies: Sql
    _first_queued: Sql
    _has_queued: Sql
    _claim: Sql
    _claim_of: Sql
    _claim_these: Sql
    _renew: Sql
    _held: Sql
    _first_expired: Sql
    _leases: Sql
    _cap_leases: Sql

    @abstractmethod
    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        """Insert a queued job with its event; the event's id, or None when a job has its idempotency key already."""

    @abstractmethod
    def insert_jobs(self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool) -> int:
        """Insert a company's queued jobs, each with its event; ``jobs`` is a JSON array of ``{id, type, input, task,
        run_at, priority}``. How many are there: a trigger may leave some out.
        """

    def companies_due(self, connection: sa.Connection, *, limit: int, by: datetime | None) -> list[str]:
        """The companies of the first ``limit`` jobs by ``run_at`` of those that are due, one for each job. ``by`` as in
        ``ClaimTerms``. Locks nothing.
        """
        return list(connection.execute(self._companies_due(connection), {"limit": limit, "by": by}).scalars())

    def companies(self, connection: sa.Connection, due: Sequence[str], *, beyond: str, limit: int) -> list[str]:
        """The first ``limit`` companies, in order, after ``beyond`` that have queued jobs without ``run_at`` or are in
        ``due``. Locks nothing.
        """
        values = {"due": json.dumps(due), "beyond": beyond, "limit": limit}
        return list(connection.execute(self._companies(connection), values).scalars())

    def all_companies(self, connection: sa.Connection, *, beyond: str, limit: int, by: datetime | None) -> list[str]:
        """As ``companies``, with all that have a job which is due: reads an entry of every company that has scheduled
        jobs.
        """
        values = {"beyond": beyond, "limit": limit, "by": by}
        return list(connection.execute(self._all_companies(connection), values).scalars())

    def first_queued(
        self, connection: sa.Connection, companies: Sequence[str], each: int, *, suspect: int, by: datetime | None
    ) -> list[QueuedJob]:
        """Of each of these companies its first ``each`` jobs without ``run_at``, and its first ``each`` that are due;
        ``suspect`` from so many lost workers on. Locks nothing.
        """
        values = {"companies": json.dumps(companies), "each": each, "suspect": suspect, "by": by}
        return [QueuedJob(*row) for row in connection.execute(self._first_queued(connection), values)]

    def has_queued(self, connection: sa.Connection, *, by: datetime | None) -> bool:
        """Whether a claim would find a job. Locks nothing, so the answer is only a hint."""
        return bool(connection.execute(self._has_queued(connection), {"by": by}).scalar())

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

    def held(self, connection: sa.Connection, jobs: Document, *, within: float) -> tuple[list[Held], set[UUID]]:
        """The claims that still hold, and the jobs whose lease ends within so many seconds. Writes nothing."""
        rows = connection.execute(self._held(connection), {"jobs": json.dumps(jobs), "within": within}).all()
        return [Held(row.id, row.cancelled) for row in rows], {row.id for row in rows if row.ending}

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

    def leases(self, connection: sa.Connection) -> Leases:
        """When leases end. Locks nothing, so the answer is only a hint."""
        return Leases(*connection.execute(self._leases(connection)).one())

    def cap_leases(self, connection: sa.Connection, *, far: float, lease: float) -> None:
        """Let leases that end more than ``far`` seconds from now end in ``lease`` seconds."""
        connection.execute(self._cap_leases(connection), {"far": far, "lease": lease})


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
    def note_moves(self, connection: sa.Connection) -> bool:
        """Make positions hold although the log has come to another server since it was read last. False when that has
        to be done again, because this server may yet become another: a standby.
        """

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
