"""What operators see of a failed attempt, beside ``error_message``, which users see."""

from __future__ import annotations

import sqlalchemy as sa

revision = "0002"
down_revision = "0001"

_COLUMNS = {"content_jobs": {"error_detail": "TEXT"}}


def upgrade(connection: sa.Connection, schema: str | None) -> None:
    for table, columns in _COLUMNS.items():
        there = {column["name"] for column in sa.inspect(connection).get_columns(table, schema=schema)}
        for name, kind in columns.items():
            if name not in there:  # made by ``metadata.create_all``
                connection.exec_driver_sql(f"ALTER TABLE {_named(connection, table, schema)} ADD COLUMN {name} {kind}")


def downgrade(connection: sa.Connection, schema: str | None) -> None:
    for table, columns in _COLUMNS.items():
        for name in columns:
            connection.exec_driver_sql(f"ALTER TABLE {_named(connection, table, schema)} DROP COLUMN {name}")


def _named(connection: sa.Connection, table: str, schema: str | None) -> str:
    return connection.dialect.identifier_preparer.format_table(sa.table(table, schema=schema))
