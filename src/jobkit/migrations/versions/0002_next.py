"""What version 0.2 adds to the tables of 0.1. Each part has a function for the way up and one for the way down.

Once 0.2 is released this is frozen, as 0001 is. What ``jobkit.metadata`` has made already is kept.
"""

from __future__ import annotations

import sqlalchemy as sa

from jobkit.migrations import adoption
from jobkit.migrations.examination import examine
from jobkit.tables import UtcDateTime, now, transaction_id

revision = "0002"
down_revision = "0001"

# What operators see of a failed attempt, beside ``error_message``, which users see.
_COLUMNS = {"content_jobs": {"error_detail": "TEXT"}}
# Of the jobs that wait for a time an index by company, as there is of other queued jobs, and one by time.
_SCHEDULED = "WHERE status = 'queued' AND run_at IS NOT NULL"
_INDEXES_BEFORE = {"content_jobs_scheduled_idx": "priority DESC, run_at, id"}
_INDEXES = {
    "content_jobs_scheduled_idx": "company_id, priority DESC, run_at, id",
    "content_jobs_due_idx": "run_at, company_id",
}


def upgrade(connection: sa.Connection, schema: str | None) -> None:
    for table_name, columns in _COLUMNS.items():
        there = {column["name"] for column in sa.inspect(connection).get_columns(table_name, schema=schema)}
        for name, kind in columns.items():
            if name not in there:
                named = _named(connection, table_name, schema)
                connection.exec_driver_sql(f"ALTER TABLE {named} ADD COLUMN {name} {kind}")
    _replace_indexes(connection, schema, _INDEXES)
    for table in _new_tables(schema):
        if examine(connection, table) is None:
            table.create(connection)
    for index in _new_indexes(schema):
        index.create(connection, checkfirst=True)


def downgrade(connection: sa.Connection, schema: str | None) -> None:
    for index in _new_indexes(schema):
        index.drop(connection, checkfirst=True)
    for table in reversed(_new_tables(schema)):
        adoption.drop(connection, table)
    _replace_indexes(connection, schema, _INDEXES_BEFORE)
    for table_name, columns in _COLUMNS.items():
        for name in columns:
            connection.exec_driver_sql(f"ALTER TABLE {_named(connection, table_name, schema)} DROP COLUMN {name}")


def _named(connection: sa.Connection, table: str, schema: str | None) -> str:
    return connection.dialect.identifier_preparer.format_table(sa.table(table, schema=schema))


def _replace_indexes(connection: sa.Connection, schema: str | None, indexes: dict[str, str]) -> None:
    # SQLite names the schema with the index, PostgreSQL with the table.
    prefix = "" if schema is None else connection.dialect.identifier_preparer.quote_schema(schema) + "."
    of_index, of_table = (prefix, "") if connection.dialect.name == "sqlite" else ("", prefix)
    for name in {**_INDEXES, **_INDEXES_BEFORE}:
        connection.exec_driver_sql(f"DROP INDEX IF EXISTS {prefix}{name}")
    for name, columns in indexes.items():
        connection.exec_driver_sql(f"CREATE INDEX {of_index}{name} ON {of_table}content_jobs ({columns}) {_SCHEDULED}")


def _new_tables(schema: str | None) -> list[sa.Table]:
    metadata = sa.MetaData(schema=schema, naming_convention={"pk": "%(table_name)s_pkey"})
    return [_content_job_epochs(metadata)]


def _content_job_epochs(metadata: sa.MetaData) -> sa.Table:
    return sa.Table(
        "content_job_epochs",
        metadata,
        sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("server", sa.Text, nullable=False),
        sa.Column("began_at", UtcDateTime, nullable=False, server_default=now),
        sa.Column("xid", sa.BigInteger, server_default=transaction_id),
    )


def _new_indexes(schema: str | None) -> list[sa.Index]:
    metadata = sa.MetaData(schema=schema)
    columns = (sa.Column("company_id", sa.Text), sa.Column("xid", sa.BigInteger), sa.Column("id", sa.BigInteger))
    events = sa.Table("content_job_events", metadata, *columns)
    return [sa.Index("content_job_events_company_idx", events.c.company_id, events.c.xid, events.c.id)]
