"""What a full database costs: draining beside a million finished jobs, and from a long queue, on PostgreSQL.

    python -m tests.benchmarks.growth [--jobs N] [--finished N] [--queued N] [--rounds N]

A started runner drains so many jobs of twenty companies: where there is nothing else, where so many have finished, with
their events and assets, and where so many wait. Each run is a process of its own, the three take turns. Rate, CPU of
the worker and of the whole server, and each as so many times what it is in the empty table.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from pathlib import Path

import sqlalchemy as sa

from jobkit.tables import content_jobs
from tests.benchmarks.databases import fresh, settle
from tests.benchmarks.filling import queue, record
from tests.benchmarks.measuring import Figures, alternate, compare
from tests.benchmarks.workers import process
from tests.support.postgres import DURABLE, Server, start_server

COMPANIES = 20


def drain(engine: sa.Engine, folder: Path, jobs: int, waiting: int) -> Figures:
    """What a worker told of doing ``jobs`` of at least as many that wait, which are made to be ``waiting``."""
    c = content_jobs.c
    with engine.connect() as connection:
        queued = connection.execute(sa.select(sa.func.count()).where(c.status == "queued")).scalar_one()
    queue(engine, max(0, waiting - queued), COMPANIES)
    settle(engine)
    told = process.run("library:work", engine, folder / "assets", jobs)
    with engine.connect() as connection:
        query = sa.select(c.status, sa.func.count()).where(c.status.not_in(["done", "queued"])).group_by(c.status)
        if others := connection.execute(query).all():
            raise SystemExit(f"jobs that are neither done nor queued: {others}")
    return told.costs


def empty(server: Server, jobs: int) -> Figures:
    with fresh(server) as (engine, folder):
        return drain(engine, folder, jobs, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=3_000)
    parser.add_argument("--finished", type=int, default=1_000_000)
    parser.add_argument("--queued", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    jobs = options.jobs
    with ExitStack() as stack:
        server = start_server(settings=DURABLE)
        stack.callback(server.stop)
        full, full_folder = stack.enter_context(fresh(server))
        record(full, options.finished, COMPANIES)
        settle(full)  # now: an autovacuum of it would count as the server's work for the others
        long, long_folder = stack.enter_context(fresh(server))
        runs = {
            "empty": lambda: empty(server, jobs),
            f"{options.finished} finished": lambda: drain(full, full_folder, jobs, jobs),
            f"{options.queued} queued": lambda: drain(long, long_folder, jobs, max(jobs, options.queued)),
        }
        rounds = alternate(runs, options.rounds)
    print(f"{jobs} jobs, {options.rounds} rounds, {os.cpu_count()} processors")
    compare(rounds, [(name, "empty") for name in runs if name != "empty"])


if __name__ == "__main__":
    main()
