"""A connection that a thread keeps for itself, and that another can abort when a call on it never answers."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa

from jobkit.db.failures import is_stale

# A call that lasts longer than this many times its limit was not ended by aborting it.
GIVE_UP = 2.0
# The connections that a runner and its feed have at once; a pool of fewer makes them take turns.
ENOUGH = 4


class DedicatedConnection:
    """The connection of one thread, opened when it is needed, closed after any error on it.

    Between two uses it is kept; of a pool of fewer than ``ENOUGH`` connections only with ``keep``. Other threads may
    call ``busy_for`` and ``abort``, nothing else.
    """

    def __init__(self, engine: sa.Engine, *, autocommit: bool = False, keep: bool = False) -> None:
        self._engine, self._autocommit = engine, autocommit
        self._kept = keep or pool_limit(engine) >= ENOUGH
        self._connection: sa.Connection | None = None
        self._pool = engine.pool
        self._since: float | None = None

    @contextmanager
    def use(self) -> Iterator[sa.Connection]:
        """The connection, within the ``with``; closed when that raises."""
        self._since = time.monotonic()
        try:
            yield self._opened()
        except BaseException as error:
            self.close(stale=is_stale(error))
            raise
        finally:
            if not self._kept:
                self.close()
            self._since = None

    def close(self, *, stale: bool = False) -> None:
        """Give the connection back; the next use opens one anew. ``stale``: nobody is to use it again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                if stale or self._engine.pool is not self._pool:  # disposed of: the old one would keep it open
                    connection.invalidate()
                connection.close()

    @property
    def busy_for(self) -> float:
        """Seconds since the present use began; 0 without one."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def abort(self) -> None:
        """End the call under way: it raises the error of a lost connection, or on SQLite of an interrupted statement.

        Does nothing while the connection is being opened, and with drivers that do not show their socket.
        """
        connection = self._connection
        if connection is None:
            return
        with suppress(Exception):  # it may be closed at this moment
            proxied = connection.connection  # a detached one has no driver_connection
            driver: Any = proxied.driver_connection or proxied.dbapi_connection
            if hasattr(driver, "interrupt"):  # sqlite3
                driver.interrupt()
            else:  # psycopg, psycopg2
                # A copy: should the driver close its descriptor now, the number may be reused.
                with socket.socket(fileno=os.dup(driver.fileno())) as copy:
                    copy.shutdown(socket.SHUT_RDWR)

    def _opened(self) -> sa.Connection:
        if self._connection is None or self._connection.closed or self._connection.invalidated:
            self.close()
            self._pool = self._engine.pool
            connection = self._engine.connect()
            # AUTOCOMMIT: one statement carries a whole step, and no snapshot stays open between two.
            if self._autocommit:
                connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            self._connection = connection
        return self._connection


def pool_limit(engine: sa.Engine) -> float:
    """How many connections the engine's pool gives out at once."""
    pool = engine.pool
    if isinstance(pool, sa.AssertionPool):
        return 1
    if not isinstance(pool, sa.QueuePool) or pool.size() == 0:
        return math.inf
    overflow: int = pool._max_overflow  # below 0: without a limit
    return math.inf if overflow < 0 else pool.size() + overflow


class SharedConnection:
    """Several threads take turns with one pooled connection, each for a short use."""

    def __init__(self, engine: sa.Engine, turn_timeout: float) -> None:
        """After ``turn_timeout`` seconds a thread goes on beside the one before it, whose call may never answer."""
        self._engine, self._turn_timeout = engine, turn_timeout
        self._turn = threading.Lock()
        self._in_use: dict[DedicatedConnection, None] = {}

    @contextmanager
    def use(self) -> Iterator[sa.Connection]:
        """A connection, within the ``with``."""
        acquired = self._turn.acquire(timeout=self._turn_timeout)
        mine = DedicatedConnection(self._engine)
        self._in_use[mine] = None
        try:
            with mine.use() as connection:
                yield connection
        finally:
            mine.close()
            del self._in_use[mine]
            if acquired:
                self._turn.release()

    @property
    def busy_for(self) -> float:
        """Seconds since the longest present use began; 0 without one."""
        return max((used.busy_for for used in list(self._in_use)), default=0.0)

    def abort(self) -> None:
        """As ``DedicatedConnection.abort``, for the use that has lasted longest."""
        if in_use := list(self._in_use):
            max(in_use, key=lambda used: used.busy_for).abort()


@contextmanager
def autocommitting(connection: sa.Connection) -> Iterator[None]:
    """Let each statement within the ``with`` commit by itself: one round trip instead of BEGIN, statement and COMMIT.

    Only with psycopg. Not where the host listens for ``begin``, whose ``SET LOCAL`` would be lost, nor within a
    transaction.
    """
    driver: Any = connection.connection.dbapi_connection
    # Not by execution_options: SQLAlchemy keeps a changed isolation level until the connection goes back.
    if (
        connection.dialect.driver != "psycopg"
        or connection.dispatch.begin
        or driver.autocommit
        or driver.info.transaction_status.name != "IDLE"
    ):
        yield
        return
    driver.autocommit = True
    try:
        yield
    except BaseException:
        with suppress(Exception):  # a lost connection refuses, and is not used again
            driver.autocommit = False
        raise
    driver.autocommit = False


def abort_overdue(connection: DedicatedConnection | SharedConnection, limit: float) -> bool:
    """Abort a use that has lasted more than ``limit`` seconds. True when that did not end it: its thread is blocked for
    good and must be replaced.
    """
    if connection.busy_for > limit:
        connection.abort()
    return connection.busy_for > GIVE_UP * limit
