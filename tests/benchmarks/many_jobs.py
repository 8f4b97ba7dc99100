"""A prune among a million jobs that are over: how long it takes, how long others wait for it, how much memory it needs.

``python -m tests.benchmarks.many_jobs [URL] [--jobs N]``; the database at URL must be empty (default: SQLite).
"""

from __future__ import annotations

import argparse
import functools
from datetime import timedelta

import sqlalchemy as sa

import jobkit
from jobkit.clock import utcnow
from jobkit.ids import new_id
from jobkit.tables import assets, content_job_events, content_jobs
from tests.benchmarks.databases import beside_a_neighbour, database
from tests.benchmarks.large_asset import memory

DAY = timedelta(days=1)


def record(engine: sa.Engine, count: int) -> None:
    """So many jobs that are done, with three events and one asset each; every second one ended 100 days ago."""
    now, made = utcnow(), 0
    while made < count:
        ids = [new_id() for _ in range(min(5_000, count - made))]
        ended = [now - DAY * (100 if number % 2 else 1) for number in range(len(ids))]
        owner = {"company_id": "bench"}
        jobs = [
            {**owner, "id": id, "job_type": "note", "status": "done", "input": {"text": "x" * 200}, "event_seq": 3}
            | {"started_at": at, "finished_at": at, "created_at": at, "updated_at": at}
            for id, at in zip(ids, ended, strict=True)
        ]
        events = [
            {**owner, "job_id": id, "seq": seq, "type": f"content_job.{kind}", "payload": {"jobId": str(id)}}
            for seq, kind in enumerate(("queued", "running", "done"), 1)
            for id in ids
        ]
        files = [
            {**owner, "id": new_id(), "job_id": id, "provider": "local_disk", "object_key": f"bench/x/{id}.txt"}
            | {"content_type": "text/plain", "byte_size": 1, "sha256": "0" * 64}
            for id in ids
        ]
        with engine.begin() as connection:
            connection.execute(content_jobs.insert(), jobs)
            connection.execute(content_job_events.insert(), events)
            connection.execute(assets.insert(), files)
        made += len(ids)


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
