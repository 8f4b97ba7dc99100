"""How much memory a worker process has at its first job done: jobkit's beside one that is written by hand with Core.

    python -m tests.benchmarks.memory [--rounds N] [--modules] [sqlite] [postgresql]

``--modules``: also what jobkit's worker has imported and the other has not, and how much each package of it takes: what
a process that has imported all that the other has grows by when it imports that package too, with what that imports.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from tests.benchmarks.databases import DATABASES, add_databases, fresh, server_for
from tests.benchmarks.filling import queue
from tests.benchmarks.measuring import Figures, tell
from tests.benchmarks.workers import process, verdict
from tests.support.postgres import Server

BY_HAND = {"sqlite": "core_sqlite:work", "postgresql": "core:work"}
MOST, MOST_OVER = 75, 8
# What takes less than this, in MiB, is only named.
LEAST = 0.1
FIELDS = ("VmHWM, MiB", "VmRSS, MiB")
WEIGH = """
import importlib, sys
from tests.benchmarks.measuring import MIB, memory
def load(names):
    for name in names.split():
        importlib.import_module(name)
load(sys.argv[1])
before = memory("VmRSS")
load(sys.argv[2])
print((memory("VmRSS") - before) / MIB)
"""


def first_job(server: Server | None, kind: str) -> process.AppendedEvent:
    """What a worker of this kind told after its first job."""
    with fresh(server) as (engine, folder):
        queue(engine, 1)
        told = process.run(kind, engine, folder / "assets", 1)
        if found := verdict.undone(engine, folder / "assets", 1):
            raise SystemExit(f"{kind} has left something else: {found}")
    return told


def weigh(base: Sequence[str], names: Sequence[str]) -> float:
    """MiB that a process grows by which imports ``names`` after ``base``."""
    command = [sys.executable, "-c", WEIGH, " ".join(sorted({*base} - {"__main__"})), " ".join(names)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def package(module: str) -> str:
    """What a module is listed under: its package, and of SQLAlchemy the part of it."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[0] == "sqlalchemy" else 1])


def list_modules(base: Sequence[str], ours: Sequence[str], rounds: int) -> None:
    """Print what ``ours`` has beyond ``base``, the heaviest first."""
    packages: dict[str, list[str]] = {}
    for module in sorted(set(ours) - set(base)):
        if not module.startswith("tests."):
            packages.setdefault(package(module), []).append(module)
    weights = {name: sorted(weigh(base, names) for _ in range(rounds)) for name, names in packages.items()}
    for name, values in sorted(weights.items(), key=lambda item: -item[1][rounds // 2]):
        if values[rounds // 2] >= LEAST:
            tell(f"{name} ({len(packages[name])} modules), MiB", values)
    less = [name for name, values in weights.items() if values[rounds // 2] < LEAST]
    print(f"  less than {LEAST} MiB each: {', '.join(less) or 'nothing'}")
    together = [weigh(base, [name for names in packages.values() for name in names]) for _ in range(rounds)]
    tell("all of these together, MiB", together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_databases(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modules", action="store_true")
    options = parser.parse_args()
    for name in options.databases or DATABASES:
        with server_for(name) as server:
            ours, theirs = [], []
            for _ in range(options.rounds):
                ours.append(first_job(server, "library:work"))
                theirs.append(first_job(server, BY_HAND[name]))
            print(f"\n{name}, {options.rounds} rounds")
            judge([told.memory for told in ours], [told.memory for told in theirs])
            if options.modules:
                list_modules(theirs[0].modules, ours[0].modules, options.rounds)


def judge(ours: Sequence[Figures], theirs: Sequence[Figures]) -> None:
    """Print both, and by how much jobkit's worker is larger; ``MISSED`` where that is more than wanted."""
    for field in FIELDS:
        tell(f"jobkit: {field}", [figures[field] for figures in ours], at_most=MOST)
        tell(f"Core, by hand: {field}", [figures[field] for figures in theirs])
        over = [mine[field] - other[field] for mine, other in zip(ours, theirs, strict=True)]
        tell(f"jobkit over Core: {field}", over, at_most=MOST_OVER)


if __name__ == "__main__":
    main()
