"""A handover: whether a piece of work is still its thread's, or another thread has taken that one's place."""

from __future__ import annotations

import threading


class Handover:
    """Between the thread that does a piece of work, and the one that may not want to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = self._at_work = self._left = False

    # --- on the thread that works

    def begin(self) -> bool:
        """The thread is about to work; False when the work was withdrawn."""
        with self._lock:
            self._begun = self._at_work = not self._left
            return self._at_work

    def over(self) -> bool:
        """The thread is through; whether another has taken its place."""
        with self._lock:
            self._at_work = False
            return self._left

    # --- on the other

    def withdraw(self) -> bool:
        """Let the work never begin; False when it has."""
        with self._lock:
            self._left = self._left or not self._begun
            return not self._begun

    def leave(self) -> bool:
        """Let another thread take the place of the one that is at work; False when none is."""
        with self._lock:
            self._left = self._left or self._at_work
            return self._at_work
