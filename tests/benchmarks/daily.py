"""jobkit's own figures in a minute or two, for daily use: what a change made faster or slower.

    python -m tests.benchmarks.daily [--rounds N] [URL ...]

Each database in turn, then again: by default an SQLite file and a PostgreSQL server of its own that flushes to disk as
initdb leaves it. Medians over the rounds. On a machine that others use, the CPU time says more than the rate.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobRequest, JobStore, Renderers, Runner
from tests.benchmarks.databases import database
from tests.support.postgres import DURABLE, start_server

JOBS, ALONE, BULK, WAITS = 1_500, 300, 5_000, 40
DEADLINE = 120.0
Figures = dict[str, float]


@contextmanager
def measured(name: str, count: int, figures: Figures) -> Iterator[None]:
    """Its rate a second, and the microseconds of CPU of this process, for each of ``count``."""
    begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    yield
    ended, now = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    figures[f"{name}, a second"] = count / (ended - begun)
    figures[f"{name}, CPU µs"] = (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / count * 1e6
    figures[f"{name}, waits"] = (now.ru_nvcsw - used.ru_nvcsw) / count


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {DEADLINE:.0f} s")
        time.sleep(0.01)


def creating(engine: sa.Engine, figures: Figures) -> None:
    with measured("create in the host's transaction", ALONE, figures):
        for number in range(ALONE):
            with Session(engine) as session, session.begin():
                JobStore(session).create("bench", job_type="note", input={"n": number})
    with measured("create_many", BULK, figures), Session(engine) as session, session.begin():
        JobStore(session).create_many("bench", [JobRequest("later", {"n": n}) for n in range(BULK)])
    with engine.begin() as connection:
        connection.execute(sa.delete(jobkit.tables.content_jobs))


def content(engine: sa.Engine, folder: Path, figures: Figures) -> None:
    """Whole content jobs with a file of 1 KiB: queued before, then each alone."""
    renderers, heard = Renderers(), threading.Event()

    @renderers.register("note")
    def note(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        heard.set()
        return jobkit.Rendered("note.txt", "text/plain", b"x" * 1024)

    def create(count: int) -> None:
        with Session(engine) as session, session.begin():
            JobStore(session).create_many("bench", [JobRequest("note", {"n": n}) for n in range(count)])

    commits = 0

    def count(_: Any) -> None:
        nonlocal commits
        commits += 1

    create(JOBS)
    sa.event.listen(engine, "commit", count)
    with Runner(engine, jobkit.AssetStore(folder, engine=engine), renderers) as runner:
        with measured("content job", JOBS, figures):
            until(lambda: runner.metrics().ended == JOBS)
        figures["content job, commits"] = commits / JOBS
        waits = []
        for number in range(WAITS):
            time.sleep(0.05)
            heard.clear()
            create(1)
            begun = time.perf_counter()
            heard.wait(DEADLINE)
            waits.append((time.perf_counter() - begun) * 1000)
            until(lambda number=number: runner.metrics().ended == JOBS + number + 1)  # type: ignore[misc]
        figures["picked up after, ms"] = statistics.median(waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="*", metavar="URL", help="databases in which databases may be created, or none")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds: dict[str, list[Figures]] = {}
    with ExitStack() as stack:
        server = start_server(settings=DURABLE)
        stack.callback(server.stop)
        for _ in range(options.rounds):
            for url in options.urls or [None, server.create_database()]:
                figures: Figures = {}
                with database(url) as (engine, folder):
                    creating(engine, figures)
                    content(engine, folder / "assets", figures)
                    rounds.setdefault(engine.dialect.name, []).append(figures)
    for name, each in rounds.items():
        print(f"\n{name}, {len(each)} rounds, {os.cpu_count()} processors")
        for figure in each[0]:
            values = sorted(one[figure] for one in each)
            print(f"  {figure:<42} {statistics.median(values):10.2f}   ({values[0]:.2f} to {values[-1]:.2f})")


if __name__ == "__main__":
    main()
