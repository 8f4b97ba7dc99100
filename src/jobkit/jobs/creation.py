"""Requests for jobs: checked, copied, and turned into rows, in chunks that a statement can carry."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from jobkit.base.clock import aware
from jobkit.base.ids import new_number
from jobkit.base.text import storable
from jobkit.db.dialects.base import event_payload
from jobkit.types import Job, JobRequest, JobStatus

# The most jobs, and characters of JSON, in one statement of ``create_many``: so many that round trips do not count, so
# few that the next chunk is ready when the database has stored this one.
MAX_CHUNK_JOBS = 1_000
MAX_CHUNK_CHARACTERS = 4 << 20

MAX_PRIORITY = (1 << 31) - 1

T = TypeVar("T")


class NewJob(NamedTuple):
    """A job that is to be inserted; ``text`` is its input as JSON."""

    job: Job
    text: str

    def values(self) -> dict[str, Any]:
        """The parameters of ``Dialect.insert_job``."""
        job = self.job
        return {
            "id": job.id,
            "company_id": job.company_id,
            "job_type": job.job_type,
            "input": self.text,
            "source_task_id": job.source_task_id,
            "run_at": job.run_at,
            "priority": job.priority,
            "key": job.idempotency_key,
            "payload": json.dumps(event_payload("content_job.queued", job.id)),
            "now": job.created_at,
        }

    def document(self) -> str:
        """The job as ``Dialect.insert_jobs`` reads it; its input is JSON text already."""
        job, rest = self.job, ""
        if job.source_task_id is not None:
            rest = f',"task":{json.dumps(job.source_task_id)}'
        if job.run_at is not None:
            rest += f',"run_at":"{job.run_at.astimezone(UTC).isoformat(" ", "microseconds")}"'
        # Not str(): an IntEnum may print its name.
        return (
            f'{{"id":"{job.id}","type":{json.dumps(job.job_type)},"priority":{int.__repr__(job.priority)}'
            f',"input":{self.text}{rest}}}'
        )


class CheckedRequest(NamedTuple):
    """A request that can be stored, with the number of its job's id. ``input`` is a copy of the caller's."""

    number: int
    request: JobRequest
    run_at: datetime | None
    input: dict[str, Any]
    text: str

    def draft(self, company_id: str, now: datetime) -> NewJob:
        """The job to insert."""
        request = self.request
        # By position: create_many makes thousands, and 25 names would cost half as much again.
        job = Job(
            UUID(int=self.number),
            company_id,
            request.job_type,
            JobStatus.QUEUED,
            self.input,
            None,  # result_asset_id
            None,  # error_message
            request.source_task_id,
            None,  # started_at
            None,  # finished_at
            now,  # created_at
            now,  # updated_at
            0,  # fence
            0,  # attempt
            0,  # rescues
            None,  # lease_until
            None,  # worker_id
            self.run_at,
            request.priority,
            request.idempotency_key,
            None,  # cancel_requested_at
            None,  # progress
            None,  # progress_message
            1,  # event_seq
            None,  # trace
        )
        return NewJob(job, self.text)


def checked(request: JobRequest, max_input_bytes: int) -> CheckedRequest:
    """The request as it can be stored; ``ValueError`` or ``TypeError`` naming the field that cannot be."""
    storable(request.job_type, "job_type", limit=255)
    if request.source_task_id is not None:
        storable(request.source_task_id, "source_task_id", blank=True)
    if request.idempotency_key is not None:
        storable(request.idempotency_key, "idempotency_key", limit=255)
    priority = request.priority
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a whole number, not {type(priority).__name__}")
    if abs(priority) > MAX_PRIORITY:
        raise ValueError(f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, not {priority}")
    run_at = None if request.run_at is None else aware(request.run_at, "run_at")
    text, copy = canonical({} if request.input is None else request.input, max_bytes=max_input_bytes)
    return CheckedRequest(new_number(), request, run_at, copy, text)


def checked_many(requests: Iterable[JobRequest], max_input_bytes: int) -> deque[CheckedRequest]:
    """Every request, checked and copied as it is drawn; an error says which request and which field."""
    found: deque[CheckedRequest] = deque()
    for position, request in enumerate(requests):
        if not isinstance(request, JobRequest):
            raise TypeError(f"requests[{position}] must be a JobRequest, not {type(request).__name__}")
        try:
            found.append(checked(request, max_input_bytes))
        except (TypeError, ValueError) as error:
            raise type(error)(f"requests[{position}]: {error}") from None
    return found


class Chunk(NamedTuple):
    """The next jobs of a call, in its order: those with an idempotency key in ``keyed``, to be inserted one by one; the
    others in ``array``, the JSON that ``Dialect.insert_jobs`` reads, None when there are no others.
    """

    jobs: list[Job]
    keyed: list[NewJob]
    array: str | None

    @property
    def statements(self) -> int:
        """The number of statements that insert it."""
        return len(self.keyed) + (self.array is not None)


def chunks(wanted: deque[CheckedRequest], company_id: str, now: datetime) -> Iterator[Chunk]:
    """The jobs of all requests, in chunks that a statement can carry. Empties ``wanted`` as it goes: a large call is
    not held twice.
    """
    jobs: list[Job] = []
    keyed: list[NewJob] = []
    documents: list[str] = []
    size = 0
    while wanted:
        draft = wanted.popleft().draft(company_id, now)
        document = draft.document() if draft.job.idempotency_key is None else ""
        if jobs and (len(jobs) == MAX_CHUNK_JOBS or size + len(document) > MAX_CHUNK_CHARACTERS):
            yield _chunk(jobs, keyed, documents)
            jobs, keyed, documents, size = [], [], [], 0
        jobs.append(draft.job)
        if document:
            documents.append(document)
            size += len(document)
        else:
            keyed.append(draft)
    if jobs:
        yield _chunk(jobs, keyed, documents)


def _chunk(jobs: list[Job], keyed: list[NewJob], documents: list[str]) -> Chunk:
    return Chunk(jobs, keyed, f"[{','.join(documents)}]" if documents else None)


def prefetched(first: T, rest: Iterator[T]) -> Generator[T]:
    """``first`` and ``rest``; a thread makes each item while the one before is in use. ``close`` ends the thread.

    Where no thread can be started, items are made when they are asked for.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobkit-prefetch") as thread:
        item: T | None = first
        while item is not None:
            try:
                coming = thread.submit(next, rest, None)
            except RuntimeError:  # the interpreter is ending, or the system has no more threads
                yield from chain([item], rest)
                return
            yield item
            try:
                item = coming.result()
            finally:
                del coming  # else a failed one would keep this frame, and this frame it


MAX_DEPTH = 100
MAX_INPUT_BYTES = 1 << 20
# Numbers that jsonb would change: it reads 1e+23 as the integer, which is not the same number, and has no negative
# zero. The first branch skips strings.
_NUMBERS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?[0-9.]+e\+[0-9]+|-0\.0(?![0-9])')
# As json.dumps and json.loads, which would make an encoder for each call.
_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode
_decode = json.JSONDecoder().decode
_TOO_DEEP = f"input is nested deeper than {MAX_DEPTH} levels"


def canonical(value: object, *, max_bytes: int = MAX_INPUT_BYTES) -> tuple[str, dict[str, Any]]:
    """``value`` as compact JSON text, and a copy of it read back from that text: tuples become arrays, number keys
    text, -0.0 becomes 0.0. PostgreSQL does not keep the order of keys.

    ``ValueError`` beginning with ``input`` for: not an object, NaN or Infinity, NUL, a lone surrogate, more than 100
    levels, an integer too long for Python to read, two keys that become the same, a value JSON does not know, more
    than ``max_bytes``.
    """
    if not isinstance(value, dict):
        raise ValueError(f"input must be a JSON object (a dict), not {type(value).__name__}")
    try:
        text = _encode(value)
        if "e+" in text or "-0.0" in text:
            text = _NUMBERS.sub(_written_out, text)
        size = len(text.encode())
        if size > max_bytes:
            raise ValueError(f"it is {size} bytes of JSON, the limit is {max_bytes}")
        copy: dict[str, Any] = _decode(text)
        changed = copy != value
    except RecursionError:
        raise ValueError(f"{_TOO_DEEP}, or contains itself") from None
    except UnicodeEncodeError:
        raise ValueError("input contains a lone surrogate") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"input cannot be stored: {error}") from None
    # These cheap tests may suspect a good value, but miss no bad one; only suspects are walked.
    if changed or "\\u0000" in text or text.count("{") + text.count("[") > MAX_DEPTH:
        _inspect(value, 1)
    return text, copy


def _written_out(match: re.Match[str]) -> str:
    token = match.group()
    if token[0] == '"':
        return token
    return "0.0" if token == "-0.0" else f"{Decimal(token):f}.0"


def _inspect(value: object, depth: int) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("input contains a NUL character")
        return
    if not isinstance(value, dict | list | tuple):
        return
    if depth > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, dict):
        if len({key if isinstance(key, str) else json.dumps(key) for key in value}) != len(value):
            raise ValueError("input has two keys that are the same in JSON")
        for key in value:
            _inspect(key, depth)
    for item in value.values() if isinstance(value, dict) else value:
        _inspect(item, depth + 1)
