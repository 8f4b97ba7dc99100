"""JobStore: rows of ``content_jobs`` in the caller's own transaction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import datetime
from inspect import iscoroutinefunction
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa

from jobkit import outbox
from jobkit._dialects import statements_for
from jobkit.clock import Clock, aware, utcnow
from jobkit.errors import ConfigurationError, InvalidTransition, JobNotFound
from jobkit.ids import new_id, parse_id
from jobkit.payload import MAX_INPUT_BYTES, canonical
from jobkit.sqlite import require_configured
from jobkit.tables import content_jobs
from jobkit.text import company, sanitise, storable
from jobkit.types import Job, JobRequest, JobStatus

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session

    Host = Session | scoped_session[Session] | sa.Connection

# How much one statement of ``create_many`` carries: enough that round trips do not count, little enough for memory.
MAX_CHUNK_JOBS = 5_000
MAX_CHUNK_CHARACTERS = 8 << 20

_PATCHABLE = frozenset({"status", "result_asset_id", "error_message", "source_task_id", "started_at", "finished_at"})
_c = content_jobs.c


class JobStore:
    """Create, read and change jobs inside the transaction of ``session``: a Session, scoped_session or Connection.

    Never commits, never opens a transaction or connection of its own. As thread-safe as the session is: use one store
    per session. ``notify`` sends one payload-free ``pg_notify('jobkit', '')`` with a transaction that creates jobs, a
    hint for idle runners on PostgreSQL.
    """

    def __init__(
        self, session: Host, *, max_input_bytes: int = MAX_INPUT_BYTES, notify: bool = True, clock: Clock = utcnow
    ) -> None:
        self._session = session
        self._max_input_bytes = max_input_bytes
        self._notify = notify
        self._clock = clock

    def create(
        self,
        company_id: object,
        *,
        job_type: str,
        input: dict[str, Any] | None = None,
        source_task_id: str | None = None,
    ) -> Job:
        """Insert a queued job and its ``content_job.queued`` event; both go with the transaction, savepoints included.

        ``input`` is copied. ``ValueError`` naming the field, with nothing written, for: a blank or missing company, a
        blank job type, an input that is not a JSON object both databases can store (see ``jobkit.payload``), text
        with NUL or lone surrogates. ``ConfigurationError`` for a connection in AUTOCOMMIT, and for an SQLite engine
        without ``configure_sqlite``.
        """
        return self.insert(company_id, job_type=job_type, input=input, source_task_id=source_task_id)[0]

    def insert(
        self, company_id: object, *, job_type: str, input: dict[str, Any] | None, source_task_id: str | None
    ) -> tuple[Job, int]:
        """``create``, with the id of the event it appended."""
        owner = company(company_id)
        text, copy = self._checked_request(job_type, input, source_task_id)
        connection = self._writable()
        job_id, now = new_id(), self._clock()
        values = {
            "id": job_id,
            "company_id": owner,
            "job_type": job_type,
            "input": text,
            "source_task_id": source_task_id,
            "payload": json.dumps({"jobId": str(job_id)}),
            "now": now,
        }
        event_id = statements_for(connection).insert_job(connection, values, notify=self._notify)
        job = _queued(job_id=job_id, owner=owner, job_type=job_type, input=copy, source_task_id=source_task_id, now=now)
        return job, event_id

    def create_many(self, company_id: object, requests: Iterable[JobRequest]) -> list[Job]:
        """Insert many queued jobs of one company, each with its event; return them in the order of ``requests``.

        All of them or none: every request is checked before the first is written, and a ``ValueError`` says which one
        and which field. One statement for some thousands of jobs: far faster than ``create`` in a loop.
        """
        owner = company(company_id)
        drafts = [self._checked_draft(position, request) for position, request in enumerate(requests)]
        connection = self._writable()
        now = self._clock()
        chunks = _chunks(drafts)
        first = list(islice(chunks, 2))
        # A host may catch the error of a later chunk and commit; the savepoint takes the earlier ones back.
        with connection.begin_nested() if len(first) > 1 else nullcontext():
            for chunk in chain(first, chunks):
                statements_for(connection).insert_jobs(
                    connection, owner, f"[{','.join(chunk)}]", now=now, notify=self._notify
                )
        return [
            _queued(job_id=d.job_id, owner=owner, job_type=d.job_type, input=d.input, source_task_id=d.task, now=now)
            for d in drafts
        ]

    def get_by_id(self, job_id: UUID | str, *, company_id: object = None) -> Job | None:
        """The job, or None: unknown, malformed, or another company's when ``company_id`` is given."""
        parsed = parse_id(job_id)
        if parsed is None:
            return None
        query = sa.select(content_jobs).where(_c.id == parsed)
        if company_id is not None:
            query = query.where(_c.company_id == company(company_id))
        row = self._connection().execute(query).one_or_none()
        return None if row is None else job_of(row)

    def list_by_company(
        self,
        company_id: object,
        *,
        status: JobStatus | str | None = None,
        job_type: str | None = None,
        limit: int | None = None,
        before: Job | UUID | str | None = None,
    ) -> list[Job]:
        """A company's jobs, newest first, ties broken by id; all of them unless ``limit`` says how many.

        ``before`` is the last job of the page before this one. ``JobNotFound`` when it is none of the company's.
        """
        owner = company(company_id)
        query = sa.select(content_jobs).where(_c.company_id == owner)
        if status is not None:
            query = query.where(_c.status == _status(status).value)
        if job_type is not None:
            query = query.where(_c.job_type == storable(job_type, "job_type", blank=True))
        if before is not None:
            last = before if isinstance(before, Job) else self.get_by_id(before, company_id=owner)
            if last is None or last.company_id != owner:
                raise JobNotFound(before.id if isinstance(before, Job) else before)
            query = query.where(sa.tuple_(_c.created_at, _c.id) < sa.tuple_(*_position(last)))
        query = query.order_by(_c.created_at.desc(), _c.id.desc()).limit(page_size(limit))
        return [job_of(row) for row in self._connection().execute(query)]

    def transition(
        self, job_id: UUID | str, *, expect: JobStatus | str | Iterable[JobStatus | str] | None = None, **patch: Any
    ) -> Job:
        """Change a job by hand; return it as it then is. A change of status appends that status' event.

        ``patch`` takes ``status``, ``result_asset_id``, ``error_message``, ``source_task_id``, ``started_at`` and
        ``finished_at``, nothing else (``TypeError``); ``updated_at`` is set. Entering ``running`` is a claim by hand:
        fence + 1, no lease, never rescued. Leaving ``running`` ends a runner's claim, whose late writes then change
        nothing. ``JobNotFound``; ``InvalidTransition`` when the status is not among ``expect``, or when a terminal
        status would be left and ``expect`` does not name it.
        """
        values = _checked(patch)
        expected = _statuses(expect)
        parsed = parse_id(job_id)
        connection = self._writable()
        # Compare and set: the row may change between the read and the write, and the write then counts no row.
        while True:
            row = parsed and connection.execute(sa.select(content_jobs).where(_c.id == parsed)).one_or_none()
            if not row:
                raise JobNotFound(job_id)
            job = job_of(row)
            changed = self._move(connection, job, values, expected)
            if changed is not None:
                return changed

    def _move(
        self, connection: sa.Connection, job: Job, values: dict[str, Any], expected: frozenset[JobStatus] | None
    ) -> Job | None:
        status: JobStatus = values.get("status", job.status)
        if expected is not None and job.status not in expected:
            raise InvalidTransition(job.id, job.status, f"expected {', '.join(sorted(expected)) or 'nothing'}")
        if status != job.status and job.status.terminal and expected is None:
            raise InvalidTransition(job.id, job.status, f"name it in expect= to make it {status.value!r}")
        now = self._clock()
        update = content_jobs.update().where(_c.id == job.id, _c.status == job.status.value, _c.fence == job.fence)
        update = update.values({**values, "status": status.value, "updated_at": now})
        if status != job.status:
            update = update.values(event_seq=_c.event_seq + 1, lease_until=None, worker_id=None)
            if status is JobStatus.RUNNING:
                update = update.values(fence=_c.fence + 1)
        row = connection.execute(update.returning(content_jobs)).one_or_none()
        if row is None:
            return None
        changed = job_of(row)
        if status != job.status:
            outbox.append(connection, changed)
        return changed

    def _checked_request(
        self, job_type: str, input: dict[str, Any] | None, source_task_id: str | None
    ) -> tuple[str, dict[str, Any]]:
        """The input as JSON text and as a copy; ``ValueError`` naming the field that cannot be stored."""
        storable(job_type, "job_type", limit=255)
        if source_task_id is not None:
            storable(source_task_id, "source_task_id", blank=True)
        return canonical({} if input is None else input, max_bytes=self._max_input_bytes)

    def _checked_draft(self, position: int, request: JobRequest) -> _Draft:
        if not isinstance(request, JobRequest):
            raise TypeError(f"requests[{position}] must be a JobRequest, not {type(request).__name__}")
        try:
            text, copy = self._checked_request(request.job_type, request.input, request.source_task_id)
        except (TypeError, ValueError) as error:
            raise type(error)(f"requests[{position}]: {error}") from None
        return _Draft(new_id(), request.job_type, copy, request.source_task_id, text)

    def _connection(self) -> sa.Connection:
        return connection_of(self._session)

    def _writable(self) -> sa.Connection:
        connection = self._connection()
        require_configured(connection)
        # Some drivers have no such attribute; those never commit by themselves here.
        if connection.dialect.name != "sqlite" and getattr(connection.connection, "autocommit", False) is True:
            raise ConfigurationError(
                "this connection is in AUTOCOMMIT: jobkit needs a transaction that the host commits or rolls back; "
                'use a connection without isolation_level="AUTOCOMMIT"'
            )
        return connection


class _Draft(NamedTuple):
    """A checked request, with the id it gets."""

    job_id: UUID
    job_type: str
    input: dict[str, Any]
    task: str | None
    input_text: str

    def document(self) -> str:
        """The job as ``Statements.insert_jobs`` reads it; its input is JSON text already."""
        rest = json.dumps({"id": str(self.job_id), "type": self.job_type, "task": self.task})
        return f'{rest[:-1]},"input":{self.input_text}}}'


def _chunks(drafts: list[_Draft]) -> Iterator[list[str]]:
    """The drafts as JSON, in pieces that a statement can carry."""
    chunk: list[str] = []
    size = 0
    for draft in drafts:
        document = draft.document()
        if chunk and (len(chunk) == MAX_CHUNK_JOBS or size + len(document) > MAX_CHUNK_CHARACTERS):
            yield chunk
            chunk, size = [], 0
        chunk.append(document)
        size += len(document)
    if chunk:
        yield chunk


def connection_of(session: Host) -> sa.Connection:
    """The connection of the host's transaction. ``TypeError`` for anything but a Session or Connection."""
    if isinstance(session, sa.Connection):
        return session
    if hasattr(session, "sync_connection") or iscoroutinefunction(getattr(session, "connection", None)):
        raise TypeError("an asynchronous session: await session.run_sync(lambda s: JobStore(s).create(...))")
    if not hasattr(session, "connection"):
        raise TypeError(f"expected a Session, scoped_session or Connection, not {type(session).__name__}")
    return session.connection(bind_arguments={"clause": content_jobs})


def job_of(row: sa.Row[Any]) -> Job:
    """A row of ``content_jobs``, all columns in the table's order, as a Job."""
    values = list(row)
    values[3] = JobStatus(values[3])
    return Job(*values)


def page_size(limit: int | None) -> int | None:
    """``limit`` when it is None or a count, at most what a database can count to; ``ValueError`` otherwise."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit must be a count, not {limit!r}")
    return min(limit, (1 << 63) - 1)


def _queued(
    *, job_id: UUID, owner: str, job_type: str, input: dict[str, Any], source_task_id: str | None, now: datetime
) -> Job:
    return Job(
        id=job_id,
        company_id=owner,
        job_type=job_type,
        status=JobStatus.QUEUED,
        input=input,
        result_asset_id=None,
        error_message=None,
        source_task_id=source_task_id,
        started_at=None,
        finished_at=None,
        created_at=now,
        updated_at=now,
        fence=0,
        attempt=0,
        rescues=0,
        lease_until=None,
        worker_id=None,
        run_at=None,
        priority=0,
        idempotency_key=None,
        cancel_requested_at=None,
        progress=None,
        progress_message=None,
        event_seq=1,
        trace=None,
    )


def _position(job: Job) -> list[Any]:
    return [sa.literal(job.created_at, _c.created_at.type), sa.literal(job.id, _c.id.type)]


def _statuses(expect: JobStatus | str | Iterable[JobStatus | str] | None) -> frozenset[JobStatus] | None:
    if expect is None:
        return None
    return frozenset(_status(status) for status in ([expect] if isinstance(expect, str) else expect))


def _status(value: JobStatus | str) -> JobStatus:
    try:
        return JobStatus(value)
    except ValueError:
        raise ValueError(f"status must be one of {', '.join(JobStatus)}, not {value!r:.80}") from None


def _checked(patch: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(patch.keys() - _PATCHABLE):
        raise TypeError(f"transition cannot change {', '.join(unknown)}; it takes {', '.join(sorted(_PATCHABLE))}")
    values = dict(patch)
    if "status" in values:
        values["status"] = _status(values["status"])
    for name in ("started_at", "finished_at"):
        if values.get(name) is not None:
            values[name] = aware(values[name], name)
    if values.get("error_message") is not None:
        values["error_message"] = sanitise(str(values["error_message"]))
    if values.get("source_task_id") is not None:
        storable(values["source_task_id"], "source_task_id", blank=True)
    if values.get("result_asset_id") is not None:
        values["result_asset_id"] = parse_id(values["result_asset_id"])
        if values["result_asset_id"] is None:
            raise ValueError(f"result_asset_id is not a UUID: {patch['result_asset_id']!r:.80}")
    return values
