"""What operators see of a failed attempt, beside ``error_message``, which users see. And of the jobs that wait for a
time an index by company, as there is of other queued jobs, and one by time.
"""

from __future__ import annotations

import sqlalchemy as sa

revision = "0002"
down_revision = "0001"

_COLUMNS = {"content_jobs": {"error_detail": "TEXT"}}
_SCHEDULED = "WHERE status = 'queued' AND run_at IS NOT NULL"
_INDEXES_BEFORE = {"content_jobs_scheduled_idx": "priority DESC, run_at, id"}
_INDEXES = {
    "content_jobs_scheduled_idx": "company_id, priority DESC, run_at, id",
    "content_jobs_due_idx": "run_at, company_id",
}


def upgrade(connection: sa.Connection, schema: str | None) -> None:
    for table, columns in _COLUMNS.items():
        there = {column["name"] for column in sa.inspect(connection).get_columns(table, schema=schema)}
        for name, kind in columns.items():
            if name not in there:  # made by ``metadata.create_all``
                connection.exec_driver_sql(f"ALTER TABLE {_named(connection, table, schema)} ADD COLUMN {name} {kind}")
    _replace_indexes(connection, schema, _INDEXES)


def downgrade(connection: sa.Connection, schema: str | None) -> None:
    _replace_indexes(connection, schema, _INDEXES_BEFORE)
    for table, columns in _COLUMNS.items():
        for name in columns:
            connection.exec_driver_sql(f"ALTER TABLE {_named(connection, table, schema)} DROP COLUMN {name}")


def _named(connection: sa.Connection, table: str, schema: str | None) -> str:
    return connection.dialect.identifier_preparer.format_table(sa.table(table, schema=schema))


def _replace_indexes(connection: sa.Connection, schema: str | None, indexes: dict[str, str]) -> None:
    # SQLite names the schema with the index, PostgreSQL with the table.
    prefix = "" if schema is None else connection.dialect.identifier_preparer.quote_schema(schema) + "."
    of_index, of_table = (prefix, "") if connection.dialect.name == "sqlite" else ("", prefix)
    for name in {**_INDEXES, **_INDEXES_BEFORE}:  # some may be there: made by ``metadata.create_all``
        connection.exec_driver_sql(f"DROP INDEX IF EXISTS {prefix}{name}")
    for name, columns in indexes.items():
        connection.exec_driver_sql(f"CREATE INDEX {of_index}{name} ON {of_table}content_jobs ({columns}) {_SCHEDULED}")
