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


def upgrade(connection: sa.Connection, schema: str | None) -> None:
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
