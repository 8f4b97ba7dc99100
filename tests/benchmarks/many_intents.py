"""A sweep among a million records: how long it takes, how long others wait for it, how much memory it needs.

``python -m tests.benchmarks.many_intents [URL] [--records N]``; the database at URL must be empty (default: SQLite).
"""

from __future__ import annotations

import argparse
import functools
from datetime import timedelta

import sqlalchemy as sa

import jobkit
from jobkit.base.ids import new_id
from jobkit.db.dialects import statements_for
from tests.benchmarks.databases import beside_a_neighbour, database
from tests.benchmarks.measuring import memory


def record(engine: sa.Engine, count: int) -> None:
    for start in range(0, count, 10_000):
        with engine.begin() as connection:
            rows = [
                {"id": new_id().hex, "company": "bench", "provider": "local_disk", "key": f"bench/x/{number}.bin"}
                for number in range(start, start + 10_000)
            ]
            statements_for(connection).record_intents(connection, rows, grace=24 * 3600.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?")
    parser.add_argument("--records", type=int, default=1_000_000)
    options = parser.parse_args()
    with database(options.url) as (engine, folder):
        record(engine, options.records)
        assets = jobkit.AssetStore(folder / "assets", engine=engine)
        idle = memory("VmRSS")
        for name, dry_run in (("dry run", True), ("first visit", False), ("second visit", False)):
            sweep = functools.partial(assets.collect_garbage, older_than=timedelta(0), dry_run=dry_run)
            beside_a_neighbour(engine, idle, sweep, functools.partial(tell, name))


def tell(name: str, report: jobkit.GarbageReport, took: float) -> str:
    went = report.abandoned + report.settled
    return f"{name}: {went} keys in {took:.1f} s, {took / went * 1e6:.0f} µs each"


if __name__ == "__main__":
    main()
