"""A connection that one loop keeps for itself, and that can be cut from outside when a call on it never answers."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sa

# A call that goes on after so many times its limit has not been ended by cutting it.
GIVE_UP = 2.0


class DedicatedConnection:
    """The connection of one thread, opened when it is needed, closed after whatever goes wrong on it.

    ``waiting`` and ``cut`` are for other threads; the rest is for the one.
    """

    def __init__(self, engine: sa.Engine, *, autocommit: bool = False) -> None:
        self._engine, self._autocommit = engine, autocommit
        self._connection: sa.Connection | None = None
        self._pool = engine.pool
        self._since: float | None = None

    @contextmanager
    def use(self) -> Iterator[sa.Connection]:
        """The connection, for as long as the ``with`` lasts; closed when it raises."""
        self._since = time.monotonic()
        try:
            yield self._opened()
        except BaseException:
            self.close()
            raise
        finally:
            self._since = None

    def close(self) -> None:
        """Give the connection back; the next use opens one anew."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                if self._engine.pool is not self._pool:  # disposed of meanwhile: it would keep the connection, open
                    connection.invalidate()
                connection.close()

    @property
    def waiting(self) -> float:
        """For how many seconds the present use has lasted; 0 when there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def cut(self) -> None:
        """End the call that is under way: it raises what a lost connection raises, or an interrupted statement.

        Does nothing while the connection is being opened, and with drivers that have no socket to show.
        """
        connection = self._connection
        if connection is None:
            return
        with suppress(Exception):  # it may be closed at this very moment
            proxied = connection.connection  # of one that was detached, only the latter is known
            driver: Any = proxied.driver_connection or proxied.dbapi_connection
            if hasattr(driver, "interrupt"):  # sqlite3
                driver.interrupt()
            else:  # psycopg, psycopg2
                # A copy of the descriptor: should the driver close its own now, the number may be somebody else's.
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


class SharedConnection:
    """Short uses by several threads, one at a time, each with a connection of its own: so they need one together."""

    def __init__(self, engine: sa.Engine, patience: float) -> None:
        """After ``patience`` seconds a thread no longer waits for the one before it, whose call may never answer."""
        self._engine, self._patience = engine, patience
        self._turn = threading.Lock()
        self._links: dict[DedicatedConnection, None] = {}

    @contextmanager
    def use(self) -> Iterator[sa.Connection]:
        """A connection, for as long as the ``with`` lasts."""
        mine = self._turn.acquire(timeout=self._patience)
        link = DedicatedConnection(self._engine)
        self._links[link] = None
        try:
            with link.use() as connection:
                yield connection
        finally:
            link.close()
            del self._links[link]
            if mine:
                self._turn.release()

    @property
    def waiting(self) -> float:
        """For how many seconds the longest of the present uses has lasted."""
        return max((link.waiting for link in list(self._links)), default=0.0)

    def cut(self) -> None:
        """As ``Link.cut``, for the use that has lasted longest."""
        if links := list(self._links):
            max(links, key=lambda link: link.waiting).cut()


@contextmanager
def autocommitting(connection: sa.Connection) -> Iterator[None]:
    """Begun without a transaction: within it each statement commits by itself, in one round trip instead of the three
    of BEGIN, statement and COMMIT. Only with psycopg; not where the host has a hook for BEGIN, whose ``SET LOCAL``
    would be forgotten, nor where one has left a transaction open.
    """
    driver: Any = connection.connection.dbapi_connection
    # Not through SQLAlchemy, which remembers each change of the isolation level until the connection goes back.
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


def abort_overdue(link: DedicatedConnection | SharedConnection, limit: float) -> bool:
    """Cut a use that has lasted more than ``limit`` seconds. True when even that has not ended it: another thread then
    has to take the place of the one that waits.
    """
    if link.waiting > limit:
        link.cut()
    return link.waiting > GIVE_UP * limit


def is_outage(error: Exception) -> bool:
    """Whether the database failed, rather than refused these values: the same values may succeed later."""
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError | OSError)


def is_refusal(error: BaseException) -> bool:
    """Whether the database replied that it will not have these values, and so has rolled the transaction back."""
    return isinstance(error, sa.exc.DBAPIError) and not is_outage(error)
