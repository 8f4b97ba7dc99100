"""Column types that mean the same on SQLite and PostgreSQL, and accept what another library's connection hands back.

Hosts lend connections that Django or others configured. So no column of ours is declared with a type that the sqlite3
module may convert (DATETIME, TIMESTAMP, DATE, TIME, BOOL), and JSON may arrive decoded or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

SQLITE_TIME = "'%Y-%m-%d %H:%M:%f000'"
SQLITE_NOW = f"strftime({SQLITE_TIME}, 'now')"


def sqlite_in(seconds: str) -> str:
    """SQL for the time so many seconds from SQLite's now; ``seconds`` is an SQL expression of text."""
    return f"strftime({SQLITE_TIME}, 'now', {seconds} || ' seconds')"


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Aware UTC datetimes in and out: ``timestamptz`` on PostgreSQL, sortable text on SQLite."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        kind: sa.types.TypeEngine[Any] = sa.Text() if dialect.name == "sqlite" else sa.DateTime(timezone=True)
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> Any:
        if value is None:
            return None
        if value.utcoffset() is None:
            raise ValueError(f"a time must have a time zone, {value!r} has none")
        value = value.astimezone(UTC)
        # A fixed width in UTC, so that text sorts as time does.
        return value.replace(tzinfo=None).isoformat(" ", "microseconds") if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        time: datetime = datetime.fromisoformat(value) if isinstance(value, str) else value
        return time.replace(tzinfo=UTC) if time.utcoffset() is None else time.astimezone(UTC)


class JsonObject(sa.types.TypeDecorator[dict[str, Any]]):
    """A JSON object: JSONB on PostgreSQL, JSON text on SQLite; read from ``dict`` and from ``str`` alike."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        kind = postgresql.JSONB(none_as_null=True) if dialect.name == "postgresql" else sa.JSON(none_as_null=True)
        return dialect.type_descriptor(kind)

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Callable[[Any], dict[str, Any] | None]:
        # In place of SQLAlchemy's own, which on SQLite fails on a value that a converter has decoded.
        return _document


def _document(value: Any) -> dict[str, Any] | None:
    document: dict[str, Any] | None = json.loads(value) if isinstance(value, str | bytes) else value
    return document


class _Now(FunctionElement[datetime]):
    """The database's clock as a column default."""

    inherit_cache = True


class _TransactionId(FunctionElement[int]):
    """The writing transaction's id as a column default; NULL where the database has none."""

    inherit_cache = True


@compiles(_Now, "postgresql")
def _now_postgresql(element: _Now, compiler: Any, **kw: Any) -> str:
    return "now()"


@compiles(_Now, "sqlite")
def _now_sqlite(element: _Now, compiler: Any, **kw: Any) -> str:
    return f"({SQLITE_NOW})"


@compiles(_TransactionId, "postgresql")
def _xid_postgresql(element: _TransactionId, compiler: Any, **kw: Any) -> str:
    return "((pg_current_xact_id())::text)::bigint"


@compiles(_TransactionId, "sqlite")
def _xid_sqlite(element: _TransactionId, compiler: Any, **kw: Any) -> str:
    return "NULL"


now = _Now()
transaction_id = _TransactionId()
