"""Keys recorded before an object exists: what the two databases are asked about them."""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from jobkit.db.dialects.sql import Sql

Document = list[dict[str, Any]]


class DueKey(NamedTuple):
    """A recorded object key that a sweep may visit from ``not_before`` on."""

    company_id: str
    object_key: str
    not_before: datetime


class Intents(ABC):
    """Keys recorded before an object exists: they may hold one without a live row."""

    _insert_intents: Sql
    _due_intents: Sql
    _claim_intents: Sql
    _drop_intents: Sql
    _postpone_intents: Sql

    def record_intents(self, connection: sa.Connection, intents: Document, *, grace: float) -> None:
        """Record each key; nothing sweeps it for ``grace`` seconds of the database's clock."""
        connection.execute(self._insert_intents(connection), {"intents": json.dumps(intents), "grace": grace})

    def due_intents(
        self, connection: sa.Connection, *, provider: str, state: str, early: float, after: datetime, limit: int
    ) -> Iterator[DueKey]:
        """Keys of ``state`` without a live row that are due, or will be within ``early`` seconds of the database's
        clock; the longest due first, from ``after`` on. A hint: only ``claim_intents`` decides.
        """
        values = {"provider": provider, "state": state, "early": early, "after": after, "limit": limit}
        for row in connection.execute(self._due_intents(connection), values):
            yield DueKey(*row)

    def claim_intents(
        self, connection: sa.Connection, keys: Sequence[str], *, provider: str, state: str, early: float, hold: float
    ) -> list[str]:
        """Make those of ``keys`` that still are due ``collected``, due again in ``hold`` seconds; return them."""
        values = {"keys": json.dumps(keys), "provider": provider, "state": state, "early": early, "hold": hold}
        return list(connection.execute(self._claim_intents(connection), values).scalars())

    def drop_intents(self, connection: sa.Connection, keys: Sequence[str], *, provider: str) -> None:
        """Delete the records of collected keys."""
        connection.execute(self._drop_intents(connection), {"keys": json.dumps(keys), "provider": provider})

    def postpone_intents(self, connection: sa.Connection, failures: Document, *, provider: str) -> None:
        """Make collected keys tombstones again, each with its ``error``, due after a pause that doubles with every
        failure.
        """
        keys = json.dumps([failure["key"] for failure in failures])
        values = {"failures": json.dumps(failures), "keys": keys, "provider": provider}
        connection.execute(self._postpone_intents(connection), values)
