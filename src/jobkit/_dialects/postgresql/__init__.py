"""PostgreSQL 14 and newer: every step is one statement, because a round trip costs more than anything in it."""

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
    Start,
    Terms,
    Told,
    Waiting,
)
from jobkit._dialects.postgresql import sql


class _Jobs:
    """Creating jobs, and telling of what changes by hand."""

    def insert_job(self, connection: sa.Connection, values: Mapping[str, Any], *, notify: bool) -> int | None:
        plain, once = (sql.INSERT_NOTIFY, sql.INSERT_ONCE_NOTIFY) if notify else (sql.INSERT, sql.INSERT_ONCE)
        statement = plain if values["key"] is None else once
        row = connection.execute(statement(connection), values).one_or_none()
        return None if row is None else int(row[0])

    def insert_jobs(
        self, connection: sa.Connection, company_id: str, jobs: str, *, now: datetime, notify: bool
    ) -> None:
        statement = sql.INSERT_MANY_NOTIFY if notify else sql.INSERT_MANY
        connection.execute(statement(connection), {"company_id": company_id, "jobs": jobs, "now": now})

    def append_event(self, connection: sa.Connection, values: Mapping[str, Any]) -> int:
        return int(connection.execute(sql.APPEND(connection), values).scalar_one())


class _Claims:
    """Claims: taken, prolonged, ended, rescued."""

    claim_locks = False

    def claim(self, connection: sa.Connection, *, terms: Terms) -> list[Claimed]:
        return [Claimed(*row) for row in connection.execute(sql.CLAIM(connection), terms._asdict())]

    def claim_of(
        self, connection: sa.Connection, companies: Sequence[str], each: int, *, terms: Terms
    ) -> list[Claimed]:
        values = {**terms._asdict(), "companies": json.dumps(companies), "each": each}
        return [Claimed(*row) for row in connection.execute(sql.CLAIM_OF(connection), values)]

    def claim_these(self, connection: sa.Connection, job_ids: Sequence[UUID], *, terms: Terms) -> list[Claimed]:
        values = {**terms._asdict(), "ids": json.dumps([job_id.hex for job_id in job_ids])}
        return [Claimed(*row) for row in connection.execute(sql.CLAIM_THESE(connection), values)]

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

    def finish(
        self, connection: sa.Connection, jobs: Document, files: Document, *, now: datetime
    ) -> tuple[list[Told], int]:
        values = {"jobs": json.dumps(jobs), "files": json.dumps(files), "now": now}
        rows = connection.execute(sql.FINISH(connection), values).all()
        return [Told(*row[:3]) for row in rows], rows[0].gone if rows else 0

    def renew(self, connection: sa.Connection, jobs: Document, *, lease: float) -> list[Held]:
        rows = connection.execute(sql.RENEW(connection), {"jobs": json.dumps(jobs), "lease": lease})
        return [Held(*row) for row in rows]

    def look(self, connection: sa.Connection, jobs: Document) -> list[Held]:
        return [Held(*row) for row in connection.execute(sql.LOOK(connection), {"jobs": json.dumps(jobs)})]

    def rescue(self, connection: sa.Connection, *, terms: RescueTerms) -> list[EventRow]:
        values = {**terms._asdict(), "run_at": terms.now.isoformat()}
        return [EventRow(*row) for row in connection.execute(sql.RESCUE(connection), values)]

    def has_expired(self, connection: sa.Connection) -> bool:
        return bool(connection.execute(sql.EXPIRED(connection)).scalar())


class _Intents:
    """Keys that may hold an object without a live row."""

    def record_intents(self, connection: sa.Connection, intents: Document, *, grace: float) -> None:
        connection.execute(sql.INTEND(connection), {"intents": json.dumps(intents), "grace": grace})

    def due_intents(
        self, connection: sa.Connection, *, provider: str, state: str, early: float, after: datetime, limit: int
    ) -> Iterator[Due]:
        values = {"provider": provider, "state": state, "early": early, "after": after, "limit": limit}
        for row in connection.execute(sql.DUE_INTENTS(connection), values):
            yield Due(*row)

    def claim_intents(
        self, connection: sa.Connection, keys: Sequence[str], *, provider: str, state: str, early: float, hold: float
    ) -> list[str]:
        values = {"keys": json.dumps(keys), "provider": provider, "state": state, "early": early, "hold": hold}
        return list(connection.execute(sql.CLAIM_INTENTS(connection), values).scalars())

    def drop_intents(self, connection: sa.Connection, keys: Sequence[str], *, provider: str) -> None:
        connection.execute(sql.DROP_INTENTS(connection), {"keys": json.dumps(keys), "provider": provider})

    def postpone_intents(self, connection: sa.Connection, failures: Document, *, provider: str) -> None:
        keys = json.dumps([failure["key"] for failure in failures])
        values = {"failures": json.dumps(failures), "keys": keys, "provider": provider}
        connection.execute(sql.POSTPONE_INTENTS(connection), values)


class _Events:
    """Reading the event log."""

    def start(self, connection: sa.Connection) -> Start:
        xmin, snapshot = connection.execute(sql.START(connection)).one()
        return Start(Position(xmin, 0), snapshot)

    def scan(
        self, connection: sa.Connection, after: Position, start: Start, limit: int
    ) -> tuple[list[EventRow], Position]:
        values = {"xid": after.xid, "id": after.id, "snapshot": start.snapshot, "limit": limit}
        rows = connection.execute(sql.SCAN(connection), values).all()
        events = [EventRow(*row[1:]) for row in rows if row[1] is not None]
        if len(events) == limit:
            return events, Position(events[-1].xid, events[-1].id)
        return events, max(after, Position(rows[0].horizon, 0))

    def earlier(self, connection: sa.Connection, after: Position, start: Start, jobs: Document) -> Sequence[EventRow]:
        values = {"jobs": json.dumps(jobs), "xid": after.xid, "id": after.id, "snapshot": start.snapshot}
        return [EventRow(*row) for row in connection.execute(sql.EARLIER(connection), values)]


class Postgresql(_Jobs, _Claims, _Intents, _Events):
    """``jobkit._dialects.base.Statements`` for PostgreSQL."""
