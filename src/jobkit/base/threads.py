"""Daemon threads: a pool, a periodic task, and the state of a task that may be taken from its thread."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from jobkit.base.clock import Backoff
from jobkit.base.text import error_message

# Returns True when its thread was replaced meanwhile: then the thread ends.
Task = Callable[[], bool | None]

logger = logging.getLogger("jobkit")


class DaemonPool:
    """Up to ``size`` daemon threads that run tasks in the order of submission.

    Not ``concurrent.futures``: it joins its threads at the interpreter's exit, which a renderer that hangs would block.
    """

    # A submitted task may wait for a thread.
    waits = True

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name = size, name
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = threading.Semaphore(0)
        self._resize = threading.Lock()
        self._count = 0
        #: How many threads were replaced and have not come back.
        self.left_behind = 0
        self._refused = False

    @property
    def stuck(self) -> bool:
        """Whether every thread was left behind and no other can be started. Tries to, so that this may end."""
        with self._resize:
            if not self._refused or not self.left_behind or len(self._threads) > self.left_behind:
                return False
            started = self._start_thread()
            if started and self._tasks.empty():
                self._idle.release()
            return not started

    def submit(self, task: Task) -> None:
        """Run ``task`` on a thread, or at once in the calling one when no thread can be started.

        Called from one thread only. An exception of ``task`` is logged.
        """
        with self._resize:
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._size:
                self._start_thread()
            has_threads = bool(self._threads)  # those left behind may come back; nothing may block the caller
        if has_threads:
            self._tasks.put(task)
        else:
            self._run(task)

    def replace(self) -> None:
        """Allow one more thread in place of one that is blocked in a task; that task has to return True when it ends.

        Called from the thread that submits.
        """
        with self._resize:
            self._size += 1
            self.left_behind += 1
            if not self._tasks.empty():
                self._start_thread()

    def close(self) -> None:
        """Let every thread end after the tasks submitted so far. Does not wait."""
        for _ in list(self._threads):
            self._tasks.put(None)

    def _start_thread(self) -> bool:
        thread = threading.Thread(target=self._work, name=f"{self._name}-{self._count}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # too many threads, or Python 3.12 is exiting
            if not self._refused:
                logger.warning("%s goes on with %d threads: %s", self._name, len(self._threads), error)
            self._refused = True
        else:
            self._refused = False
            self._threads.append(thread)
            self._count += 1
        return not self._refused

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._run(task):
                with self._resize:
                    self._size -= 1
                    self.left_behind -= 1
                    self._threads.remove(threading.current_thread())
                break
            self._idle.release()

    def _run(self, task: Task) -> bool:
        try:
            return bool(task())
        except BaseException:
            with suppress(Exception):  # a host's log handler that raises must not end the thread
                logger.exception("a task of %s failed", self._name)
            return False


class InlinePool:
    """Runs each task at once in the thread that submits it: for databases that only one thread can use."""

    waits = False
    left_behind, stuck = 0, False

    def submit(self, task: Task) -> None:
        task()

    def replace(self) -> None:
        pass  # no task runs when this can be called

    def close(self) -> None:
        pass


Pool = DaemonPool | InlinePool


class Periodic:
    """A daemon thread that does ``task`` every ``interval`` seconds, and as soon as ``woken`` is set, until stopped.

    The pauses vary by a tenth, so that many processes do not act in step. A task that raises is logged once in a row
    and tried again after a growing pause, which ``woken`` does not cut short. ``after`` is called on the thread when it
    ends.
    """

    def __init__(
        self,
        name: str,
        interval: float,
        task: Callable[[], object],
        after: Callable[[], None] = lambda: None,
        woken: threading.Event | None = None,
    ) -> None:
        self._name, self.interval, self._task, self._after = name, interval, task, after
        self._woken = threading.Event() if woken is None else woken
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._stopped = threading.Event()
        self._backoff = Backoff()
        self._since: float | None = None

    @property
    def busy(self) -> float:
        """Seconds that the task has been running, 0 between two runs. Read by any thread."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end. Waits for nothing."""
        self._stopped.set()
        self._woken.set()

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds until the stopped thread has ended."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(max(0.0, timeout))

    def _run(self) -> None:
        while self._next():
            self._since = time.monotonic()
            try:
                self._task()
                self._backoff.succeeded()
            except Exception as error:
                if self._backoff.failed():
                    with suppress(Exception):  # a host's log handler that raises must not end the thread
                        logger.error("%s failed and is tried again: %s", self._name, error_message(error))
            finally:
                self._since = None
        self._after()

    def _next(self) -> bool:
        """Wait until the task is due; False when stopped."""
        if self._backoff:
            self._stopped.wait(min(self.interval, self._backoff.pause))
        elif not self._stopped.is_set():
            self._woken.wait(self.interval * random.uniform(0.9, 1.1))
        self._woken.clear()
        return not self._stopped.is_set()


class TaskState:
    """The state of a task that may be taken from its thread: waiting, running, finished, cancelled, abandoned.

    ``start`` and ``finish`` are called by the thread that runs the task, ``cancel`` and ``abandon`` by others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = self._running = self._unwanted = False

    @property
    def cancelled(self) -> bool:
        """Whether it was kept from starting."""
        return self._unwanted and not self._started

    def start(self) -> bool:
        """The task is about to run. False when it was cancelled: then it must not."""
        with self._lock:
            self._started = self._running = not self._unwanted
            return self._running

    def finish(self) -> bool:
        """The task has run. True when it was abandoned: another thread has taken the place of this one."""
        with self._lock:
            self._running = False
            return self._unwanted

    def cancel(self) -> bool:
        """Keep the task from starting. False when it has started."""
        with self._lock:
            self._unwanted = self._unwanted or not self._started
            return not self._started

    def abandon(self) -> bool:
        """Wait no longer for a running task: its thread will be replaced. False when it is not running."""
        with self._lock:
            self._unwanted = self._unwanted or self._running
            return self._running
