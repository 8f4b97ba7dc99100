"""Resets objects in forked children, which have no threads of their parent, its locked locks and its connections."""

from __future__ import annotations

import logging
import os
import threading
from typing import Protocol
from weakref import WeakSet

logger = logging.getLogger("jobkit")


class ForkAware(Protocol):
    """An object with threads, locks, files or counts that a forked child must not use."""

    def _after_fork(self) -> None:
        """Become as new. Called in the child, where no other thread runs."""


_fork_aware: WeakSet[ForkAware] = WeakSet()


def reset_in_children(target: ForkAware) -> None:
    """Call ``target._after_fork()`` in each child forked from now on, as long as ``target`` lives."""
    _fork_aware.add(target)


def hold_during_fork(lock: threading.Lock | threading.RLock) -> None:
    """Hold ``lock`` during every fork, so that no child inherits it locked by another thread."""
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def _after_in_child() -> None:
    for target in list(_fork_aware):
        try:
            target._after_fork()
        except Exception:  # such as a host's listener on its engine; the other objects are reset all the same
            logger.exception("%r could not be reset after a fork", target)


os.register_at_fork(after_in_child=_after_in_child)
