"""A prune among a million jobs that are over: how long it takes, how long others wait for it, how much memory it needs.

``python -m tests.benchmarks.many_jobs [URL] [--jobs N]``; the database at URL must be empty (default: SQLite).
"""

from __future__ import annotations

import argparse
import functools
from datetime import timedelta

import jobkit
from tests.benchmarks.databases import beside_a_neighbour, database
from tests.benchmarks.filling import record
from tests.benchmarks.measuring import memory

DAY = timedelta(days=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    options = parser.parse_args()
    with database(options.url) as (engine, folder):
        record(engine, options.jobs)
        store = jobkit.AssetStore(folder / "assets", engine=engine)
        jobkit.prune(engine, older_than=DAY * 1000)  # what is imported and connected late counts as idle
        idle = memory("VmRSS")
        for name, age, act in (
            ("nothing is old", DAY * 1000, False),
            ("dry run", DAY * 30, True),
            ("half of them", DAY * 30, False),
            ("the other half", timedelta(0), False),
        ):
            prune = functools.partial(jobkit.prune, engine, older_than=age, assets=store, dry_run=act)
            beside_a_neighbour(engine, idle, prune, functools.partial(tell, name))


def tell(name: str, report: jobkit.PruneReport, took: float) -> str:
    return f"{name}: {report.jobs} of the jobs in {took:.1f} s"


if __name__ == "__main__":
    main()
