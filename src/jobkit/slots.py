"""Slots: the threads that render, and what waits for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from jobkit.attempt import Attempt
from jobkit.pools import Task


class Pool(Protocol):
    #: Whether what is submitted may wait for a thread.
    waits: bool

    def submit(self, task: Task) -> None: ...
    def replace(self) -> None: ...
    def close(self) -> None: ...


class Slots:
    """Up to ``size`` attempts rendered at a time, in the order in which they were added.

    How many threads take them is decided at each ``engage``: threads that take turns at work of a millisecond cost more
    than the work. Belongs to one thread, but for what it does on those of ``pool``.
    """

    def __init__(self, pool: Pool, size: int, render: Callable[[Attempt], bool]) -> None:
        """``render``: renders one, and tells whether another thread has taken the place of this one meanwhile."""
        self._pool, self._size, self._render = pool, size, render
        self._lock = threading.Lock()
        self._waiting: deque[Attempt] = deque()
        # How many threads take what waits, and how many of them are rendering.
        self._engaged = self._rendering = 0
        #: How many threads took what waited when they were last engaged.
        self.crew = 1

    @property
    def idle(self) -> bool:
        """Whether something waits that a thread could be engaged for."""
        # Those that are engaged and have not begun yet will take what waits.
        return bool(self._waiting) and self._engaged < min(self._size, self._rendering + len(self._waiting))

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, attempts: Iterable[Attempt]) -> None:
        """Let these wait. No thread is engaged for them yet."""
        with self._lock:
            self._waiting.extend(attempts)

    def engage(self, most: float) -> None:
        """Let up to ``most`` threads, and at least one, take what waits."""
        while self._one_more(most):
            self._pool.submit(self._serve)
        self.crew = max(1, self._engaged)

    def replace(self) -> None:
        """Let another thread take the place of one that goes on rendering."""
        self._pool.replace()
        self._less()

    def close(self) -> None:
        """Drop what waits, and let every thread end when it is through with what it renders. Waits for none."""
        with self._lock:
            self._waiting.clear()
        self._pool.close()

    def _one_more(self, most: float) -> bool:
        """Whether another thread shall be engaged; it is counted then."""
        with self._lock:
            wanted = min(self._size, max(1.0, most), self._rendering + len(self._waiting))
            more = bool(self._waiting) and self._engaged < wanted
            self._engaged += more
            return more

    def _less(self) -> None:
        with self._lock:
            self._engaged -= 1
            self._rendering -= 1

    def _serve(self) -> bool:
        while (attempt := self._take()) is not None:
            try:
                late = self._render(attempt)
            except BaseException:
                self._less()
                raise
            if late:
                return True
            with self._lock:
                self._rendering -= 1
        return False

    def _take(self) -> Attempt | None:
        with self._lock:
            if not self._waiting:
                self._engaged -= 1
                return None
            self._rendering += 1
            return self._waiting.popleft()
