"""Points: named places in a worker's life, at one of which it kills or freezes itself."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from jobkit.testing.chaos.workers.process import Process
from jobkit.testing.faulty import Fault, FaultPlan, faulty_filesystem

# What a transaction is for, by what it says.
_STEPS = {
    "claim": re.compile(r"SET status = 'running'"),
    "intents": re.compile(r"INSERT INTO \S*asset_intents\b"),
    "finish": re.compile(r"INSERT INTO \S*assets\b"),
}


class Points:
    """Counts how often each point is passed, and strikes at the one this life ends or stands still at."""

    def __init__(self, process: Process, *, doom: str, point: str | None, skip: int) -> None:
        self._process, self._point, self._left = process, point, skip
        self._number = signal.SIGSTOP if doom == "freeze" else signal.SIGKILL
        self._lock = threading.Lock()
        self._struck = False

    def reach(self, point: str) -> None:
        """Pass ``point``, or not."""
        if point != self._point:
            return
        with self._lock:
            self._left -= 1
            if self._left >= 0 or self._struck:
                return
            self._struck = True
            self._process.tell(struck=point, pid=os.getpid())
            os.kill(os.getpid(), self._number)

    def watch_commits(self, engine: sa.Engine) -> None:
        """Reach the points around every COMMIT of ``engine`` that belongs to a step of a job."""
        steps: WeakKeyDictionary[sa.Connection, set[str]] = WeakKeyDictionary()
        committing = threading.local()

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            steps[connection] = set()

        @sa.event.listens_for(engine, "after_cursor_execute")
        def note(connection: sa.Connection, _cursor: Any, statement: str, *_: Any) -> None:
            found = [step for step, pattern in _STEPS.items() if pattern.search(statement)]
            steps.setdefault(connection, set()).update(found)

        @sa.event.listens_for(engine, "commit")
        def before(connection: sa.Connection) -> None:
            committing.steps = sorted(steps.pop(connection, ()))
            for step in committing.steps:
                self.reach(f"{step}.before_commit")

        # SQLAlchemy has no event for afterwards; this method is what it calls, right after the event above.
        commit = engine.dialect.do_commit

        def do_commit(connection: sa.PoolProxiedConnection) -> None:
            commit(connection)
            for step in getattr(committing, "steps", ()):
                self.reach(f"{step}.after_commit")
            committing.steps = []

        engine.dialect.do_commit = do_commit  # type: ignore[assignment, method-assign]


class StoragePlan(FaultPlan):
    """Faults of the storage at the given rate, each told to the harness; and the points around every file stored."""

    def __init__(self, process: Process, points: Points, *, seed: int, rate: float) -> None:
        super().__init__()
        self._process, self._points = process, points
        self._seeded = FaultPlan.seeded(seed, rate=rate)

    def next(self, operation: str, path: str) -> Fault | None:
        if operation == "put_file":
            self._points.reach("storage.before")
        fault = self._seeded.next(operation, path)
        if fault is not None:
            self._process.tell(fault=operation)
        elif operation == "put_file":
            fault = Fault("put_file", "wait", at="after", until=lambda: self._points.reach("storage.after"))
        return fault


@contextmanager
def through(plan: FaultPlan, storage: str) -> Iterator[str]:
    """Another URL of the same storage, on which the faults of ``plan`` strike while the block runs.

    A folder is reached as fsspec reaches it, file by file, and a file is renamed when it is whole.
    """
    protocol, _, path = storage.partition("://")
    own = "chaos" if protocol == "file" else protocol
    with faulty_filesystem(plan, protocol=own, target=protocol):
        yield f"{own}://{path}"
