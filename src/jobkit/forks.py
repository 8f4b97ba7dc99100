"""What a forked child forgets: threads do not come along, locks they held stay locked, connections are the parent's."""

from __future__ import annotations

import logging
import os
import threading
from typing import Protocol
from weakref import WeakSet

import sqlalchemy as sa

from jobkit.errors import ConfigurationError

logger = logging.getLogger("jobkit")


class Forgetful(Protocol):
    """Has threads, locks, files or counts that a forked child does not have."""

    def _after_fork(self) -> None:
        """Be as if new. Called in the child, where no other thread runs."""


_known: WeakSet[Forgetful] = WeakSet()


def forget_in_children(thing: Forgetful) -> None:
    """From now on let ``thing`` forget in each forked child, as long as somebody holds it."""
    _known.add(thing)


def leave_connections(engine: sa.Engine) -> None:
    """Use none of the connections in ``engine``'s pool, and close none: called in a child, for an engine that threads
    of the parent use.
    """
    # The connections in it are the parent's: used by two processes, each would read the other's answers.
    engine.dispose(close=False)


def hold_across(lock: threading.Lock | threading.RLock) -> None:
    """Fork only while no other thread holds ``lock``, so that no child inherits it locked."""
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


def refuse_inherited(engine: sa.Engine, used: bool) -> None:
    """``ConfigurationError`` in a child whose parent ``used`` this SQLite database on other threads when it forked.

    What the parent's connections had locked at that moment stays locked in the child's memory: see "Carrying an open
    database connection across a fork()" in SQLite's How To Corrupt An SQLite Database File.
    """
    if used and engine.dialect.name == "sqlite":
        raise ConfigurationError(
            "this process was forked while its parent's runner or relay used the same SQLite database, which SQLite "
            "forbids: fork first and call start() in each process, or spawn instead of forking"
        )


def _after_in_child() -> None:
    for thing in list(_known):
        try:
            thing._after_fork()
        except Exception:  # a hook of the host's on its engine, for one; the others forget nevertheless
            logger.exception("%r could not forget its parent", thing)


os.register_at_fork(after_in_child=_after_in_child)
