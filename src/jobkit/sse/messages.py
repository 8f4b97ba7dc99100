"""What a stream sends: the messages of a job, or of a company, as ``text/event-stream``. Never waits for an event."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from uuid import UUID

import sqlalchemy as sa

from jobkit.errors import EventsPruned, JobNotFound
from jobkit.events.follow import Follower
from jobkit.events.hub import TERMINAL
from jobkit.events.watch import Watcher
from jobkit.types import JobEvent, JobState

# A message of a job's stream is known by its job and seq; one of a company's by a cursor.
_JOB_ID = re.compile(r"([0-9a-f-]{36})\.([0-9]{1,10})", re.ASCII)
# Those of the job's row that the first message has.
_FIELDS = {
    "jobType": "job_type",
    "status": "status",
    "progress": "progress",
    "progressMessage": "progress_message",
    "errorMessage": "error_message",
    "assetId": "result_asset_id",
}


class MessageSource(Protocol):
    """What a session sends: one of a job, or of a company."""

    over: bool

    def locate(self, last_event_id: str | None) -> None:
        """Where it begins. ``JobNotFound``."""

    def greeting(self) -> bytes: ...

    def open(self) -> bytes: ...

    def take(self) -> bytes:
        """What has come, nothing when nothing has. Blocks on the database at most."""

    def idle(self) -> bytes:
        """What goes with a keep-alive."""

    def close(self) -> None: ...


class JobMessages:
    """The state, or a ``resync`` and the state, or what was missed; then each event until the end."""

    def __init__(self, engine: sa.Engine, company_id: object, job_id: UUID | str, wake: Callable[[], object]) -> None:
        self._watcher = Watcher(engine, job_id, company_id=company_id, wake=wake)
        self.over = False
        self._after: int | None = None
        self._foreign = False

    def locate(self, last_event_id: str | None) -> None:
        state = self._watcher.read()
        if not last_event_id:
            return
        found = _JOB_ID.fullmatch(last_event_id) if isinstance(last_event_id, str) else None
        if found and found[1] == str(state.job_id) and int(found[2]) <= state.seq:
            self._after = int(found[2])
            self.over = state.type in TERMINAL and self._after == state.seq
        else:
            self._foreign = True

    def greeting(self) -> bytes:
        return _message({"reason": "unknown"}, event="resync") if self._foreign else b""

    def open(self) -> bytes:
        try:
            state = self._watcher.open(self._after)
        except JobNotFound:
            return self._end("deleted")
        return self._told([state] if self._after is None else [])

    def take(self) -> bytes:
        try:
            return self._told(self._watcher.take())
        except JobNotFound:
            return self._end("deleted")

    def idle(self) -> bytes:
        return b""

    def close(self) -> None:
        self._watcher.close()

    def _told(self, events: Iterable[JobEvent]) -> bytes:
        told = b"".join(_message(_wire(event), id=f"{event.job_id}.{event.seq}") for event in events)
        return told + (self._end("over") if self._watcher.over else b"")

    def _end(self, reason: str) -> bytes:
        self.over = True
        return _message({"jobId": str(self._watcher.job_id), "reason": reason}, event="end")


class CompanyMessages:
    """A cursor, or a ``resync`` with one; then each event."""

    over = False

    def __init__(self, engine: sa.Engine, company_id: str, wake: Callable[[], object]) -> None:
        self._follower = Follower(engine, company_id, wake=wake)
        self._resync: str | None = None

    def locate(self, last_event_id: str | None) -> None:
        try:
            self._follower.locate(last_event_id or None)
        except (ValueError, EventsPruned) as error:
            self._resync = "pruned" if isinstance(error, EventsPruned) else "unknown"
            self._follower.locate()

    def greeting(self) -> bytes:
        cursor = self._follower.cursor
        return _message({"reason": self._resync}, event="resync", id=cursor) if self._resync else _cursor(cursor)

    def open(self) -> bytes:
        self._follower.subscribe()
        return b""

    def take(self) -> bytes:
        return b"".join(_message(_wire(event), id=event.cursor) for event in self._follower.take())

    def idle(self) -> bytes:
        return _cursor(self._follower.cursor) if self._follower.advance() else b""

    def close(self) -> None:
        self._follower.close()


def _wire(event: JobEvent) -> dict[str, Any]:
    wire = event.to_dict()
    if isinstance(event, JobState):
        row = {name: getattr(event.job, field) for name, field in _FIELDS.items()}
        wire["job"] = row | {"assetId": row["assetId"] and str(row["assetId"])}
    return wire


def _message(data: dict[str, Any], *, event: str | None = None, id: str | None = None) -> bytes:
    """JSON has no line of its own to end, whatever texts are in it."""
    fields = {"event": event, "id": id, "data": json.dumps(data, separators=(",", ":"))}
    return "".join(f"{name}: {value}\n" for name, value in fields.items() if value is not None).encode() + b"\n"


def _cursor(cursor: str) -> bytes:
    """Moves what a browser will come back with, and shows its page nothing."""
    return f"id: {cursor}\n\n".encode()
