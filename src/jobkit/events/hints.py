"""LISTEN and NOTIFY on PostgreSQL: hints that something was committed, and never more than hints.

One connection per process and database, outside the engine's pool, on a thread of its own that nobody waits for. While
it is lost or silent, or cannot be had, as behind a pooler in transaction mode, whoever relies on hints polls.
"""

from __future__ import annotations

import logging
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
# Seconds before the connection is opened: a process that ends sooner needs none.
WARM_UP = 0.25
# Seconds between two checks whether the connection still listens; until the next try where LISTEN has no effect.
HEARTBEAT, FUTILE_PAUSE = 15.0, 300.0
# Least seconds between two NOTIFYs for own commits.
NOTIFY_DELAY = 0.02
# Seconds that a stopped listener has to end before its call is aborted.
ENDING = 1.0


class Futile(Exception):
    """LISTEN has no effect on this connection."""


class Listener:
    """Calls ``on_notify(jobs)`` on its thread when another session notified; ``jobs``: there may be jobs to run."""

    def __init__(self, engine: sa.Engine, channels: tuple[str, ...], on_notify: Callable[[bool], object]) -> None:
        self.link = DedicatedConnection(engine, autocommit=True, keep=True)
        self._jobs, self._log = channels
        self._on_notify = on_notify
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        # Channels to notify, and those that other sessions notified.
        self._pending: set[str] = set()
        self._heard: set[str] = set()
        self._last_sent = 0.0
        # Wakes the thread while it waits for notifications. None before there is a connection.
        self._waker: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="jobkit-listen", daemon=True)
        #: Whether hints arrive now, as far as can be known.
        self.listening = False

    @staticmethod
    def possible(engine: sa.Engine) -> bool:
        """Whether the engine's driver lets a thread wait for notifications."""
        return engine.dialect.name == "postgresql" and engine.dialect.driver == "psycopg"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End, whatever the connection does."""
        self._stopped.set()
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(ENDING)
            if self._thread.is_alive():
                self.link.abort()
                self._thread.join(ENDING)

    def notify(self, *, jobs: bool) -> None:
        """Hint to other processes, soon, that this one committed; ``jobs``: also to those that wait for jobs."""
        if self.listening:
            with self._lock:
                first = not self._pending
                self._pending.add(self._jobs if jobs else self._log)
            if first:
                self._wake()

    def _wake(self) -> None:
        if self._waker is not None:
            with suppress(OSError):  # full: it will wake; closed: the thread has ended
                self._waker.send(b"\0")

    def _run(self) -> None:
        pause, failing = WARM_UP, Backoff()
        woken, self._waker = socket.socketpair()
        with woken, self._waker:
            self._waker.setblocking(False)
            while not self._stopped.wait(pause):
                began = time.monotonic()
                try:
                    self._listen(woken)
                except Futile:
                    logger.info("LISTEN has no effect on this connection, so the event log is polled")
                    pause = FUTILE_PAUSE
                except Exception as error:
                    if time.monotonic() - began > HEARTBEAT:
                        failing.succeeded()
                    if failing.failed():
                        logger.info("the listening connection was lost; meanwhile polling: %s", error_message(error))
                    pause = failing.pause
                finally:
                    self.listening = False
                    self.link.close()

    def _listen(self, woken: socket.socket) -> None:
        with ExitStack() as stack:
            with self.link.use() as connection:
                driver: Any = connection.connection.driver_connection
                # It is this thread's for good: the pool may open another in its place, and will not close this one.
                connection.detach()
                stack.callback(driver.close)
                # For notifications that come during a statement.
                driver.add_notify_handler(lambda notify: self._keep(driver, notify.channel, notify.pid))
                for channel in (self._jobs, self._log):
                    connection.exec_driver_sql(f"LISTEN {channel}")
            self._check()  # at once: until it fails, polling is rare
            self.listening = True
            self._on_notify(True)  # what was committed before is not notified again
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(woken, selectors.EVENT_READ)
            selector.register(driver, selectors.EVENT_READ)
            self._attend(driver, woken, selector)

    def _attend(self, driver: Any, woken: socket.socket, selector: selectors.BaseSelector) -> None:
        next_beat = time.monotonic() + HEARTBEAT
        while not self._stopped.is_set():
            until = min(next_beat, self._last_sent + NOTIFY_DELAY) if self._pending else next_beat
            ready = [key.fileobj for key, _ in selector.select(max(0.0, until - time.monotonic()))]
            if woken in ready:
                woken.recv(4096)
            if driver in ready:
                self._read(driver)
            if self._pending and time.monotonic() >= self._last_sent + NOTIFY_DELAY:
                self._send()
            if time.monotonic() >= next_beat:
                self._check()
                next_beat = time.monotonic() + HEARTBEAT
            if self._heard:
                heard, self._heard = self._heard, set()
                self._on_notify(self._jobs in heard)

    def _read(self, driver: Any) -> None:
        """Read what has arrived. Raises when the connection is lost."""
        driver.pgconn.consume_input()
        while (notify := driver.pgconn.notifies()) is not None:
            self._keep(driver, notify.relname.decode(), notify.be_pid)
        if driver.closed:
            raise ConnectionError("closed by the server")

    def _keep(self, driver: Any, channel: str, sender: int) -> None:
        if sender != driver.info.backend_pid:
            self._heard.add(channel)

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
