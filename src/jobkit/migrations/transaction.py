"""A transaction for a migration: no other migration runs beside it, and all of it stays or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from jobkit.errors import ConfigurationError

# Any number will do, as long as every version of jobkit takes the same: the first 8 bytes of SHA-256("jobkit"), as a
# signed integer.
_LOCK = -5676339625223235709
# DDL that waits for a lock makes every later query on the table wait behind it, so it gives up rather soon.
LOCK_TIMEOUT = "10s"


def supported(bind: object) -> None:
    """Return for an Engine or Connection of a database that jobkit works on; ``ConfigurationError`` for the rest."""
    if not isinstance(bind, sa.Engine | sa.Connection):
        raise ConfigurationError(
            f"migrations need an Engine or Connection, not {type(bind).__name__}; "
            "with an async engine: await connection.run_sync(jobkit.migrations.upgrade)"
        )
    if bind.dialect.name not in ("sqlite", "postgresql"):
        raise ConfigurationError(f"jobkit works on SQLite and PostgreSQL, not on {bind.dialect.name}")


@contextlib.contextmanager
def exclusive(bind: sa.Engine | sa.Connection) -> Iterator[sa.Connection]:
    """A connection in a transaction: the caller's, as a savepoint in it, or one of its own."""
    lock = _sqlite if bind.dialect.name == "sqlite" else _postgresql
    if isinstance(bind, sa.Connection):
        with lock(bind):
            yield bind
        return
    with bind.connect() as connection:
        if bind.dialect.name == "postgresql":
            # The engine may be in AUTOCOMMIT, which would make half a migration possible, or in REPEATABLE READ, which
            # would not see what the migration it waited for has made.
            connection.execution_options(isolation_level="READ COMMITTED")
        with lock(connection):
            yield connection


@contextlib.contextmanager
def _sqlite(connection: sa.Connection) -> Iterator[None]:
    if connection.in_transaction():
        if not _driver(connection).in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        with connection.begin_nested():
            yield
        return
    # Rebuilding a table that others refer to would fire their ON DELETE. The pragma is ignored within a transaction.
    with pragma(connection, "foreign_keys", 0), connection.begin():
        if _driver(connection).in_transaction:  # a hook of the host's has begun one, DEFERRED
            _raw(connection, "ROLLBACK")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield


@contextlib.contextmanager
def _postgresql(connection: sa.Connection) -> Iterator[None]:
    driver: Any = connection.connection.dbapi_connection
    if getattr(driver, "autocommit", False) is True:
        raise ConfigurationError(
            "this connection is in AUTOCOMMIT, where half a migration could stay: call upgrade with the Engine"
        )
    with connection.begin_nested() if connection.in_transaction() else connection.begin():
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        before = connection.execute(sa.text("SHOW lock_timeout")).scalar_one()
        _set_lock_timeout(connection, LOCK_TIMEOUT)
        yield
        _set_lock_timeout(connection, before)


def _set_lock_timeout(connection: sa.Connection, value: str) -> None:
    connection.execute(sa.text("SELECT set_config('lock_timeout', :value, true)"), {"value": value})


@contextlib.contextmanager
def pragma(connection: sa.Connection, name: str, value: int) -> Iterator[None]:
    """An SQLite setting for the time of the block. It is the same again afterwards, also on error."""
    before = _raw(connection, f"PRAGMA {name}")
    _raw(connection, f"PRAGMA {name} = {value}")
    try:
        yield
    finally:
        _raw(connection, f"PRAGMA {name} = {before}")


def _raw(connection: sa.Connection, statement: str) -> Any:
    """Run a statement that must not begin a transaction; the first value of its first row."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement)
        row = cursor.fetchone()
        return row and row[0]
    finally:
        cursor.close()


def _driver(connection: sa.Connection) -> Any:
    return connection.connection.driver_connection
