"""A writer that is never idle: ``python busy.py PATH`` commits small transactions until its standard input ends."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import sqlalchemy as sa

import jobkit


def write(path: str, stopped: Callable[[], bool], started: Callable[[], None]) -> None:
    """Commit one job after the other until ``stopped()``; call ``started`` after the first."""
    engine = sa.create_engine(f"sqlite:///{path}")
    jobkit.configure_sqlite(engine, synchronous="NORMAL", busy_timeout=60)
    first = True
    while first or not stopped():
        with engine.begin() as connection:
            jobkit.JobStore(connection).create("busy", job_type="note")
        if first:
            started()
        first = False
    engine.dispose()


def main() -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    write(sys.argv[1], ended.is_set, lambda: print("writing", flush=True))


if __name__ == "__main__":
    main()
