"""The first tables: created, kept when they are there already, adopted when an ancestor of jobkit made them.

This is a frozen copy: a later version of ``jobkit.tables`` gets a revision of its own.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from jobkit.migrations import VERSION_TABLE, adoption
from jobkit.migrations.examination import examine
from jobkit.tables import JsonObject, UtcDateTime, now, transaction_id

revision = "0001"
down_revision = None

_ZERO = sa.text("0")
_BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
QUEUED = sa.text("status = 'queued' AND run_at IS NULL")
SCHEDULED = sa.text("status = 'queued' AND run_at IS NOT NULL")
RUNNING = sa.text("status = 'running'")


_STORAGE = {
    "content_jobs": "fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 1",
    "asset_intents": "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 1",
}


def upgrade(connection: sa.Connection, schema: str | None) -> None:
    tables = _tables(schema).sorted_tables
    # All are looked at before anything is changed.
    found = [(table, examine(connection, table)) for table in tables]
    adopted: dict[str, adoption.Added] = {}
    for table, there in found:
        if there is None:
            table.create(connection)
        elif there.ours:
            adoption.create_indexes(connection, table)
        else:
            adopted[table.name] = adoption.adopt(connection, there)
        if connection.dialect.name == "postgresql" and table.name in _STORAGE:
            name = connection.dialect.identifier_preparer.format_table(table)
            connection.exec_driver_sql(f"ALTER TABLE {name} SET ({_STORAGE[table.name]})")
    if adopted:
        adoption.remember(connection, VERSION_TABLE, schema, adopted)


def downgrade(connection: sa.Connection, schema: str | None) -> None:
    adopted = adoption.recall(connection, VERSION_TABLE, schema)
    for table in reversed(_tables(schema).sorted_tables):
        if table.name in adopted:
            adoption.give_back(connection, table, adopted[table.name], _STORAGE.get(table.name))
        else:
            adoption.drop(connection, table)


def _times() -> list[sa.Column[Any]]:
    return [sa.Column(name, UtcDateTime, nullable=False, server_default=now) for name in ("created_at", "updated_at")]


def _tables(schema: str | None) -> sa.MetaData:
    metadata = sa.MetaData(
        schema=schema,
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
        },
    )
    for define in (_content_jobs, _assets, _content_job_events, _asset_intents):
        define(metadata)
    return metadata


def _content_jobs(metadata: sa.MetaData) -> None:
    jobs = sa.Table(
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

    # Jobs that may run now, by company, so that a claim can go round the companies; and jobs that wait for a time.
    sa.Index(
        "content_jobs_queued_idx",
        jobs.c.company_id,
        jobs.c.priority.desc(),
        jobs.c.created_at,
        jobs.c.id,
        postgresql_where=QUEUED,
        sqlite_where=QUEUED,
    )
    sa.Index(
        "content_jobs_scheduled_idx",
        jobs.c.priority.desc(),
        jobs.c.run_at,
        jobs.c.id,
        postgresql_where=SCHEDULED,
        sqlite_where=SCHEDULED,
    )


def _assets(metadata: sa.MetaData) -> None:
    sa.Table(
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


def _content_job_events(metadata: sa.MetaData) -> None:
    sa.Table(
        "content_job_events",
        metadata,
        sa.Column("id", _BIG_ID, sa.Identity(always=False), primary_key=True),
        sa.Column("company_id", sa.Text, nullable=False),
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("payload", JsonObject, nullable=False, server_default=sa.text("'{}'")),
        sa.Column("created_at", UtcDateTime, nullable=False, server_default=now),
        sa.Column("xid", sa.BigInteger, server_default=transaction_id),
        sa.UniqueConstraint("job_id", "seq"),
        sa.Index("content_job_events_xid_idx", "xid", "id"),
        sqlite_autoincrement=True,
    )


def _asset_intents(metadata: sa.MetaData) -> None:
    sa.Table(
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
