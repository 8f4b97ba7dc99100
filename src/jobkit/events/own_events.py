"""Events that this process committed itself, on their way to its feed."""

from __future__ import annotations

from collections.abc import Sequence

from jobkit.db.dialects.base import EventRow

# Bound of the queue when receivers are slow; the scan finds the rest in the log.
MOST_WAITING = 10_000


class OwnEvents:
    """A queue without a lock: whoever calls anything here holds the feed's."""

    def __init__(self) -> None:
        self._waiting: list[EventRow] = []
        self._in_hand: list[EventRow] = []
        self._held_back = False
        self._done = 0
        #: How many were ever published.
        self.accepted = 0
        #: How many of them the scan has to find.
        self.left_to_scan = 0

    def add(self, rows: Sequence[EventRow], *, wanted: bool, room: bool) -> bool:
        """Publish these; whether the feed must act. ``wanted``: by receivers; ``room``: for more ahead of the scan."""
        all_done = self._done == self.accepted
        self.accepted += len(rows)
        # Behind others that are on their way these wait as well: events are done in the order of their number.
        if not wanted and all_done:
            self._done += len(rows)
            return False
        if room and len(self._waiting) + len(rows) <= MOST_WAITING:
            self._waiting += rows
        else:
            self.left_to_scan += len(rows)
        return True

    @property
    def ready(self) -> bool:
        """Whether there are some to deliver."""
        return bool(self._waiting) and not self._held_back

    def drain(self) -> list[EventRow]:
        """All that wait, to be delivered now."""
        self._in_hand, self._waiting, self._held_back = self._waiting, [], False
        return self._in_hand

    def hold_back(self) -> None:
        """Keep the drained events until something else happens: they cannot be delivered now."""
        self.put_back()
        self._held_back = True

    def put_back(self) -> None:
        """Keep the drained events for another thread."""
        self._waiting[:0] = self._in_hand
        self._in_hand = []

    def mark_done(self, count: int) -> None:
        """This many more were delivered, or were wanted by no receiver."""
        self._done += count

    def are_done(self, count: int) -> bool:
        """Whether the first ``count`` that were ever published are done with."""
        return self._done >= count
