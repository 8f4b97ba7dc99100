"""Glance: whether an SQLite file may have been committed to, by a look at its write-ahead log from outside.

A question to SQLite costs a process that has slept several times as much.
"""

from __future__ import annotations

import os
import time

# What is written is committed when it has been flushed, and others then see it without a further trace in the file. Of
# a file that was written to longer ago than this, in nanoseconds, that is over; and the next write has another time,
# which is that of the kernel's last tick, some milliseconds ago.
SETTLED = 2_000_000_000
# After so many seconds the file is not believed, whatever it says: a flush may take longer, and some network file
# systems tell old times.
BELIEVED = 1.0


class Glance:
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
