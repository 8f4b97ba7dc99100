"""A process that follows the log and writes down what it hears: ``python subscriber.py URL FILE [CURSOR]``.

A line an event: id, job, seq, cursor. It runs until it is killed; what it wrote by then is what it knows.
"""

from __future__ import annotations

import os
import sys
import threading

import sqlalchemy as sa

import jobkit
from jobkit import signals


def main(url: str, file: str, cursor: str | None = None) -> None:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        jobkit.configure_sqlite(engine)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(_: str, *, event: jobkit.JobEvent) -> None:
        os.write(descriptor, f"{event.id} {event.job_id} {event.seq} {event.cursor}\n".encode())

    for signal in signals.SIGNALS.values():
        signal.connect(note)
    jobkit.Relay(engine, after=cursor).start()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
