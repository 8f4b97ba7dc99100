"""LISTEN and NOTIFY on PostgreSQL: hints that something was committed, and never more than hints.

One connection a process and database, outside the engine's pool, on a thread of its own that nobody waits for. While it
is lost, silent or not to be had, as behind a pooler that shares connections by transaction, whoever relies on hints
polls.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import sqlalchemy as sa

from jobkit.base.clock import Backoff
from jobkit.base.text import error_message
from jobkit.db.connections import DedicatedConnection

logger = logging.getLogger("jobkit")

# A process that ends sooner needs no connection of its own, in seconds.
WARM_UP = 0.25
# How often the connection is asked whether it still listens, in seconds.
HEARTBEAT = 15.0
# Own commits of so many seconds are hinted at together.
TOGETHER = 0.02
# When to try again where LISTEN has no effect, in seconds.
FUTILE = 300.0
# How long an ended listener is waited for before its call is cut, in seconds.
ENDING = 1.0


class Futile(Exception):
    """LISTEN has no effect on this connection."""


class Listener:
    """Calls ``heard(jobs)`` on its thread when another session notified; ``jobs``: there may be jobs to run.

    ``start`` and ``stop`` once; ``tell`` from any thread.
    """

    def __init__(self, engine: sa.Engine, channels: tuple[str, ...], heard: Callable[[bool], object]) -> None:
        self.link = DedicatedConnection(engine, autocommit=True)
        self._jobs, self._log = channels
        self._heard = heard
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._pending: set[str] = set()
        self._last_sent = 0.0
        self._thread = threading.Thread(target=self._run, name="jobkit-listen", daemon=True)
        #: Whether hints arrive now, as far as can be known.
        self.listening = False

    @staticmethod
    def possible(engine: sa.Engine) -> bool:
        """Whether the engine's driver lets a thread wait for notifications."""
        return engine.dialect.name == "postgresql" and engine.dialect.driver == "psycopg"

    def start(self) -> None:
        """Listen from soon on."""
        self._near, self._far = socket.socketpair()
        for end in (self._near, self._far):
            end.setblocking(False)
        self._thread.start()

    def stop(self) -> None:
        """End, whatever the connection does."""
        self._stopped.set()
        self._poke()
        if self._thread is not threading.current_thread():
            self._thread.join(ENDING)
            if self._thread.is_alive():
                self.link.abort()
                self._thread.join(ENDING)

    def tell(self, *, jobs: bool) -> None:
        """Hint to other processes, soon, that this one committed; ``jobs``: also those that wait for jobs."""
        if self.listening:
            with self._lock:
                first = not self._pending
                self._pending.add(self._jobs if jobs else self._log)
            if first:
                self._poke()

    def _poke(self) -> None:
        with suppress(OSError):  # full: it will wake; closed: it has ended
            self._far.send(b"\0")

    def _run(self) -> None:
        pause, failing = WARM_UP, Backoff()
        try:
            while not self._stopped.wait(pause):
                began = time.monotonic()
                try:
                    self._listen()
                except Futile:
                    logger.info("LISTEN has no effect on this connection, so the event log is polled")
                    pause = FUTILE
                except Exception as error:
                    if time.monotonic() - began > HEARTBEAT:
                        failing.succeeded()
                    if failing.failed():
                        logger.info("the listening connection was lost; meanwhile polling: %s", error_message(error))
                    pause = failing.pause
                finally:
                    self.listening = False
                    self.link.close()
        finally:
            self._near.close()
            self._far.close()

    def _listen(self) -> None:
        with ExitStack() as stack:
            with self.link.use() as connection:
                inbox = NotifyReader(connection.connection.driver_connection)
                # It is this thread's for good: the pool may open another in its place, and will not close this one.
                connection.detach()
                stack.callback(inbox.close)
                for channel in (self._jobs, self._log):
                    connection.exec_driver_sql(f"LISTEN {channel}")
            self._attend(inbox, stack.enter_context(selectors.DefaultSelector()))

    def _attend(self, inbox: NotifyReader, selector: selectors.BaseSelector) -> None:
        self._check()  # at once: until it fails, polling is seldom
        self.listening = True
        self._heard(True)  # what was committed before is not notified again
        next_beat = time.monotonic() + HEARTBEAT
        selector.register(self._near, selectors.EVENT_READ)
        selector.register(inbox.fileno(), selectors.EVENT_READ)
        while not self._stopped.is_set():
            until = min(next_beat, self._last_sent + TOGETHER) if self._pending else next_beat
            ready = [key.fd for key, _ in selector.select(max(0.0, until - time.monotonic()))]
            if self._near.fileno() in ready:
                with suppress(BlockingIOError):
                    self._near.recv(4096)
            if inbox.fileno() in ready:
                inbox.read()
            if self._pending and time.monotonic() >= self._last_sent + TOGETHER:
                self._send()
            if time.monotonic() >= next_beat:
                self._check()
                next_beat = time.monotonic() + HEARTBEAT
            if heard := inbox.take():
                self._heard(self._jobs in heard)

    def _send(self) -> None:
        with self._lock:
            channels, self._pending = self._pending, set()
        notify = ", ".join(f"pg_notify('{channel}', '')" for channel in sorted(channels))
        with self.link.use() as connection:
            connection.exec_driver_sql(f"SELECT {notify}").all()
        self._last_sent = time.monotonic()

    def _check(self) -> None:
        with self.link.use() as connection:
            if not connection.exec_driver_sql("SELECT count(*) FROM pg_listening_channels()").scalar_one():
                raise Futile


class NotifyReader:
    """The notifications of a psycopg connection. Those that come while it executes something go to its handler, the
    others are read here.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._channels: set[str] = set()
        driver.add_notify_handler(lambda notify: self._add(notify.channel, notify.pid))

    def fileno(self) -> int:
        return int(self._driver.fileno())

    def read(self) -> None:
        """Take in what has arrived. Raises when the connection is lost."""
        raw = self._driver.pgconn
        raw.consume_input()
        while (notify := raw.notifies()) is not None:
            self._add(notify.relname.decode(), notify.be_pid)
        if self._driver.closed:
            raise ConnectionError("closed by the server")

    def close(self) -> None:
        """Close the connection, also one that is lost: SQLAlchemy drops a detached one without closing it."""
        with suppress(Exception):
            self._driver.close()

    def take(self) -> set[str]:
        """The channels notified since the last call, by others than this connection."""
        channels, self._channels = self._channels, set()
        return channels

    def _add(self, channel: str, sender: int) -> None:
        if sender != self._driver.info.backend_pid:
            self._channels.add(channel)


# What is written is committed when it has been flushed, and others then see it without a further trace in the file. Of
# a file that was written to longer ago than this, in nanoseconds, that is over; and the next write has another time,
# which is that of the kernel's last tick, some milliseconds ago.
SETTLED = 2_000_000_000
# After so many seconds the file is not believed, whatever it says: a flush may take longer, and some network file
# systems tell old times.
BELIEVED = 1.0


class WalFile:
    """Used by one thread."""

    def __init__(self, log: str | None) -> None:
        """``log``: where the write-ahead log is while there is one; None where there never is."""
        # Windows tells the time of an open file when it is closed.
        self._path = log if os.name == "posix" else None
        self._seen: tuple[int, int, int] | None = None
        self._until = 0.0

    def changed(self) -> bool:
        """Whether anything may have been committed since the last call that said so. Always, for another database, and
        for one that has no write-ahead log.
        """
        state = self._state()
        now = time.monotonic()
        if state is not None and state == self._seen and now < self._until:
            return False
        self._seen, self._until = state, now + BELIEVED
        return True

    def _state(self) -> tuple[int, int, int] | None:
        """What a commit changes; None where one may have left no trace."""
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        if time.time_ns() - found.st_mtime_ns < SETTLED:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
