"""jobkit's own figures in a minute or two, for daily use: what a change made faster or slower.

    python -m tests.benchmarks.daily [--rounds N] [URL ...]

Each database in turn, then again: by default an SQLite file and a PostgreSQL server of its own that flushes to disk as
initdb leaves it. Medians over the rounds. On a machine that others use, the CPU time says more than the rate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobRequest, JobStore, Renderers, Runner
from tests.benchmarks.databases import database
from tests.benchmarks.filling import queue
from tests.benchmarks.measuring import DEADLINE, Figures, measured, tell, until
from tests.support.postgres import DURABLE, start_server

JOBS, ALONE, BULK, WAITS = 1_500, 300, 5_000, 40


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

    commits = 0

    def count(_: Any) -> None:
        nonlocal commits
        commits += 1

    queue(engine, JOBS)
    sa.event.listen(engine, "commit", count)
    with Runner(engine, jobkit.AssetStore(folder, engine=engine), renderers) as runner:
        with measured("content job", JOBS, figures):
            until(lambda: runner.metrics().ended == JOBS)
        figures["content job, commits"] = commits / JOBS
        waits = []
        for number in range(WAITS):
            time.sleep(0.05)
            heard.clear()
            queue(engine, 1)
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
            tell(figure, [one[figure] for one in each])


if __name__ == "__main__":
    main()
