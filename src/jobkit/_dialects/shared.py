"""What both databases do alike, each with statements of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit._dialects.base import Pruned, Sql, Waiting


class Queue:
    """``jobkit._dialects.base.QueueStatements``, given its statements."""

    _due: Sql
    _heads: Sql
    _companies: Sql
    _has_queued: Sql

    def due(self, connection: sa.Connection, *, window: int, limit: int, now: datetime) -> list[Waiting]:
        values = {"window": window, "limit": limit, "now": now}
        return [Waiting(*row) for row in connection.execute(self._due(connection), values)]

    def heads(self, connection: sa.Connection, companies: Sequence[str], each: int) -> list[Waiting]:
        values = {"companies": json.dumps(companies), "each": each}
        return [Waiting(*row) for row in connection.execute(self._heads(connection), values)]

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

    def weigh(self, connection: sa.Connection, jobs: Sequence[UUID], *, provider: str | None) -> Pruned:
        return Pruned(jobs, *connection.execute(self._weigh(connection), these(jobs, provider=provider)).one())


def these(jobs: Sequence[UUID], **others: Any) -> dict[str, Any]:
    """The parameters of a statement about ``jobs``: SQLite's tables and PostgreSQL both know an id without dashes."""
    return {"jobs": json.dumps([job.hex for job in jobs]), **others}
