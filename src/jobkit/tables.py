"""The five tables. ``jobkit.migrations`` creates exactly these; a test compares the two on both databases."""

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
    """SQL for the time ``seconds`` from now on SQLite's clock; ``seconds`` is an SQL expression of text."""
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

    def column_expression(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return _Utc(column, type_=self)


class _Utc(FunctionElement[datetime]):
    """A column of times as a connection in any zone gives it: on PostgreSQL without a zone, in UTC. A host's connection
    may leave out the zone that it is in, and the driver may not know a time that is before the year 1 there.
    """

    inherit_cache = True

    def __init__(self, column: sa.ColumnElement[Any], type_: UtcDateTime) -> None:
        super().__init__(column)
        self.type = type_


class JsonObject(sa.types.TypeDecorator[dict[str, Any]]):
    """A JSON object: JSONB on PostgreSQL, JSON text on SQLite. Written and read as text, by Python's ``json``, whatever
    serializer the host's engine or driver has.
    """

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        kind = postgresql.JSONB(none_as_null=True) if dialect.name == "postgresql" else sa.JSON(none_as_null=True)
        return dialect.type_descriptor(kind)

    def column_expression(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        return sa.type_coerce(sa.cast(column, sa.Text), self)

    def bind_processor(self, dialect: sa.Dialect) -> Callable[[Any], str | None]:
        return _written

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Callable[[Any], dict[str, Any] | None]:
        return _document


def _written(document: Any) -> str | None:
    return None if document is None else json.dumps(document)


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


@compiles(_Utc, "postgresql")
def _utc_postgresql(element: _Utc, compiler: Any, **kw: Any) -> str:
    return f"timezone('UTC', {compiler.process(element.clauses, **kw)})"


@compiles(_Utc, "sqlite")
def _utc_sqlite(element: _Utc, compiler: Any, **kw: Any) -> str:
    text: str = compiler.process(element.clauses, **kw)
    return text


now = _Now()
transaction_id = _TransactionId()


metadata = sa.MetaData(naming_convention={"pk": "%(table_name)s_pkey", "uq": "%(table_name)s_%(column_0_N_name)s_key"})

_ZERO = sa.text("0")
_BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
QUEUED = sa.text("status = 'queued' AND run_at IS NULL")
SCHEDULED = sa.text("status = 'queued' AND run_at IS NOT NULL")
RUNNING = sa.text("status = 'running'")


def _times() -> list[sa.Column[Any]]:
    return [sa.Column(name, UtcDateTime, nullable=False, server_default=now) for name in ("created_at", "updated_at")]


content_jobs = sa.Table(
    "content_jobs",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("company_id", sa.Text, nullable=False),
    sa.Column("job_type", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False, server_default="queued"),
    sa.Column("input", JsonObject, nullable=False, server_default=sa.text("'{}'")),
    sa.Column("result_asset_id", sa.Uuid),
    sa.Column("error_message", sa.Text),
    sa.Column("source_task_id", sa.Text),
    sa.Column("started_at", UtcDateTime),
    sa.Column("finished_at", UtcDateTime),
    *_times(),
    # +1 at every claim, never reset: a claim with an older number can change nothing.
    sa.Column("fence", sa.BigInteger, nullable=False, server_default=_ZERO),
    sa.Column("attempt", sa.Integer, nullable=False, server_default=_ZERO),
    sa.Column("rescues", sa.Integer, nullable=False, server_default=_ZERO),
    sa.Column("lease_until", UtcDateTime),
    sa.Column("worker_id", sa.Text),
    sa.Column("run_at", UtcDateTime),
    sa.Column("priority", sa.Integer, nullable=False, server_default=_ZERO),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("cancel_requested_at", UtcDateTime),
    sa.Column("progress", sa.Float),
    sa.Column("progress_message", sa.Text),
    sa.Column("event_seq", sa.Integer, nullable=False, server_default=_ZERO),
    sa.Column("trace", JsonObject),
    # What operators see of a failed attempt beyond error_message. No Job has it: a Job may reach users.
    sa.Column("error_detail", sa.Text),
    sa.Index("content_jobs_company_status_idx", "company_id", "status"),
    sa.Index("content_jobs_company_created_idx", "company_id", "created_at"),
    sa.Index("content_jobs_running_idx", "id", postgresql_where=RUNNING, sqlite_where=RUNNING),
    sa.Index(
        "content_jobs_idempotency_key",
        "company_id",
        "job_type",
        "idempotency_key",
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
        sqlite_where=sa.text("idempotency_key IS NOT NULL"),
    ),
)

#: The columns that a ``Job`` has, in its order.
JOB_COLUMNS = tuple(column for column in content_jobs.columns if column.name != "error_detail")

# Declared by columns, not as text: alembic cannot compare an index with text in it on SQLite.
# Jobs that may run now and jobs that wait for a time, by company, so that a claim can go round the companies; and the
# latter by time, to see whether one is due.
sa.Index(
    "content_jobs_queued_idx",
    content_jobs.c.company_id,
    content_jobs.c.priority.desc(),
    content_jobs.c.created_at,
    content_jobs.c.id,
    postgresql_where=QUEUED,
    sqlite_where=QUEUED,
)
sa.Index(
    "content_jobs_scheduled_idx",
    content_jobs.c.company_id,
    content_jobs.c.priority.desc(),
    content_jobs.c.run_at,
    content_jobs.c.id,
    postgresql_where=SCHEDULED,
    sqlite_where=SCHEDULED,
)
sa.Index(
    "content_jobs_due_idx",
    content_jobs.c.run_at,
    content_jobs.c.company_id,
    postgresql_where=SCHEDULED,
    sqlite_where=SCHEDULED,
)

assets = sa.Table(
    "assets",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("company_id", sa.Text, nullable=False),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("object_key", sa.Text, nullable=False),
    sa.Column("content_type", sa.Text, nullable=False),
    sa.Column("byte_size", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("original_filename", sa.Text),
    sa.Column("created_by_agent_id", sa.Text),
    sa.Column("created_by_user_id", sa.Text),
    sa.Column("source_task_id", sa.Text),
    *_times(),
    sa.Column("job_id", sa.Uuid),
    sa.Column("position", sa.Integer, nullable=False, server_default=_ZERO),
    sa.Index("assets_company_object_key_uq", "company_id", "object_key", unique=True),
    sa.Index("assets_company_created_idx", "company_id", "created_at"),
    sa.Index("assets_job_idx", "job_id", "position"),
)

content_job_events = sa.Table(
    "content_job_events",
    metadata,
    sa.Column("id", _BIG_ID, sa.Identity(always=False), primary_key=True),
    sa.Column("company_id", sa.Text, nullable=False),
    sa.Column("job_id", sa.Uuid, nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("payload", JsonObject, nullable=False, server_default=sa.text("'{}'")),
    sa.Column("created_at", UtcDateTime, nullable=False, server_default=now),
    # The writing transaction, for a cursor that skips nothing: a serial id alone is visible out of order on PostgreSQL.
    sa.Column("xid", sa.BigInteger, server_default=transaction_id),
    sa.UniqueConstraint("job_id", "seq"),
    sa.Index("content_job_events_xid_idx", "xid", "id"),
    sa.Index("content_job_events_company_idx", "company_id", "xid", "id"),
    # An emptied table must not give an id twice: to a reader whose cursor is beyond it, the event would be lost.
    sqlite_autoincrement=True,
)

# The servers that the event log has been on, on PostgreSQL: see ``jobkit.db.dialects.postgresql.moves``.
content_job_epochs = sa.Table(
    "content_job_epochs",
    metadata,
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("server", sa.Text, nullable=False),
    sa.Column("began_at", UtcDateTime, nullable=False, server_default=now),
    # The transaction that wrote the row here: a row that was restored has another in PostgreSQL's ``xmin``.
    sa.Column("xid", sa.BigInteger, server_default=transaction_id),
)

asset_intents = sa.Table(
    "asset_intents",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("company_id", sa.Text, nullable=False),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("object_key", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="pending"),
    sa.Column("not_before", UtcDateTime, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default=_ZERO),
    sa.Column("last_error", sa.Text),
    sa.UniqueConstraint("provider", "object_key"),
    sa.Index("asset_intents_not_before_idx", "not_before"),
)

# These rows are updated several times in a short life. Free space on each page lets updates skip the indexes (HOT), and
# an early vacuum removes the dead entries that a claim would step over. Oban and PgQueuer do the like.
STORAGE_PARAMETERS = {
    "content_jobs": "fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 1",
    "asset_intents": "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 1",
}

for _name, _parameters in STORAGE_PARAMETERS.items():
    sa.event.listen(
        metadata.tables[_name],
        "after_create",
        sa.DDL(f"ALTER TABLE %(fullname)s SET ({_parameters})").execute_if(dialect="postgresql"),  # type: ignore[no-untyped-call]
    )
