"""What a worker's main thread waits for, and how it speaks: no busy thread and no dead pipe is in the way."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Bell:
    """Rings at the signals, and when a call in the background has ended. Made and waited for by the main thread.

    Python runs a signal's handler in the main thread, and the kernel may interrupt any other: a main thread that waits
    for a lock would not hear it. But the descriptor is written to at once, whichever thread is interrupted.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = set(numbers)
        self._reading, self._writing = socket.socketpair()
        for end in (self._reading, self._writing):
            end.setblocking(False)
        for number in numbers:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # else: under nohup
                signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def close(self) -> None:
        """Hear nothing more."""
        signal.set_wakeup_fd(-1)
        self._reading.close()
        self._writing.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it rings, up to ``timeout`` seconds; whether that was a signal."""
        if not select.select([self._reading], [], [], timeout)[0]:
            return False
        return not self._numbers.isdisjoint(self._reading.recv(4096))  # the host may handle other signals

    def background(self, call: Callable[[], T]) -> Future[T]:
        """Call it on a daemon thread; rings when that has ended."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            with suppress(OSError):
                self._writing.send(b"\0")

        threading.Thread(target=run, name="jobkit-work", daemon=True).start()
        return future


class Speaker:
    """Prints lines on a thread of its own: a reader that is gone, or that reads no more, holds up nobody."""

    def __init__(self) -> None:
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._print, name="jobkit-print", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        self._lines.put(f"{line}\n")

    def close(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds until everything is printed."""
        self._lines.put(None)
        self._thread.join(timeout)

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                descriptor = sys.stdout.fileno()
            except (AttributeError, OSError):  # it was closed before the start, or is the host's object
                print(line, end="", flush=True)
                continue
            try:
                # Not by sys.stdout: while a write to it blocks, its lock is held, and the exit would wait for that.
                rest = line.encode(sys.stdout.encoding, "backslashreplace")
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except OSError:  # nothing can be told any more, nor what Python flushes at its exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
