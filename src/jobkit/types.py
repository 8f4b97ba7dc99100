"""The values that cross jobkit's public surface: frozen dataclasses with the column names as attributes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from os import PathLike
from typing import Any, BinaryIO
from uuid import UUID

from jobkit.base.ids import CompanyId as CompanyId  # noqa: PLC0414 - a name of the public surface
from jobkit.base.ids import CompanyScope as CompanyScope  # noqa: PLC0414 - as above

Body = bytes | bytearray | memoryview | PathLike[str] | BinaryIO | Iterable[bytes]
"""The content of a file. No ``str``, which could be text or a path."""


class JobStatus(StrEnum):
    """The status of a job. "Scheduled" and "retrying" are predicates on ``queued``, not statuses."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED)


CONTENT_JOB_STATUSES = tuple(status.value for status in JobStatus)

CONTENT_JOB_EVENTS = (
    "content_job.queued",
    "content_job.running",
    "content_job.done",
    "content_job.failed",
    "content_job.cancelled",
    "content_job.progress",
    "content_job.retrying",
)


class _NotRead(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        raise KeyError(f"{key}: the input was not read, because of with_input=False")


#: The ``input`` of jobs that were listed without it.
NOT_READ: dict[str, Any] = _NotRead()

# What the wire forms have: each field is named here, so that no later column gets out by itself.
_JOB_WIRE = (
    "id", "company_id", "job_type", "status", "input", "result_asset_id", "error_message", "source_task_id",
    "started_at", "finished_at", "created_at", "updated_at", "attempt", "run_at", "priority", "cancel_requested_at",
    "progress", "progress_message",
)  # fmt: skip
_ASSET_WIRE = (
    "id", "company_id", "job_id", "position", "content_type", "byte_size", "sha256", "original_filename",
    "created_by_agent_id", "created_by_user_id", "source_task_id", "created_at", "updated_at",
)  # fmt: skip


def _wire(row: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {_camel(name): _wire_value(getattr(row, name)) for name in names}


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


def _wire_value(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return str(value) if isinstance(value, UUID | StrEnum) else value


@dataclass(frozen=True, slots=True)
class Job:
    """A row of ``content_jobs`` as it was read."""

    id: UUID
    company_id: str
    job_type: str
    status: JobStatus
    input: dict[str, Any]
    result_asset_id: UUID | None
    error_message: str | None
    source_task_id: str | None
    started_at: datetime | None
    finished_at: datetime | None
    created_at: datetime
    updated_at: datetime
    fence: int
    attempt: int
    rescues: int
    lease_until: datetime | None
    worker_id: str | None
    run_at: datetime | None
    priority: int
    idempotency_key: str | None
    cancel_requested_at: datetime | None
    progress: float | None
    progress_message: str | None
    event_seq: int
    trace: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """The wire form, for the company's own users: camelCase, ids as text, times as ISO-8601 UTC with milliseconds.
        Nothing of the runner is in it: no fence, lease, worker, place in the log, trace or idempotency key.
        """
        wire = _wire(self, _JOB_WIRE)
        if self.input is NOT_READ:
            del wire["input"]
        return wire


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job to be made by ``JobStore.create_many``; the fields are the arguments of ``create``."""

    job_type: str
    input: dict[str, Any] | None = None
    source_task_id: str | None = None
    run_at: datetime | None = None
    priority: int = 0
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Asset:
    """A row of ``assets`` as it was read. Its bytes are in the storage ``provider``, under ``object_key``."""

    id: UUID
    company_id: str
    provider: str
    object_key: str
    content_type: str
    byte_size: int
    sha256: str
    original_filename: str | None
    created_by_agent_id: str | None
    created_by_user_id: str | None
    source_task_id: str | None
    created_at: datetime
    updated_at: datetime
    job_id: UUID | None
    position: int

    def to_dict(self) -> dict[str, Any]:
        """The wire form, as ``Job.to_dict``; without the storage and the key in it."""
        return _wire(self, _ASSET_WIRE)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A file that ``put_file`` stored. ``recorded``: whether an intent was committed before the object existed."""

    provider: str
    object_key: str
    content_type: str
    byte_size: int
    sha256: str
    original_filename: str | None
    recorded: bool = True


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """The number of keys that a sweep visited or, when ``dry_run``, would visit.

    ``abandoned``: keys of files that never got a row. ``deleted``: keys whose row was deleted. ``settled``: keys swept
    before, whose record is deleted after its quarantine. ``failed``: keys whose object the storage did not delete,
    tried again later and counted nowhere else. ``byte_size``: bytes of the deleted objects, None where each would take
    a request to the storage. ``sample``: up to ten of the abandoned and deleted keys.
    """

    dry_run: bool
    abandoned: int
    deleted: int
    settled: int
    failed: int
    byte_size: int | None
    sample: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunnerMetrics:
    """A runner's counts since it was made.

    ``ended``: attempts that ended a job. ``rejected``: results that were not written because this runner had lost the
    job, after a lost lease or a cancel. ``replaced``: threads given up, blocked by a renderer beyond its ``timeout``, a
    slow storage, or a database that never answers.

    ``left_behind`` is no count: so many threads are kept, now or when it was stopped, by renderers beyond their
    ``timeout``. With 16 of them, or four for each slot if that is more, the runner claims nothing until some end.
    """

    ended: int = 0
    rejected: int = 0
    replaced: int = 0
    left_behind: int = field(default=0, compare=False)

    def __add__(self, later: RunnerMetrics) -> RunnerMetrics:
        ended, rejected, replaced = (
            self.ended + later.ended,
            self.rejected + later.rejected,
            self.replaced + later.replaced,
        )
        return RunnerMetrics(ended, rejected, replaced, later.left_behind)


@dataclass(frozen=True, slots=True)
class Rendered:
    """One file of a renderer's result. The body is read once, as a stream, before the renderer's next output is asked
    for.
    """

    filename: str
    content_type: str
    body: Body


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A committed change of one job.

    ``seq`` counts 1, 2, 3 … within the job. ``id`` is unique, for de-duplication only: it does not order events.
    ``cursor`` is an opaque position below which nothing was missing when the event was delivered.
    """

    id: int
    seq: int
    cursor: str
    company_id: str
    type: str
    job_id: UUID
    created_at: datetime
    payload: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The wire form: ``{id, companyId, type, createdAt, payload}``, the time as ISO-8601 UTC with milliseconds."""
        return {
            "id": self.id,
            "companyId": self.company_id,
            "type": self.type,
            "createdAt": _wire_value(self.created_at),
            "payload": dict(self.payload),
        }


@dataclass(frozen=True, slots=True)
class JobState(JobEvent):
    """The state of a job when a watch of it began, as the event of its status, with the ``job`` as it was read.

    ``id`` and ``seq`` are those of the job's last event (0 when it has none), whatever type that one has;
    ``created_at`` is when the job was changed last.
    """

    job: Job
