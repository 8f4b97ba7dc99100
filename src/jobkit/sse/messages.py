"""What a stream sends: the messages of a job, or of a company, as ``text/event-stream``. Never waits for an event."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Self
from uuid import UUID

import sqlalchemy as sa

from jobkit.errors import EventsPruned, JobNotFound
from jobkit.events.follow import Follower
from jobkit.events.hub import TERMINAL, Wake
from jobkit.events.watch import Watcher
from jobkit.types import JobEvent, JobState

# The id of a message in a job's stream: job and seq. In a company's stream it is a cursor.
_JOB_ID = re.compile(r"([0-9a-f-]{36})\.([0-9]{1,10})", re.ASCII)
# Columns of the job that the first message has, by their name there.
_FIELDS = {
    "jobType": "job_type",
    "status": "status",
    "progress": "progress",
    "progressMessage": "progress_message",
    "errorMessage": "error_message",
    "assetId": "result_asset_id",
}


class JobMessages:
    """The state, or a ``resync`` and the state, or the missed events; then each event until the end, then ``over``."""

    def __init__(self, watcher: Watcher, after: int | None, *, resync: bool, over: bool) -> None:
        """``after``: the ``seq`` that the client has seen; ``over``: it has seen the job's end."""
        self._watcher, self._after, self._resync, self.over = watcher, after, resync, over

    @classmethod
    def seek(
        cls, engine: sa.Engine, company_id: str, job_id: UUID | str, last_event_id: str | None, wake: Wake
    ) -> Self:
        """The messages after ``last_event_id``. Blocks on the database; ``JobNotFound``."""
        watcher = Watcher(engine, job_id, company_id=company_id, wake=wake)
        state = watcher.read()
        found = _JOB_ID.fullmatch(last_event_id) if isinstance(last_event_id, str) else None
        if found and found[1] == str(state.job_id) and int(found[2]) <= state.seq:
            seq = int(found[2])
            return cls(watcher, seq, resync=False, over=state.type in TERMINAL and seq == state.seq)
        return cls(watcher, None, resync=bool(last_event_id), over=False)

    def preamble(self) -> bytes:
        """What comes first."""
        return _message({"reason": "unknown"}, event="resync") if self._resync else b""

    def open(self) -> bytes:
        """Subscribe, and give what there is by now."""
        try:
            state = self._watcher.open(self._after)
        except JobNotFound:
            return self._end("deleted")
        return self._messages([state] if self._after is None else [])

    def take(self) -> bytes:
        """What has come since; empty when nothing has."""
        try:
            return self._messages(self._watcher.take())
        except JobNotFound:
            return self._end("deleted")

    def keep_alive(self) -> bytes:
        """What goes with a keep-alive."""
        return b""

    def close(self) -> None:
        self._watcher.close()

    def _messages(self, events: Iterable[JobEvent]) -> bytes:
        messages = b"".join(_message(_wire(event), id=f"{event.job_id}.{event.seq}") for event in events)
        return messages + (self._end("over") if self._watcher.over else b"")

    def _end(self, reason: str) -> bytes:
        self.over = True
        return _message({"jobId": str(self._watcher.job_id), "reason": reason}, event="end")


class CompanyMessages:
    """A cursor, or a ``resync`` with one; then each event. As ``JobMessages``."""

    over = False

    def __init__(self, follower: Follower, resync: str | None) -> None:
        """``resync``: the reason why it does not begin where the client left off."""
        self._follower, self._resync = follower, resync

    @classmethod
    def seek(cls, engine: sa.Engine, company_id: str, last_event_id: str | None, wake: Wake) -> Self:
        """The messages after ``last_event_id``, or from now on. Blocks on the database."""
        try:
            return cls(Follower.after(engine, company_id, last_event_id or None, wake=wake), None)
        except (ValueError, EventsPruned) as error:
            resync = "pruned" if isinstance(error, EventsPruned) else "unknown"
        return cls(Follower.after(engine, company_id, None, wake=wake), resync)

    def preamble(self) -> bytes:
        cursor = self._follower.cursor
        return _message({"reason": self._resync}, event="resync", id=cursor) if self._resync else _cursor(cursor)

    def open(self) -> bytes:
        self._follower.subscribe()
        return self.take()

    def take(self) -> bytes:
        try:
            return b"".join(_message(_wire(event), id=event.cursor) for event in self._follower.take())
        except EventsPruned:
            self._follower.begin_anew()
            return _message({"reason": "pruned"}, event="resync", id=self._follower.cursor)

    def keep_alive(self) -> bytes:
        return _cursor(self._follower.cursor) if self._follower.advance() else b""

    def close(self) -> None:
        self._follower.close()


MessageSource = JobMessages | CompanyMessages


def _wire(event: JobEvent) -> dict[str, Any]:
    wire = event.to_dict()
    if isinstance(event, JobState):
        row = {name: getattr(event.job, field) for name, field in _FIELDS.items()}
        wire["job"] = row | {"assetId": row["assetId"] and str(row["assetId"])}
    return wire


def _message(data: dict[str, Any], *, event: str | None = None, id: str | None = None) -> bytes:
    """``data`` takes one line: JSON escapes the ends of lines in texts."""
    fields = {"event": event, "id": id, "data": json.dumps(data, separators=(",", ":"))}
    return "".join(f"{name}: {value}\n" for name, value in fields.items() if value is not None).encode() + b"\n"


def _cursor(cursor: str) -> bytes:
    """A message that sets the id a browser comes back with, and shows its page nothing."""
    return f"id: {cursor}\n\n".encode()
