"""A process that migrates: ``python -m tests.support.migrating URL [die]``.

It waits for a line on its input, so that several can be let go at once, and prints how many changes it made. With
``die`` it forks a process for every such change, and one for the commit, which dies by SIGKILL just before it; then it
prints how many died.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys

import sqlalchemy as sa

import jobkit

CHANGES = ("CREATE", "ALTER", "DROP", "INSERT", "UPDATE", "DELETE")


def upgrade(url: str, last: int = 0) -> int:
    """Upgrade; die before change number ``last``, or by SIGTERM before the commit if there are not so many."""
    engine = sa.create_engine(url)
    made = 0

    @sa.event.listens_for(engine, "before_cursor_execute")
    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        nonlocal made
        made += statement.lstrip().upper().startswith(CHANGES)
        if last and made == last:
            os.kill(os.getpid(), signal.SIGKILL)

    @sa.event.listens_for(engine, "commit")
    def commit(_connection: object) -> None:
        if last:
            os.kill(os.getpid(), signal.SIGTERM)

    jobkit.migrations.upgrade(engine)
    return made


def die_everywhere(url: str) -> int:
    upgrade("sqlite://")  # so that everything is imported before the forks
    sa.create_engine(url)
    for point in itertools.count(1):
        process = os.fork()
        if not process:
            upgrade(url, point)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM:
            return point
        assert os.WIFSIGNALED(status), "it did not die"
    raise AssertionError


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(die_everywhere(sys.argv[1]) if sys.argv[2:] == ["die"] else upgrade(sys.argv[1]))
