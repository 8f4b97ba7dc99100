"""Offers: events that this process has committed, on their way to its receivers."""

from __future__ import annotations

from collections.abc import Sequence

from jobkit._dialects.base import EventRow

# So many wait for slow receivers. A scan of the log comes upon the others.
MOST = 10_000


class Offers:
    """What a feed was offered. Not safe to share by threads: whoever calls anything here holds the feed's lock."""

    def __init__(self) -> None:
        self._waiting: list[EventRow] = []
        self._in_hand: list[EventRow] = []
        self._held_back = False
        # How many were offered, and how many need no more care.
        self._accepted = self._through = 0
        #: How many of them are left to the scan.
        self.left = 0

    def add(self, rows: Sequence[EventRow], *, wanted: bool, room: bool) -> bool:
        """Take these; whether the feed has something to do now. ``wanted``: whether anybody listens; ``room``: whether
        the feed can tell more ahead of its scan.
        """
        all_through = self._through == self._accepted
        self._accepted += len(rows)
        # While others are on their way these follow them: what is through is only counted.
        if not wanted and all_through:
            self._through += len(rows)
            return False
        if room and len(self._waiting) + len(rows) <= MOST:
            self._waiting += rows
        else:
            self.left += len(rows)
        return True

    @property
    def ready(self) -> bool:
        """Whether there are some to deliver."""
        return bool(self._waiting) and not self._held_back

    def take(self) -> list[EventRow]:
        """All of them, to be delivered now."""
        self._in_hand, self._waiting, self._held_back = self._waiting, [], False
        return self._in_hand

    def hold_back(self) -> None:
        """Keep what was taken until something else happens: it cannot be delivered now."""
        self.put_back()
        self._held_back = True

    def put_back(self) -> None:
        """Keep what was taken for another thread."""
        self._waiting[:0] = self._in_hand
        self._in_hand = []

    def through(self, count: int) -> None:
        """So many need no more care."""
        self._through += count

    def settle(self, count: int) -> int:
        """So many of those that were left to the scan were told; how many."""
        self.left -= count
        return count

    @property
    def accepted(self) -> int:
        """How many were ever offered."""
        return self._accepted

    def delivered(self, upto: int) -> bool:
        """Whether the first ``upto`` of all that were ever offered need no more care."""
        return self._through >= upto
