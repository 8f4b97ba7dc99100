"""What 10,000 running jobs cost while nothing happens to them: renewals, looks for cancels, rescues and sweeps.

    python -m tests.benchmarks.running_jobs [JOBS]

Prints the CPU time of this process and of PostgreSQL, as a part of one core, at the default lease of 60 seconds. The
server is the tests' own, and its processes are read from /proc.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable

import sqlalchemy as sa

import jobkit
from jobkit import JobRequest, JobStore
from jobkit.base.clock import utcnow
from jobkit.db.connections import DedicatedConnection
from jobkit.jobs import claims
from jobkit.maintenance.rescue import INTERVAL, rescue
from jobkit.runner.leases import look_every
from jobkit.runner.supervisor import SWEEP_INTERVAL
from tests.benchmarks.measuring import process_cpu
from tests.support.postgres import start_server

LEASE = 60.0
ROUNDS = 20


def main(count: int) -> None:
    server = start_server()
    try:
        engine = sa.create_engine(server.create_database())
        jobkit.migrations.upgrade(engine)
        with engine.begin() as connection:
            JobStore(connection).create_many("acme", [JobRequest("note") for _ in range(count)])
        with engine.begin() as connection:
            held, _ = claims.claim(connection, limit=count, worker_id="bench", lease=3600.0, now=utcnow())
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE content_jobs")
        store = jobkit.AssetStore(tempfile.mkdtemp(), engine=engine)
        link = DedicatedConnection(engine, autocommit=True)
        total = 0.0
        steps: list[tuple[str, float, Callable[[sa.Connection], object]]] = [
            ("renew", LEASE / 3, lambda connection: claims.renew(connection, held, lease=3600.0)),
            ("look", look_every(count), lambda connection: claims.check(connection, held)),
            ("rescue", INTERVAL, lambda _: rescue(link, clock=utcnow, on_commit=len)),
            ("sweep", SWEEP_INTERVAL, lambda _: store.collect_garbage(dry_run=False)),
        ]
        for name, interval, step in steps:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                backend = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
                step(connection)
                mine, theirs = time.process_time(), process_cpu(backend)
                for _ in range(ROUNDS):
                    step(connection)
                mine, theirs = time.process_time() - mine, process_cpu(backend) - theirs
            share = (mine + theirs) / ROUNDS / interval
            total += share
            print(
                f"{name:<7} every {interval:6.0f} s: {mine / ROUNDS * 1e3:7.2f} ms here, "
                f"{theirs / ROUNDS * 1e3:7.2f} ms on the server, {share:.3%} of a core"
            )
        print(f"{count} running jobs: {total:.3%} of a core")
        link.close()
        engine.dispose()
    finally:
        server.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
