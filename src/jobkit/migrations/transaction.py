"""The transaction of a migration: exclusive, and committed as a whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from jobkit.errors import ConfigurationError

# The key of the advisory lock, the same in every version of jobkit: the first 8 bytes of SHA-256("jobkit") as a signed
# integer.
_LOCK = -5676339625223235709
# DDL that waits for a lock blocks every later query on the table, so it gives up soon.
LOCK_TIMEOUT = "10s"


def supported(bind: object) -> None:
    """``ConfigurationError`` unless ``bind`` is an Engine or Connection of SQLite or PostgreSQL."""
    if not isinstance(bind, sa.Engine | sa.Connection):
        raise ConfigurationError(
            f"migrations need an Engine or Connection, not {type(bind).__name__}; "
            "with an async engine: await connection.run_sync(jobkit.migrations.upgrade)"
        )
    if bind.dialect.name not in ("sqlite", "postgresql"):
        raise ConfigurationError(f"jobkit works on SQLite and PostgreSQL, not on {bind.dialect.name}")


def refusal(error: sa.exc.DBAPIError) -> tuple[str, str]:
    """The SQLSTATE of an error of the database, empty on SQLite, and its message in one line."""
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None) or ""
    return state, str(error.orig).strip().replace("\n", "; ")


@contextlib.contextmanager
def exclusive(bind: sa.Engine | sa.Connection) -> Iterator[sa.Connection]:
    """A connection in a transaction: a savepoint in the caller's, or a transaction of its own."""
    lock = _sqlite if bind.dialect.name == "sqlite" else _postgresql
    if isinstance(bind, sa.Connection):
        with lock(bind):
            yield bind
        return
    with bind.connect() as connection:
        if bind.dialect.name == "postgresql":
            # The engine may be in AUTOCOMMIT, which could commit half a migration, or in REPEATABLE READ, which would
            # not see the result of the migration it waited for.
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
    # Dropping a table to rebuild it would fire ON DELETE of others. The pragma is ignored within a transaction.
    with pragma(connection, "foreign_keys", 0), connection.begin():
        if _driver(connection).in_transaction:  # a listener of the host has begun a DEFERRED one
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
    """Change an SQLite setting for the block; restored afterwards, also on error."""
    before = _raw(connection, f"PRAGMA {name}")
    _raw(connection, f"PRAGMA {name} = {value}")
    try:
        yield
    finally:
        _raw(connection, f"PRAGMA {name} = {before}")


def _raw(connection: sa.Connection, statement: str) -> Any:
    """Run a statement without beginning a transaction; the first value of its first row."""
    with contextlib.closing(connection.connection.cursor()) as cursor:
        cursor.execute(statement)
        row = cursor.fetchone()
        return row and row[0]


def _driver(connection: sa.Connection) -> Any:
    return connection.connection.driver_connection
