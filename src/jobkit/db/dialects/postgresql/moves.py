"""The identity of an event log on PostgreSQL, and what becomes of its positions when it comes to another server.

A server numbers its transactions for itself, and so does a standby from its promotion on: the numbers that came with
a log say nothing about those to come. So each server that a log is on is an epoch of it, and a position is the epoch's
number times ``EPOCH`` plus that of the transaction. In ``content_job_events.xid``, events of the present epoch have the
transaction's number alone, which its default writes, and those of earlier ones have ``EPOCH`` less for each since.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sqlalchemy as sa

from jobkit.db.dialects.base import MARK, PRUNED
from jobkit.db.dialects.position import EPOCH
from jobkit.db.dialects.sql import Sql
from jobkit.db.failures import sqlstate
from jobkit.errors import ConfigurationError

logger = logging.getLogger("jobkit")

#: SQL for the number that the positions of the present epoch begin with.
BASE = f"COALESCE((SELECT max(epoch) FROM {{s}}content_job_epochs), 0) * {EPOCH}"

# A cluster keeps its identifier when it is copied; the copy's timeline is another once it is promoted. Any role may
# read both, unless somebody has revoked that.
CLUSTER = Sql("SELECT CAST(system_identifier AS text) FROM pg_control_system()")
TIMELINE = Sql(
    "SELECT CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) ELSE '' END"
)
IN_CLUSTER = Sql("SELECT d.oid, CAST(to_regclass(:name) AS oid) FROM pg_database d WHERE datname = current_database()")

_NEXT_XID = "CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint)"
# Whether the newest epoch was written on this server, or came with it from the one before; and whether there are events
# with numbers that this server has not given yet.
PRESENT = Sql(
    f"""
SELECT e.epoch, e.server, CAST(CAST(e.xmin AS text) AS bigint) = mod(e.xid, 4294967296) AS at_home, EXISTS (
    SELECT 1 FROM {{s}}content_job_events WHERE xid >= {_NEXT_XID} AND seq > 0) AS beyond
FROM (SELECT) AS one LEFT JOIN {{s}}content_job_epochs e ON true ORDER BY e.epoch DESC LIMIT 1
"""
)
# The transaction of this server that wrote the row, whatever its column says.
_WRITTEN = f"{_NEXT_XID} - mod({_NEXT_XID} - CAST(CAST(xmin AS text) AS bigint), 4294967296)"
# The last transaction that brought rows from elsewhere: their numbers are greater than its own, or are several. What a
# transaction appends has its own number, which is smaller than those of its savepoints.
BROUGHT_UPTO = Sql(
    f"""
SELECT max(written) FROM (
    SELECT {_WRITTEN} AS written, min(xid) AS low, max(xid) AS high
    FROM {{s}}content_job_events WHERE seq > 0 GROUP BY 1
) AS by_transaction WHERE high > written OR low < high
"""
)
# One statement, because the connection may be in AUTOCOMMIT. Rows that were brought here keep their positions. Without
# such rows, this is a copy of a server, which may lack the last events of the original: older cursors are refused.
BEGIN_EPOCH = Sql(
    f"""
WITH begun AS (
    INSERT INTO {{s}}content_job_epochs (epoch, server) VALUES (:epoch, :server) ON CONFLICT DO NOTHING RETURNING epoch
), moved AS (
    UPDATE {{s}}content_job_events SET xid = xid - {EPOCH}
    WHERE seq > 0 AND {_WRITTEN} <= :upto AND EXISTS (SELECT 1 FROM begun) RETURNING id
), marked AS (
    INSERT INTO {{s}}content_job_events AS e (id, xid, company_id, job_id, seq, type, payload)
    SELECT 0, 0, '', '{MARK}', 0, '{PRUNED}', jsonb_build_object('xid', epoch * {EPOCH}, 'id', 0) FROM begun
    WHERE CAST(:upto AS bigint) IS NULL AND epoch > 0
    ON CONFLICT (job_id, seq) DO UPDATE SET payload = excluded.payload
)
SELECT (SELECT count(*) FROM begun), (SELECT count(*) FROM moved)
"""
)
COME_HOME = Sql("UPDATE {s}content_job_epochs SET xid = DEFAULT WHERE epoch = :epoch")


def log_name(connection: sa.Connection) -> str | None:
    """See ``Events.log_name``."""
    schema = (connection.get_execution_options().get("schema_translate_map") or {}).get(None)
    prefix = "" if schema is None else connection.dialect.identifier_preparer.quote_identifier(schema) + "."
    database, table = connection.execute(IN_CLUSTER(connection), {"name": f"{prefix}content_job_events"}).one()
    return None if table is None else f"postgresql:{_fact(connection, CLUSTER)}:{database}:{table}"


def note(connection: sa.Connection) -> bool:
    """See ``Events.note_moves``. Does nothing where nobody may know which server this is."""
    timeline = _fact(connection, TIMELINE)
    if not timeline:
        return timeline is None
    server = f"{_fact(connection, CLUSTER)}/{timeline}"
    epoch, recorded, at_home, beyond = connection.execute(PRESENT(connection)).one()
    if recorded == server and not beyond:
        if not at_home:  # restored to the server it was on
            _write(connection, COME_HOME, epoch=epoch)
        return True
    upto = None
    if beyond or not at_home:
        upto = connection.execute(BROUGHT_UPTO(connection)).scalar()
    following = int(upto is not None) if epoch is None else epoch + 1
    _write(connection, BEGIN_EPOCH, needed=following > 0, epoch=following, server=server, upto=upto)
    return True


def _write(connection: sa.Connection, statement: Sql, *, needed: bool = False, **values: Any) -> None:
    try:
        with _kept_whole(connection):
            told = connection.execute(statement(connection), values)
            begun, moved = told.one() if told.returns_rows else (0, 0)
    except sa.exc.DBAPIError as error:
        if sqlstate(error) not in ("25006", "42501"):
            raise
        if needed:
            raise ConfigurationError(
                "the event log has come here from another server, and this role may not write that down: run jobkit "
                "migrate as one that may, or start a runner"
            ) from error
        return
    if begun and needed:
        logger.warning(
            "the event log has come to another server: its epoch is %d, %d events came", values["epoch"], moved
        )


def _fact(connection: sa.Connection, statement: Sql) -> str | None:
    try:
        with _kept_whole(connection):
            found: str | None = connection.execute(statement(connection)).scalar()
    except sa.exc.ProgrammingError as error:
        logger.info("what tells servers apart may not be read: %s", error.orig)
        return None
    return found


def _kept_whole(connection: sa.Connection) -> AbstractContextManager[object]:
    """An error within it leaves the connection's transaction, if there is one, as it was."""
    driver: Any = connection.connection.dbapi_connection
    return nullcontext() if getattr(driver, "autocommit", False) is True else connection.begin_nested()
