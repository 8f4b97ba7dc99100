"""A sweep among a million records: how long it takes, how long others wait for it, how much memory it needs.

``python -m tests.benchmarks.many_intents [URL] [--records N]``; the database at URL must be empty (default: SQLite).
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa

import jobkit
from jobkit._dialects import statements_for
from jobkit.ids import new_id
from tests.benchmarks.large_asset import MIB, memory, reset_peak


class Neighbour:
    """Writes a job every few milliseconds, and knows how long each took."""

    def __init__(self, engine: sa.Engine) -> None:
        self.waits: list[float] = []
        self._engine, self._stopped = engine, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.005):
            start = time.perf_counter()
            with self._engine.begin() as connection:
                jobkit.JobStore(connection).create("neighbour", job_type="note")
            self.waits.append(time.perf_counter() - start)

    def __str__(self) -> str:
        ordered = sorted(self.waits)
        return (
            f"{len(ordered)} writes beside it: median {ordered[len(ordered) // 2] * 1000:.1f} ms, "
            f"p99 {ordered[len(ordered) * 99 // 100] * 1000:.1f} ms, longest {ordered[-1] * 1000:.1f} ms"
        )


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
    with tempfile.TemporaryDirectory(prefix="jobkit-bench-") as folder:
        engine = sa.create_engine(options.url or f"sqlite:///{folder}/bench.db")
        if engine.dialect.name == "sqlite":
            jobkit.configure_sqlite(engine)
        jobkit.migrations.upgrade(engine)
        record(engine, options.records)
        assets = jobkit.AssetStore(Path(folder) / "assets", engine=engine)
        idle = memory("VmRSS")
        for name, dry_run in (("dry run", True), ("first visit", False), ("second visit", False)):
            reset_peak()
            start = time.perf_counter()
            with Neighbour(engine) as neighbour:
                report = assets.collect_garbage(older_than=timedelta(0), dry_run=dry_run)
            took = time.perf_counter() - start
            over = (memory("VmHWM") - idle) / MIB
            went = report.abandoned + report.settled
            print(f"{name}: {went} keys in {took:.1f} s, {took / went * 1e6:.0f} µs each, {over:.1f} MiB over idle")
            print(f"  {neighbour}", flush=True)
        engine.dispose()


if __name__ == "__main__":
    main()
