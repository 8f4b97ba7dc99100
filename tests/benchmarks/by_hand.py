"""jobkit beside code that is written by hand and does the same durable work, as ratios of rate and CPU.

    python -m tests.benchmarks.by_hand [--jobs N] [--rounds N] [sqlite] [postgresql]
    python -m tests.benchmarks.by_hand --only create

Whole jobs, drained from a queue that jobkit filled: by a started ``Runner`` as it is by default, and by a loop in one
thread that works on the same tables, twenty jobs at a time (``workers/``). Then creating jobs. Each run has a process
and a database of its own; the competitors take turns, and afterwards must have left the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

from tests.benchmarks.databases import DATABASES, add_databases, fresh, server_for, settle
from tests.benchmarks.filling import queue
from tests.benchmarks.measuring import Figures, alternate, compare
from tests.benchmarks.workers import process, verdict
from tests.benchmarks.workers.creating import WARM
from tests.support.postgres import DURABLE, Server

DRAIN = {
    "sqlite": {"jobkit": "library:work", "by hand": "sqlite:work"},
    "postgresql": {"jobkit": "library:work", "by hand": "core:work"},
}
CREATE = {
    "jobkit": "creating:with_jobkit",
    "by hand": "creating:by_hand",
    "by hand, no Session": "creating:by_hand_without_session",
}
CREATE_MANY = {"jobkit": "creating:many_with_jobkit", "COPY": "creating:many_by_copy"}


def drain(server: Server | None, kind: str, jobs: int) -> Figures:
    """What a worker of this kind told of draining so many jobs."""
    with fresh(server) as (engine, folder):
        queue(engine, jobs)
        settle(engine)
        told = process.run(kind, engine, folder / "assets", jobs)
        agree(kind, verdict.undone(engine, folder / "assets", jobs))
    return told.costs


def create(server: Server | None, kind: str, jobs: int) -> Figures:
    """What a process told of creating so many jobs."""
    with fresh(server) as (engine, folder):
        settle(engine)
        told = process.run(kind, engine, folder, jobs)
        agree(kind, verdict.uncreated(engine, jobs + WARM))
    return told.costs


def agree(kind: str, problems: list[str]) -> None:
    if problems:
        raise SystemExit(f"{kind} has left something else: {'; '.join(problems[:5])}")


def compete(title: str, kinds: dict[str, str], rounds: int, act: Callable[[str], Figures]) -> None:
    """Let the competitors take turns; print what came of it."""
    figures = alternate({name: partial(act, kind) for name, kind in kinds.items()}, rounds)
    print(f"\n{title}, {rounds} rounds, {os.cpu_count()} processors")
    compare(figures, [("jobkit", name) for name in kinds if name != "jobkit"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_databases(parser)
    parser.add_argument("--jobs", type=int, default=3_000)
    parser.add_argument("--many", type=int, default=10_000, help="how many jobs create_many creates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("drain", "create"))
    options = parser.parse_args()
    for name in options.databases or DATABASES:
        with server_for(name, DURABLE) as server:
            if options.only != "create":
                title = f"{name}: {options.jobs} jobs with a file of 1 KiB"
                compete(title, DRAIN[name], options.rounds, partial(drain, server, jobs=options.jobs))
            if options.only != "drain":
                title = f"{name}: {options.jobs} jobs created, each in the host's transaction"
                compete(title, CREATE, options.rounds, partial(create, server, jobs=options.jobs))
            if options.only != "drain" and server is not None:
                title = f"{name}: {options.many} jobs created together"
                compete(title, CREATE_MANY, options.rounds, partial(create, server, jobs=options.many))


if __name__ == "__main__":
    main()
