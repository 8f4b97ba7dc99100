"""What a dialect must offer, and the text of a statement with the schema of the connection it runs on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import sqlalchemy as sa

from jobkit.tables import JsonObject, UtcDateTime

Document = list[dict[str, Any]]
_CURSOR = re.compile(r"([0-9]{1,19})-([0-9]{1,19})", re.ASCII)
# The row of the event log that says up to where events were removed from it.
MARK = UUID(int=0)
PRUNED = "pruned"


class Position(NamedTuple):
    """A place in the event log: everything at or below it has been read. ``xid`` is 0 on SQLite."""

    xid: int
    id: int

    def __str__(self) -> str:
        return f"{self.xid}-{self.id}"

    @classmethod
    def parse(cls, cursor: str) -> Position:
        """The position that ``str()`` gave; ``ValueError`` for anything else."""
        if not isinstance(cursor, str) or not (found := _CURSOR.fullmatch(cursor)):
            raise ValueError(f"not a cursor of an event: {cursor!r:.80}")
        return cls(int(found[1]), int(found[2]))


class Start(NamedTuple):
    """Where a reader began: its first position, and the snapshot whose events it leaves out (empty on SQLite)."""

    position: Position
    snapshot: str


class ClaimedRow(NamedTuple):
    """A claimed job with the number of its ``running`` event."""

    job_id: UUID
    company_id: str
    job_type: str
    input: dict[str, Any]
    source_task_id: str | None
    fence: int
    attempt: int
    seq: int
    event_id: int


class ClaimTerms(NamedTuple):
    """On what a claim is made: how many jobs at most, for whom, for how many seconds of the database's clock."""

    limit: int
    worker_id: str
    lease: float
    now: datetime


class QueuedJob(NamedTuple):
    """A queued job that may run now, and what orders it within its company: ``at`` is its ``run_at``, or when it was
    created.
    """

    job_id: UUID
    company_id: str
    priority: int
    at: datetime


class RescueTerms(NamedTuple):
    """How jobs of lost workers go on: ``reason`` for those that are queued again, ``stopped`` for those that were
    rescued ``max_rescues`` times already.
    """

    limit: int
    max_rescues: int
    reason: str
    stopped: str
    now: datetime


class Held(NamedTuple):
    """A claim that still holds, and whether its job was asked to stop."""

    job_id: UUID
    cancelled: bool


class AppendedEvent(NamedTuple):
    """An event that a statement appended."""

    job_id: UUID
    event_id: int
    seq: int


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
    """A recorded key that a sweep may visit."""

    company_id: str
    object_key: str
    not_before: datetime


class PruneCounts(NamedTuple):
    """What went, or would go, with a batch of old jobs."""

    jobs: Sequence[UUID]
    events: int
    assets: int


class JobStatements(Protocol):
    """Creating jobs."""

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        """Insert a queued job with its first event; return the event's id, or None when its key has a job already."""

    def insert_jobs(
        self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool
    ) -> None:
        """Insert a company's queued jobs, each with its first event; ``jobs`` is a JSON array of ``{id, type, input,
        task, run_at, priority}``.
        """


class QueueStatements(Protocol):
    """What waits, and in which order. Locks nothing."""

    def due(self, connection: sa.Connection, *, window: int, limit: int, now: datetime) -> list[QueuedJob]:
        """Jobs whose ``run_at`` has come: the first ``limit``, the companies in turn, among the ``window`` first of
        each priority. Locks nothing.
        """

    def heads(self, connection: sa.Connection, companies: Sequence[str], each: int) -> list[QueuedJob]:
        """The first ``each`` jobs without ``run_at`` of each of these companies. Locks nothing."""

    def companies(self, connection: sa.Connection, *, limit: int) -> list[str]:
        """Companies with jobs that may run now, in order; the first ``limit`` of them."""

    def has_queued(self, connection: sa.Connection, *, now: datetime) -> bool:
        """Whether a claim is worth its write lock. A hint."""


class ClaimStatements(Protocol):
    """Claims: taken, prolonged, ended, rescued."""

    #: Whether a claim that finds nothing still takes the database's write lock, so that a poll should look first.
    claim_locks: bool

    def claim(self, connection: sa.Connection, *, terms: ClaimTerms) -> list[ClaimedRow]:
        """Take queued jobs of any company, a company's in order of priority and creation: fence + 1, each with its
        event.
        """

    def claim_of(
        self, connection: sa.Connection, companies: Sequence[str], each: int, *, terms: ClaimTerms
    ) -> list[ClaimedRow]:
        """As ``claim``, up to ``each`` jobs of each of these companies."""

    def claim_these(self, connection: sa.Connection, job_ids: Sequence[UUID], *, terms: ClaimTerms) -> list[ClaimedRow]:
        """As ``claim``, of these jobs, in this order, those that still may run."""

    def finish(
        self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime
    ) -> tuple[list[AppendedEvent], int]:
        """End the jobs whose fence still holds, with their files. The events of those, and how many intents went."""

    def renew(self, connection: sa.Connection, jobs: Document, *, lease: float) -> list[Held]:
        """Prolong the leases that still hold, from now on the database's clock."""

    def look(self, connection: sa.Connection, jobs: Document) -> list[Held]:
        """Which claims still hold. Writes nothing."""

    def advance(
        self, connection: sa.Connection, jobs: Document, *, lease: float, now: datetime
    ) -> list[tuple[EventRow, bool]]:
        """As ``renew``, with each job's ``progress``, never lower than before, and ``message``. The events, and which
        jobs were asked to stop.
        """

    def rescue(self, connection: sa.Connection, *, terms: RescueTerms) -> list[EventRow]:
        """Take running jobs whose lease is over from their lost workers, each with its event; the attempt is not
        charged.
        """

    def has_expired(self, connection: sa.Connection) -> bool:
        """Whether a rescue is worth its write lock. A hint."""


class IntentStatements(Protocol):
    """Keys that may hold an object without a live row."""

    def record_intents(self, connection: sa.Connection, intents: Document, *, grace: float) -> None:
        """Record each key; nothing sweeps it for ``grace`` seconds of the database's clock."""

    def due_intents(
        self, connection: sa.Connection, *, provider: str, state: str, early: float, after: datetime, limit: int
    ) -> Iterator[DueKey]:
        """Keys of ``state`` without a live row whose time has come, or comes within ``early`` seconds of the database's
        clock; the longest due first, from ``after`` on. A hint: only ``claim_intents`` decides.
        """

    def claim_intents(
        self, connection: sa.Connection, keys: Sequence[str], *, provider: str, state: str, early: float, hold: float
    ) -> list[str]:
        """Make those of ``keys`` that still are due ``collected``, due again in ``hold`` seconds; return them."""

    def drop_intents(self, connection: sa.Connection, keys: Sequence[str], *, provider: str) -> None:
        """Delete the records of collected keys."""

    def postpone_intents(self, connection: sa.Connection, failures: Document, *, provider: str) -> None:
        """Make collected keys tombstones again, each with its ``error``, due after a pause that doubles with every
        failure.
        """


class EventStatements(Protocol):
    """The event log: appended to and read."""

    #: Channels of NOTIFY: that there may be jobs to run, and that the log has grown. None where there is no NOTIFY.
    channels: tuple[str, ...]

    def append_event(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int:
        """Append one event to the log; return its id. ``notify``: hint at it when the transaction commits."""

    def version(self, connection: sa.Connection) -> int:
        """As long as this number is that of the last look on this connection, a scan finds nothing new. Costs less."""

    def log_file(self, connection: sa.Connection) -> str | None:
        """The file that every commit writes to, if there is one."""

    def start(self, connection: sa.Connection) -> Start:
        """The end of the event log as of now."""

    def start_after(self, after: Position) -> Start:
        """A start that leaves out nothing beyond ``after``."""

    def log_begins(self, connection: sa.Connection) -> Position:
        """The position up to which events may be gone from the log: a reader from below it may miss some."""

    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        """The next events that no later commit can precede, in order, and the position after them."""

    def of_company(
        self, connection: sa.Connection, after: Position, start: Start, company_id: str, limit: int
    ) -> tuple[list[EventRow], Position]:
        """The next committed events of a company by position, also those that later commits may precede; and the
        position up to which no later commit can.
        """

    def earlier(self, connection: sa.Connection, after: Position, start: Start, jobs: Document) -> Sequence[EventRow]:
        """Events of each job before a ``seq`` that lie beyond ``after``; with ``queued`` also the one just before, if
        it is ``queued``.
        """


class PruneStatements(Protocol):
    """Old jobs that are over, and what goes with them. ``before``: over since then, or longer."""

    #: Whether a transaction that writes keeps every other one from writing.
    one_writer: bool

    def over(
        self, connection: sa.Connection, *, before: datetime, after: UUID, limit: int
    ) -> tuple[list[UUID], UUID | None]:
        """Those among the next ``limit`` jobs by id, and the last id that was looked at, None at the end. A hint."""

    def weigh(self, connection: sa.Connection, jobs: Sequence[UUID], *, provider: str | None) -> PruneCounts:
        """What ``prune`` would delete. Writes nothing."""

    def prune(
        self, connection: sa.Connection, jobs: Sequence[UUID], *, before: datetime, provider: str | None
    ) -> PruneCounts:
        """Delete those of ``jobs`` that still are over and that nobody else is changing, with their events, moving the
        mark, and the assets that ``provider`` has of them, leaving tombstones. Waits for no lock on a row of a host.
        """

    def mark_pruned(self, connection: sa.Connection, upto: Position) -> None:
        """Remember, in the transaction that removes events, up to where that is. Never moves back."""


class Statements(
    JobStatements, QueueStatements, ClaimStatements, IntentStatements, EventStatements, PruneStatements, Protocol
):
    """The statements that differ. Each takes a connection in the caller's transaction and commits nothing."""


class Sql:
    """A statement with ``{s}`` where the schema goes, and the types of its parameters and columns.

    Calling it with a connection gives the clause for that connection's ``schema_translate_map``, which SQLAlchemy
    itself does not apply to written-out SQL.
    """

    def __init__(self, template: str, *columns: sa.ColumnClause[Any], **types: Any) -> None:
        self._template, self._columns, self._types = template, columns, types
        self._render = lru_cache(maxsize=16)(self._text)

    def __call__(self, connection: sa.Connection) -> Any:
        schemas = connection.get_execution_options().get("schema_translate_map")
        return self._render(schemas.get(None) if schemas else None)

    def _text(self, schema: str | None) -> Any:
        prefix = "" if schema is None else '"' + schema.replace('"', '""') + '".'
        clause = sa.text(self._template.replace("{s}", prefix))
        clause = clause.bindparams(*(sa.bindparam(name, type_=kind) for name, kind in self._types.items()))
        return clause.columns(*self._columns) if self._columns else clause


# The columns that statements of both databases return, and the parameters that both insert a job with.
CLAIMED = (
    sa.column("id", sa.Uuid()),
    sa.column("company_id", sa.Text()),
    sa.column("job_type", sa.Text()),
    sa.column("input", JsonObject()),
    sa.column("source_task_id", sa.Text()),
    sa.column("fence", sa.BigInteger()),
    sa.column("attempt", sa.Integer()),
    sa.column("event_seq", sa.Integer()),
    sa.column("event_id", sa.BigInteger()),
)
WAITING = (
    sa.column("id", sa.Uuid()),
    sa.column("company_id", sa.Text()),
    sa.column("priority", sa.Integer()),
    sa.column("at", UtcDateTime()),
)
HELD = (sa.column("id", sa.Uuid()), sa.column("cancelled", sa.Boolean()))
TOLD = (sa.column("job_id", sa.Uuid()), sa.column("id", sa.BigInteger()), sa.column("seq", sa.Integer()))
EVENT = (
    sa.column("id", sa.BigInteger()),
    sa.column("xid", sa.BigInteger()),
    sa.column("seq", sa.Integer()),
    sa.column("company_id", sa.Text()),
    sa.column("type", sa.Text()),
    sa.column("job_id", sa.Uuid()),
    sa.column("created_at", UtcDateTime()),
    sa.column("payload", JsonObject()),
)
ADVANCED = (*EVENT, sa.column("cancelled", sa.Boolean()))
DUE = (sa.column("company_id", sa.Text()), sa.column("object_key", sa.Text()), sa.column("not_before", UtcDateTime()))
MANY_PARAMETERS: dict[str, Any] = {"company_id": sa.Text(), "jobs": sa.Text(), "now": UtcDateTime()}
JOB_PARAMETERS: dict[str, Any] = {
    "id": sa.Uuid(),
    "company_id": sa.Text(),
    "job_type": sa.Text(),
    "input": sa.Text(),
    "source_task_id": sa.Text(),
    "run_at": UtcDateTime(),
    "priority": sa.Integer(),
    "key": sa.Text(),
    "payload": sa.Text(),
    "now": UtcDateTime(),
}


class Queue:
    """``jobkit._dialects.base.QueueStatements``, given its statements."""

    _due: Sql
    _heads: Sql
    _companies: Sql
    _has_queued: Sql

    def due(self, connection: sa.Connection, *, window: int, limit: int, now: datetime) -> list[QueuedJob]:
        values = {"window": window, "limit": limit, "now": now}
        return [QueuedJob(*row) for row in connection.execute(self._due(connection), values)]

    def heads(self, connection: sa.Connection, companies: Sequence[str], each: int) -> list[QueuedJob]:
        values = {"companies": json.dumps(companies), "each": each}
        return [QueuedJob(*row) for row in connection.execute(self._heads(connection), values)]

    def companies(self, connection: sa.Connection, *, limit: int) -> list[str]:
        return list(connection.execute(self._companies(connection), {"limit": limit}).scalars())

    def has_queued(self, connection: sa.Connection, *, now: datetime) -> bool:
        return bool(connection.execute(self._has_queued(connection), {"now": now}).scalar())


class Prune:
    """What looks for old jobs, of ``jobkit._dialects.base.PruneStatements``, given its statements."""

    _over: Sql
    _weigh: Sql

    def over(
        self, connection: sa.Connection, *, before: datetime, after: UUID, limit: int
    ) -> tuple[list[UUID], UUID | None]:
        rows = connection.execute(self._over(connection), {"before": before, "after": after, "limit": limit}).all()
        return [row.id for row in rows if row.over], rows[-1].id if rows else None

    def weigh(self, connection: sa.Connection, jobs: Sequence[UUID], *, provider: str | None) -> PruneCounts:
        return PruneCounts(jobs, *connection.execute(self._weigh(connection), these(jobs, provider=provider)).one())


def these(jobs: Sequence[UUID], **others: Any) -> dict[str, Any]:
    """The parameters of a statement about ``jobs``: SQLite's tables and PostgreSQL both know an id without dashes."""
    return {"jobs": json.dumps([job.hex for job in jobs]), **others}
