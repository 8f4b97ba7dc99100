"""What a forked child forgets: threads do not come along, locks they held stay locked, connections are the parent's."""

from __future__ import annotations

import logging
import os
import threading
from typing import Protocol
from weakref import WeakSet

logger = logging.getLogger("jobkit")


class ForkAware(Protocol):
    """Has threads, locks, files or counts that a forked child does not have."""

    def _after_fork(self) -> None:
        """Be as if new. Called in the child, where no other thread runs."""


_known: WeakSet[ForkAware] = WeakSet()


def reset_in_children(thing: ForkAware) -> None:
    """From now on let ``thing`` forget in each forked child, as long as somebody holds it."""
    _known.add(thing)


def hold_during_fork(lock: threading.Lock | threading.RLock) -> None:
    """Fork only while no other thread holds ``lock``, so that no child inherits it locked."""
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def _after_in_child() -> None:
    for thing in list(_known):
        try:
            thing._after_fork()
        except Exception:  # a hook of the host's on its engine, for one; the others forget nevertheless
            logger.exception("%r could not forget its parent", thing)


os.register_at_fork(after_in_child=_after_in_child)
