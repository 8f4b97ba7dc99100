"""SQLite 3.35 and newer: one writer at a time, so a step is a few statements under ``BEGIN IMMEDIATE``, the first of
them a write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit._dialects.base import (
    Claimed,
    Document,
    Due,
    EventRow,
    Held,
    Position,
    RescueTerms,
    Sql,
    Start,
    Terms,
    Told,
    Waiting,
)
from jobkit._dialects.sqlite import sql


class _Jobs:
    """Creating jobs, and telling of what changes by hand."""

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        row = {name: values[name] for name in values if name != "payload"}
        if connection.execute(sql.INSERT(connection), row).rowcount == 0:
            return None
        event = {"job_id": values["id"], "seq": 1, "type": "content_job.queued"}
        shared = {name: values[name] for name in ("company_id", "payload", "now")}
        return self.append_event(connection, {**event, **shared})

    def insert_jobs(
        self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool
    ) -> None:
        values = {"company_id": company_id, "jobs": jobs, "now": now}
        connection.execute(sql.INSERT_MANY(connection), values)
        connection.execute(sql.TELL_MANY(connection), values)

    def append_event(self, connection: sa.Connection, values: Mapping[str, Any]) -> int:
        return int(connection.execute(sql.APPEND(connection), values).scalar_one())


class _Claims:
    """Claims: taken, prolonged, ended, rescued."""

    claim_locks = True

    def claim(self, connection: sa.Connection, *, terms: Terms) -> list[Claimed]:
        return self._claimed(connection, sql.CLAIM, terms, {})

    def claim_of(
        self, connection: sa.Connection, companies: Sequence[str], each: int, *, terms: Terms
    ) -> list[Claimed]:
        return self._claimed(connection, sql.CLAIM_OF, terms, {"companies": json.dumps(companies), "each": each})

    def claim_these(self, connection: sa.Connection, job_ids: Sequence[UUID], *, terms: Terms) -> list[Claimed]:
        ids = json.dumps([job_id.hex for job_id in job_ids])
        return self._claimed(connection, sql.CLAIM_THESE, terms, {"ids": ids})

    def due(self, connection: sa.Connection, *, window: int, limit: int, now: datetime) -> list[Waiting]:
        values = {"window": window, "limit": limit, "now": now}
        return [Waiting(*row) for row in connection.execute(sql.DUE_JOBS(connection), values)]

    def heads(self, connection: sa.Connection, companies: Sequence[str], each: int) -> list[Waiting]:
        values = {"companies": json.dumps(companies), "each": each}
        return [Waiting(*row) for row in connection.execute(sql.HEADS(connection), values)]

    def companies(self, connection: sa.Connection, *, limit: int) -> list[str]:
        return list(connection.execute(sql.COMPANIES(connection), {"limit": limit}).scalars())

    def has_queued(self, connection: sa.Connection, *, now: datetime) -> bool:
        return bool(connection.execute(sql.HAS_QUEUED(connection), {"now": now}).scalar())

    def _claimed(
        self, connection: sa.Connection, statement: Sql, terms: Terms, more: Mapping[str, Any]
    ) -> list[Claimed]:
        values = {**terms._asdict(), "lease": str(terms.lease), **more}
        rows = sorted(connection.execute(statement(connection), values), key=lambda row: row.id)
        if not rows:
            return []
        events = [
            _event(row.id, row.company_id, row.event_seq, "content_job.running", {"jobId": str(row.id)}) for row in rows
        ]
        ids = {told.job_id: told.event_id for told in _tell(connection, events, terms.now)}
        return [Claimed._make((*row, ids[row.id])) for row in rows]

    def finish(
        self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime
    ) -> tuple[list[Told], int]:
        rows = connection.execute(sql.FINISH(connection), {"jobs": json.dumps(jobs), "now": now}).all()
        if not rows:
            return [], 0
        ends = {job["job"]: job for job in jobs}
        events = [
            _event(row.id, row.company_id, row.event_seq, ends[row.id.hex]["type"], ends[row.id.hex]["payload"])
            for row in rows
        ]
        told = _tell(connection, events, now)
        won = {row.id.hex for row in rows}
        kept = json.dumps([file for file in files if file["job"] in won])
        if kept == "[]":
            return told, 0
        connection.execute(sql.KEEP(connection), {"files": kept, "now": now})
        return told, connection.execute(sql.FORGET(connection), {"files": kept}).rowcount

    def renew(self, connection: sa.Connection, jobs: Document, *, lease: float) -> list[Held]:
        rows = connection.execute(sql.RENEW(connection), {"jobs": json.dumps(jobs), "lease": str(lease)})
        return [Held(*row) for row in rows]

    def look(self, connection: sa.Connection, jobs: Document) -> list[Held]:
        return [Held(*row) for row in connection.execute(sql.LOOK(connection), {"jobs": json.dumps(jobs)})]

    def rescue(self, connection: sa.Connection, *, terms: RescueTerms) -> list[EventRow]:
        rows = connection.execute(sql.RESCUE(connection), terms._asdict()).all()
        events = [
            _event(row.id, row.company_id, row.event_seq, *_rescued(str(row.id), row.status, row.attempt, terms))
            for row in rows
        ]
        ids = {told.job_id: told.event_id for told in _tell(connection, events, terms.now)}
        return [
            EventRow(ids[row.id], 0, e["seq"], row.company_id, e["type"], row.id, terms.now, e["payload"])
            for row, e in zip(rows, events, strict=True)
        ]

    def has_expired(self, connection: sa.Connection) -> bool:
        return bool(connection.execute(sql.EXPIRED(connection)).scalar())


class _Intents:
    """Keys that may hold an object without a live row."""

    def record_intents(self, connection: sa.Connection, intents: Document, *, grace: float) -> None:
        connection.execute(sql.INTEND(connection), {"intents": json.dumps(intents), "grace": str(grace)})

    def due_intents(
        self, connection: sa.Connection, *, provider: str, state: str, early: float, after: datetime, limit: int
    ) -> Iterator[Due]:
        values = {"provider": provider, "state": state, "early": str(early), "after": after, "limit": limit}
        for row in connection.execute(sql.DUE_INTENTS(connection), values):
            yield Due(*row)

    def claim_intents(
        self, connection: sa.Connection, keys: Sequence[str], *, provider: str, state: str, early: float, hold: float
    ) -> list[str]:
        values = {
            "keys": json.dumps(keys),
            "provider": provider,
            "state": state,
            "early": str(early),
            "hold": str(hold),
        }
        return list(connection.execute(sql.CLAIM_INTENTS(connection), values).scalars())

    def drop_intents(self, connection: sa.Connection, keys: Sequence[str], *, provider: str) -> None:
        connection.execute(sql.DROP_INTENTS(connection), {"keys": json.dumps(keys), "provider": provider})

    def postpone_intents(self, connection: sa.Connection, failures: Document, *, provider: str) -> None:
        connection.execute(sql.POSTPONE_INTENTS(connection), {"failures": json.dumps(failures), "provider": provider})


class _Events:
    """Reading the event log."""

    def start(self, connection: sa.Connection) -> Start:
        return Start(Position(0, connection.execute(sql.START(connection)).scalar_one()), "")

    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        events = [EventRow(*row) for row in connection.execute(sql.SCAN(connection), {"id": after.id, "limit": limit})]
        return events, Position(0, events[-1].id) if events else after

    def earlier(self, connection: sa.Connection, after: Position, start: Start, jobs: Document) -> Sequence[EventRow]:
        values = {"jobs": json.dumps(jobs), "id": after.id}
        return [EventRow(*row) for row in connection.execute(sql.EARLIER(connection), values)]


class Sqlite(_Jobs, _Claims, _Intents, _Events):
    """``jobkit._dialects.base.Statements`` for SQLite."""


def _event(job_id: UUID, company_id: str, seq: int, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"company": company_id, "job": job_id.hex, "seq": seq, "type": kind, "payload": payload}


def _rescued(job_id: str, status: str, attempt: int, terms: RescueTerms) -> tuple[str, dict[str, Any]]:
    if status == "cancelled":
        return "content_job.cancelled", {"jobId": job_id}
    if status == "failed":
        return "content_job.failed", {"jobId": job_id, "errorMessage": terms.stopped}
    lost = {"jobId": job_id, "attempt": attempt + 1, "errorMessage": terms.reason, "runAt": terms.now.isoformat()}
    return "content_job.retrying", lost


def _tell(connection: sa.Connection, events: Document, now: datetime) -> list[Told]:
    rows = connection.execute(sql.TELL(connection), {"events": json.dumps(events), "now": now})
    return [Told(*row) for row in rows]
