"""What a forked child forgets: threads do not come along, locks they held stay locked, connections are the parent's."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

import sqlalchemy as sa

from jobkit.errors import ConfigurationError


class Forgetful(Protocol):
    """Has threads or counts that a forked child does not have."""

    @property
    def engine(self) -> sa.Engine: ...

    def _after_fork(self) -> None:
        """Be as if never started. Called in the child, where no other thread runs."""


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


_known: WeakSet[Forgetful] = WeakSet()


def forget_in_children(thing: Forgetful) -> None:
    """From now on each forked child disposes of the pool of ``thing.engine``, closing nothing, and lets it forget."""
    _known.add(thing)


def _after_in_child() -> None:
    for thing in list(_known):
        # The connections in it are the parent's: used by two processes, each would read the other's answers.
        thing.engine.dispose(close=False)
        thing._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
