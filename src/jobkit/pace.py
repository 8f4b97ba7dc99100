"""Pace: how long renderers took lately, and what to expect of the next ones."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection

from jobkit.attempt import Attempt

# Renderers are quick as long as each of so many took less than so many seconds, and none at work has taken longer.
LAST = 16
QUICK = 0.02
# A thread is worth its while for each so many seconds of work that are to be expected of what waits: threads that take
# turns at work of a millisecond cost more than the work. What has taken longer than that by now is worth all threads.
WORTH = 0.01


class Pace:
    """Of the attempts that are in ``rendering``, and were. Used by one thread."""

    def __init__(self, rendering: Collection[Attempt]) -> None:
        self._rendering = rendering
        self._took: deque[float] = deque(maxlen=LAST)

    def add(self, took: float) -> None:
        """One has ended after so many seconds."""
        self._took.append(took)

    @property
    def began(self) -> list[float]:
        """When each of those that are at work began."""
        return [attempt.started for attempt in self._rendering if attempt.started is not None and attempt.took is None]

    @property
    def longest(self) -> float:
        """How long the one that has been at work for longest has taken so far; 0 when none is at work."""
        return max(0.0, time.monotonic() - min(self.began, default=math.inf))

    @property
    def quick(self) -> bool:
        """Whether the next ones are likely to take next to no time."""
        return len(self._took) == LAST and max(*self._took, self.longest) < QUICK

    @property
    def steady(self) -> float:
        """For how many seconds those at work cannot change what ``threads`` says."""
        return WORTH - self.longest

    def threads(self, waiting: int, crew: int) -> float:
        """How many threads so many that wait are worth. ``crew``: how many have shared the interpreter lately, because
        at work as short as this most of the time is spent waiting for the others.
        """
        if len(self._took) < LAST or self.longest >= WORTH:
            return math.inf
        return waiting * sum(self._took) / LAST / crew / WORTH
