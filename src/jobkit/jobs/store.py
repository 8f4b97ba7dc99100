"""JobStore: rows of ``content_jobs`` in the caller's own transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import CENTURY, Clock, aware, utcnow
from jobkit.base.ids import ANY_COMPANY, CompanyId, CompanyScope, company_text, parse_id, require_company_id
from jobkit.base.text import sanitise, storable
from jobkit.db.dialects import statements_for
from jobkit.db.host import connection_of, has_asset_id, in_scope, may_notify, of_company, page_size, writable
from jobkit.errors import (
    AssetNotFound,
    ConfigurationError,
    IdempotencyConflict,
    InvalidTransition,
    JobNotFound,
)
from jobkit.jobs import outbox
from jobkit.jobs.creation import MAX_INPUT_BYTES, NewJob, checked, checked_many, chunks, prefetched
from jobkit.jobs.selection import ENDED, REPEATABLE, STOPPABLE, Which, selected, status_of
from jobkit.tables import JOB_COLUMNS, assets, content_jobs
from jobkit.types import NOT_READ, Job, JobRequest, JobStatus

if TYPE_CHECKING:
    from jobkit.db.host import Host


# How often a row is read again that others change, or hide.
TRIES = 20
LEFT_OUT = (
    "the insert of a job was accepted, and no row is there: a trigger of the host's on content_jobs leaves it out"
)
_PATCHABLE = frozenset({"status", "result_asset_id", "error_message", "source_task_id", "started_at", "finished_at"})
_c = content_jobs.c
# NULL in the place of the input, so that the columns keep their places.
_WITHOUT_INPUT = [sa.null().label("input") if column is _c.input else column for column in JOB_COLUMNS]
# Jobs that a call changes at most, unless it is told another limit: their rows are locked until the host commits.
BATCH = 100


class JobStore:
    """Create, read and change jobs inside the transaction of ``session``: a Session, scoped_session or Connection.

    Never commits, never opens a transaction or connection of its own. As thread-safe as the session is: use one store
    per session. ``notify`` sends one ``pg_notify`` without payload with a transaction that creates or changes jobs, on
    PostgreSQL: a hint for idle runners and relays.
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
        company_id: CompanyId,
        *,
        job_type: str,
        input: dict[str, Any] | None = None,
        source_task_id: str | None = None,
        run_at: datetime | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
    ) -> Job:
        """Insert a queued job and its ``content_job.queued`` event; both go with the transaction, savepoints included.

        ``run_at``: not before this time. ``priority``: higher first, within the company. ``idempotency_key``: unique
        for the company and job type as long as the row exists; a repeat gets the same job back, whatever its status,
        with no second event, and ``IdempotencyConflict`` when its input is another.

        ``input`` is copied. ``ValueError`` naming the field, with nothing written, for: a blank or missing company, a
        blank job type, an input that is not a JSON object both databases can store (see ``jobkit.jobs.creation``), text
        with NUL or lone surrogates, a naive ``run_at``. ``ConfigurationError`` for a connection in AUTOCOMMIT, and for
        an SQLite engine without ``configure_sqlite``.
        """
        request = JobRequest(job_type, input, source_task_id, run_at, priority, idempotency_key)
        return self.insert(company_id, request)[0]

    def insert(self, company_id: CompanyId, request: JobRequest) -> tuple[Job, int | None]:
        """``create``, with the id of the event it appended: None when the job was there already."""
        owner = require_company_id(company_id)
        wanted = checked(request, self._max_input_bytes)
        return self._insert(writable(self._session), wanted.draft(owner, self._clock()))

    def create_many(self, company_id: CompanyId, requests: Iterable[JobRequest]) -> list[Job]:
        """Insert many queued jobs of one company, each with its event; return them in the order of ``requests``.

        All of them or none: every request is checked before the first is written, and a ``ValueError`` says which one
        and which field. One statement for a thousand jobs, and the next thousand is made ready on a thread meanwhile:
        far faster than ``create`` in a loop. Requests with an ``idempotency_key`` are inserted one by one.
        """
        owner = require_company_id(company_id)
        wanted = checked_many(requests, self._max_input_bytes)
        count = len(wanted)
        pieces = chunks(wanted, owner, now := self._clock())
        first = next(pieces, None)
        connection = writable(self._session)
        if first is None:
            return []
        made: list[Job] = []
        keyed: list[NewJob] = []
        whole = len(first.jobs) == count
        # A host may catch an error and commit; the savepoint undoes the statements before the one that failed.
        one = whole and first.statements == 1
        savepoint: AbstractContextManager[object] = nullcontext() if one else connection.begin_nested()
        with savepoint, closing(prefetched(first, pieces)) as prepared:
            for chunk in [first] if whole else prepared:
                made += chunk.jobs
                keyed += chunk.keyed
                if chunk.array is not None:
                    notify = self._notify and may_notify(connection)
                    statements = statements_for(connection)
                    inserted = statements.insert_jobs(connection, owner, chunk.array, now=now, notify=notify)
                    if inserted != len(chunk.jobs) - len(chunk.keyed):
                        raise ConfigurationError(LEFT_OUT)
            known = {draft.job.id: self._insert(connection, draft)[0] for draft in keyed}
        return [known.get(job.id, job) for job in made] if known else made

    def _insert(self, connection: sa.Connection, draft: NewJob) -> tuple[Job, int | None]:
        notify = self._notify and may_notify(connection)
        for _ in range(TRIES):
            event_id = statements_for(connection).insert_job(connection, draft.values(), notify=notify)
            if event_id is not None:
                return draft.job, event_id
            row = connection.execute(_same_key(draft.job)).one_or_none()
            if row is None:  # it was deleted just now
                continue
            job = job_of(row)
            # As text, because Python takes 1, 1.0 and True for equal. PostgreSQL does not keep the order of keys.
            if json.dumps(job.input, sort_keys=True) != json.dumps(draft.job.input, sort_keys=True):
                raise IdempotencyConflict(job.id, draft.job.idempotency_key or "")
            return job, None
        if draft.job.idempotency_key is None:
            raise ConfigurationError(LEFT_OUT)
        raise ConfigurationError(
            f"a job of company {draft.job.company_id!r} and type {draft.job.job_type!r} has this idempotency_key, and "
            "this connection may not see it: row-level security hides it, or others delete and create it all the time"
        )

    def get_by_id(self, job_id: UUID | str, *, company_id: CompanyScope = ANY_COMPANY) -> Job | None:
        """The job, or None: unknown, malformed, or not of the company that ``company_id`` names."""
        parsed, theirs = parse_id(job_id), in_scope(_c.company_id, company_id)
        if parsed is None:
            return None
        query = sa.select(*JOB_COLUMNS).where(_c.id == parsed, theirs)
        row = connection_of(self._session).execute(query).one_or_none()
        return None if row is None else job_of(row)

    def list_by_company(
        self,
        company_id: CompanyId,
        *,
        limit: int | None = None,
        before: Job | UUID | str | None = None,
        with_input: bool = True,
        **which: Unpack[Which],
    ) -> list[Job]:
        """A company's jobs, newest first, ties broken by id; all of them unless ``limit`` says how many.

        ``which``: only those with this ``status``, ``job_type``, ``source_task_id``, created at or after ``since`` and
        before ``until``. ``before`` is the last job of the page before this one. ``JobNotFound`` when it is none of the
        company's. ``with_input=False`` leaves the inputs in the database: each job's ``input`` is an empty dict, and
        missing in its ``to_dict``.
        """
        query = sa.select(*(JOB_COLUMNS if with_input else _WITHOUT_INPUT))
        query = query.where(of_company(_c.company_id, company_id), *selected(**which))
        if before is not None:
            last = before if isinstance(before, Job) else self.get_by_id(before, company_id=company_id)
            if last is None or last.company_id != company_text(company_id):
                raise JobNotFound(before.id if isinstance(before, Job) else before)
            query = query.where(sa.tuple_(_c.created_at, _c.id) < sa.tuple_(*_position(last)))
        query = query.order_by(_c.created_at.desc(), _c.id.desc()).limit(page_size(limit))
        return [job_of(row) for row in connection_of(self._session).execute(query)]

    def count_by_company(self, company_id: CompanyId, **which: Unpack[Which]) -> dict[JobStatus, dict[str, int]]:
        """How many jobs a company has, by status and then by job type; ``which`` as for ``list_by_company``. What there
        is none of is missing.
        """
        kinds = (_c.status, _c.job_type)
        query = sa.select(*kinds, sa.func.count()).where(of_company(_c.company_id, company_id))
        query = query.where(*selected(**which)).group_by(*kinds).order_by(*kinds)
        counts: dict[JobStatus, dict[str, int]] = {}
        for status, job_type, count in connection_of(self._session).execute(query):
            counts.setdefault(JobStatus(status), {})[job_type] = count
        return counts

    def cancel_all(self, company_id: CompanyScope, *, limit: int = BATCH, **which: Unpack[Which]) -> int:
        """Cancel, as ``cancel``, up to ``limit`` of the queued and running jobs that match; how many. Each has its
        event. ``which`` as for ``list_by_company``.

        Commit, and call it again until it finds none: whatever interrupts that, the next call goes on. A job that was
        asked to stop is not asked again; one that another transaction is changing is left to a later call.
        """
        which_ones = [*selected(STOPPABLE, **which), _c.cancel_requested_at.is_(None)]
        return self._change_all(company_id, which_ones, limit, self._cancel)

    def retry_all(self, company_id: CompanyScope, *, limit: int = BATCH, **which: Unpack[Which]) -> int:
        """Retry, as ``retry``, up to ``limit`` of the failed and cancelled jobs that match; how many. As
        ``cancel_all``.
        """
        return self._change_all(company_id, selected(REPEATABLE, **which), limit, self._retry)

    def delete(
        self, company_id: CompanyScope, *, limit: int = BATCH, provider: str | None = None, **which: Unpack[Which]
    ) -> int:
        """Delete up to ``limit`` of the jobs that match and are done, failed or cancelled, with their events; how many.
        Call it again, as ``cancel_all``.

        ``provider``: that of the ``AssetStore`` whose files of these jobs are deleted with them, as by its ``delete``;
        without it asset rows stay, as with ``prune``. Whoever still reads the deleted events resumes with
        ``EventsPruned``. ``IntegrityError`` when a row of the host refers to one of the jobs.
        """
        connection = writable(self._session)
        found = connection.execute(_batch(company_id, selected(ENDED, **which), limit))
        ids = [row.id for row in found]
        before = self._clock() + timedelta(seconds=CENTURY)
        gone = statements_for(connection).prune(connection, ids, before=before, provider=provider) if ids else None
        return len(gone.jobs) if gone else 0

    def _change_all(
        self,
        company_id: CompanyScope,
        which: list[sa.ColumnElement[bool]],
        limit: int,
        change: Callable[[sa.Connection, Job], Job | None],
    ) -> int:
        connection = writable(self._session)
        jobs = [job_of(row) for row in connection.execute(_batch(company_id, which, limit))]
        return sum(change(connection, job) is not None for job in jobs)

    def transition(
        self,
        /,
        job_id: UUID | str,
        *,
        company_id: CompanyScope = ANY_COMPANY,
        expect: JobStatus | str | Iterable[JobStatus | str] | None = None,
        **patch: Any,
    ) -> Job:
        """Change a job by hand; return it as it then is. A change of status appends that status' event.

        ``patch`` takes ``status``, ``result_asset_id``, ``error_message``, ``source_task_id``, ``started_at`` and
        ``finished_at``, nothing else (``TypeError``); ``updated_at`` is set. Entering ``running`` is a claim by hand:
        fence + 1, no lease, never rescued. Leaving ``running`` ends a runner's claim, whose late writes then change
        nothing. ``JobNotFound``; ``AssetNotFound`` when ``result_asset_id`` is another company's;
        ``InvalidTransition`` when the status is not among ``expect``, or when a terminal
        status would be left and ``expect`` does not name it.
        """
        values = _checked(patch)
        return self._settle(job_id, company_id, partial(self._move, values=values, expected=_statuses(expect)))

    def cancel(self, job_id: UUID | str, *, company_id: CompanyScope = ANY_COMPANY) -> Job:
        """Stop a job; return it as it then is. A cancelled job is returned as it is.

        A queued job is cancelled at once, with its event. A running one is asked to stop: ``cancel_requested_at`` is
        set, its renderer's next ``ctx.check()`` raises ``JobCancelled``, and it may still finish first.
        ``JobNotFound``, also for another company's; ``InvalidTransition`` when the job is done or failed.
        """
        return self._settle(job_id, company_id, self._cancel)

    def retry(self, job_id: UUID | str, *, company_id: CompanyScope = ANY_COMPANY) -> Job:
        """Put a failed or cancelled job back into the queue, as new, and append ``content_job.queued``.

        Clears ``error_message``, ``result_asset_id``, ``started_at``, ``finished_at``, ``attempt``, ``rescues`` and
        ``run_at``; ``fence`` and ``event_seq`` go on. ``JobNotFound``; ``InvalidTransition`` for any other status.
        """
        return self._settle(job_id, company_id, self._retry)

    def _settle(
        self,
        job_id: UUID | str,
        company_id: CompanyScope,
        change: Callable[[sa.Connection, Job], Job | None],
    ) -> Job:
        """Change a job by compare and set: a row that others change between the read and the write is read again."""
        connection = writable(self._session)
        read = JobStore(connection)  # a session that routes would read elsewhere
        for _ in range(TRIES):
            job = read.get_by_id(job_id, company_id=company_id)
            if job is None:
                raise JobNotFound(job_id)
            changed = change(connection, job)
            if changed is not None:
                return changed
        raise ConfigurationError(
            f"job {job_id} is there, and none of {TRIES} updates changed it: row-level security forbids that, or "
            "others change it all the time"
        )

    def _cancel(self, connection: sa.Connection, job: Job) -> Job | None:
        now = self._clock()
        if job.status is JobStatus.RUNNING:
            return self._set(connection, job, {"cancel_requested_at": job.cancel_requested_at or now})
        if job.status is JobStatus.QUEUED:
            return self._set(connection, job, {"status": JobStatus.CANCELLED, "finished_at": now, "updated_at": now})
        if job.status is JobStatus.CANCELLED:
            return job
        raise InvalidTransition(job.id, job.status, "only a queued or running job can be cancelled")

    def _retry(self, connection: sa.Connection, job: Job) -> Job | None:
        if job.status not in REPEATABLE:
            raise InvalidTransition(job.id, job.status, "only a failed or cancelled job can be retried")
        cleared = dict.fromkeys(
            (
                "error_message",
                "error_detail",
                "result_asset_id",
                "started_at",
                "finished_at",
                "run_at",
                "progress",
                "progress_message",
            )
        )
        return self._set(connection, job, {**cleared, "status": JobStatus.QUEUED, "attempt": 0, "rescues": 0})

    def _move(
        self, connection: sa.Connection, job: Job, values: dict[str, Any], expected: frozenset[JobStatus] | None
    ) -> Job | None:
        status: JobStatus = values.get("status", job.status)
        if expected is not None and job.status not in expected:
            raise InvalidTransition(job.id, job.status, f"expected {', '.join(sorted(expected)) or 'nothing'}")
        if status != job.status and job.status.terminal and expected is None:
            raise InvalidTransition(job.id, job.status, f"name it in expect= to make it {status.value!r}")
        if values.get("result_asset_id") is not None:
            asset_id = has_asset_id(connection, values["result_asset_id"])
            owner = connection.execute(sa.select(assets.c.company_id).where(asset_id)).scalar()
            if owner not in (None, job.company_id):
                raise AssetNotFound(f"no asset {values['result_asset_id']} of company {job.company_id!r}")
        return self._set(connection, job, values)

    def _set(self, connection: sa.Connection, job: Job, values: dict[str, Any]) -> Job | None:
        """Write ``values`` if the job's status and fence are still those of ``job``; with a new status, its event."""
        status: JobStatus = values.get("status", job.status)
        update = content_jobs.update().where(_c.id == job.id, _c.status == job.status.value, _c.fence == job.fence)
        update = update.values({"updated_at": self._clock(), **values, "status": status.value})
        if status != job.status:
            update = update.values(
                event_seq=_c.event_seq + 1, lease_until=None, worker_id=None, cancel_requested_at=None
            )
            if status is JobStatus.RUNNING:
                update = update.values(fence=_c.fence + 1)
        row = connection.execute(update.returning(*JOB_COLUMNS)).one_or_none()
        if row is None:
            return None
        changed = job_of(row)
        if status != job.status:
            outbox.append(connection, changed, notify=self._notify and may_notify(connection))
        return changed


def job_of(row: sa.Row[Any]) -> Job:
    """A row of ``JOB_COLUMNS`` as a Job."""
    values = list(row)
    values[3] = JobStatus(values[3])
    if values[4] is None:
        values[4] = NOT_READ
    return Job(*values)


def _same_key(job: Job) -> sa.Select[Any]:
    """The row whose idempotency key ``job`` repeats."""
    return sa.select(*JOB_COLUMNS).where(
        _c.company_id == job.company_id, _c.job_type == job.job_type, _c.idempotency_key == job.idempotency_key
    )


def _batch(company_id: CompanyScope, which: list[sa.ColumnElement[bool]], limit: int) -> sa.Select[Any]:
    """The oldest jobs that match, without their input; on PostgreSQL locked, without those that others have locked."""
    query = sa.select(*_WITHOUT_INPUT).where(in_scope(_c.company_id, company_id), *which)
    query = query.order_by(_c.created_at, _c.id).limit(page_size(limit))
    return query.with_for_update(skip_locked=True, key_share=True)


def _position(job: Job) -> list[Any]:
    return [sa.literal(job.created_at, _c.created_at.type), sa.literal(job.id, _c.id.type)]


def _statuses(expect: JobStatus | str | Iterable[JobStatus | str] | None) -> frozenset[JobStatus] | None:
    if expect is None:
        return None
    return frozenset(status_of(status) for status in ([expect] if isinstance(expect, str) else expect))


def _checked(patch: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(patch.keys() - _PATCHABLE):
        raise TypeError(f"transition cannot change {', '.join(unknown)}; it takes {', '.join(sorted(_PATCHABLE))}")
    values = dict(patch)
    if "status" in values:
        values["status"] = status_of(values["status"])
    for name in ("started_at", "finished_at"):
        if values.get(name) is not None:
            values[name] = aware(values[name], name)
    if "error_message" in values:
        values["error_detail"] = None  # it belongs to the message before
    if values.get("error_message") is not None:
        values["error_message"] = sanitise(str(values["error_message"]))
    if values.get("source_task_id") is not None:
        storable(values["source_task_id"], "source_task_id", blank=True)
    if values.get("result_asset_id") is not None:
        values["result_asset_id"] = parse_id(values["result_asset_id"])
        if values["result_asset_id"] is None:
            raise ValueError(f"result_asset_id is not a UUID: {patch['result_asset_id']!r:.80}")
    return values
