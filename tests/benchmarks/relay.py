"""How soon a process hears what itself and others commit, and what it costs to listen to silence.

``python -m tests.benchmarks.relay [URL]``; the database at URL must be empty (default: an SQLite file). On PostgreSQL
what others commit is measured twice: with LISTEN, and without, as behind a pooler.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa

import jobkit
from jobkit import signals
from jobkit.events.feed import Feed
from jobkit.events.hints import Listener
from tests.benchmarks.databases import connect, database

SILENCE = 10.0


def commit_for_ever(url: str) -> None:
    """The other process: for each line with a pause, wait so long, commit one job, and say when that was."""
    engine = connect(url)
    for line in sys.stdin:
        time.sleep(float(line))
        with engine.begin() as connection:
            job = jobkit.JobStore(connection).create("other", job_type="elsewhere")
        print(job.id, time.monotonic(), flush=True)


class Ear:
    """When each event arrived."""

    def __init__(self) -> None:
        self.at: dict[tuple[UUID, int], float] = {}
        self._changed = threading.Condition()
        for name in jobkit.CONTENT_JOB_EVENTS:
            signal: Any = getattr(signals, name.replace(".", "_"))
            signal.connect(self.hear)

    def hear(self, _: str, *, event: jobkit.JobEvent) -> None:
        now = time.monotonic()
        with self._changed:
            self.at[event.job_id, event.seq] = now
            self._changed.notify_all()

    def wait(self, wanted: Sequence[tuple[UUID, int]]) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: all(key in self.at for key in wanted), 60):
                raise SystemExit("events did not arrive within a minute")


class Other:
    """The other process."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.relay", "--other", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def commit(self, pauses: Sequence[float]) -> dict[tuple[UUID, int], float]:
        """When each of the events was committed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.writelines(f"{pause}\n" for pause in pauses)
        self._process.stdin.flush()
        told = [self._process.stdout.readline().split() for _ in pauses]
        return {(UUID(job), 1): float(at) for job, at in told}

    def close(self) -> None:
        self._process.communicate(timeout=30)


def report(name: str, waits: Sequence[float], target: float) -> None:
    ordered = sorted(wait * 1000 for wait in waits)
    p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    verdict = "" if p50 <= target else "  MISSED"
    print(
        f"{name:44} p50 {p50:7.2f} ms   p99 {p99:7.2f} ms   longest {ordered[-1]:7.2f} ms   wanted {target:g}{verdict}"
    )


@contextlib.contextmanager
def open_writer(engine: sa.Engine) -> Iterator[None]:
    """An unrelated transaction that has written and is left open; on SQLite there can be none beside others."""
    if engine.dialect.name == "sqlite":
        yield
        return
    with engine.connect() as connection:
        connection.execute(sa.text("SELECT pg_current_xact_id()"))
        yield


def own(engine: sa.Engine, folder: Path, ear: Ear, count: int) -> None:
    """From the return of a runner's own commit to the receiver."""
    committed: dict[tuple[UUID, int], float] = {}
    original = Feed.publish

    def publish(self: Feed, rows: Any) -> bool:
        now = time.monotonic()
        committed.update(((row.job_id, row.seq), now) for row in rows)
        return original(self, rows)

    Feed.publish = publish  # type: ignore[method-assign]
    renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"a"))
    with jobkit.Runner(engine, jobkit.AssetStore(folder, engine=engine), renderers) as runner:
        for held in (False, True):
            committed.clear()
            with open_writer(engine) if held else contextlib.nullcontext():
                for _ in range(count):
                    job = runner.submit("acme", job_type="note")
                    ear.wait([(job.id, 3)])
            if not held or engine.dialect.name != "sqlite":
                waits = [ear.at[key] - at for key, at in committed.items()]
                report("own events, a writer left open" if held else "own events", waits, 5)
    Feed.publish = original  # type: ignore[method-assign]


def others(engine: sa.Engine, ear: Ear, count: int) -> None:
    """From the return of another process' commit to the receiver."""
    other, rng = Other(engine.url.render_as_string(hide_password=False)), random.Random(7)
    target = 30 if engine.dialect.name == "sqlite" else 20
    with jobkit.Relay(engine):
        for name, pauses in (
            ("others' events, active", [rng.uniform(0.01, 0.09) for _ in range(count)]),
            ("others' events, as fast as they come", [0.0] * count),
        ):
            committed = other.commit(pauses)
            ear.wait(list(committed))
            report(name, [ear.at[key] - at for key, at in committed.items()], target)
        waits = []
        for _ in range(10):
            committed = other.commit([3 + rng.random()])
            ear.wait(list(committed))
            waits += [ear.at[key] - at for key, at in committed.items()]
        report("the first event out of idle", waits, 60)
        time.sleep(SILENCE)
        before = time.process_time()
        time.sleep(SILENCE)
        share = (time.process_time() - before) / SILENCE * 100
        print(f"{'silence':44} {share:.2f} % of a core   wanted below 1{'' if share < 1 else '  MISSED'}")
    other.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--other", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.other:
        commit_for_ever(options.url)
        return
    with database(options.url) as (engine, folder):
        ear = Ear()
        own(engine, folder / "files", ear, options.count)
        others(engine, ear, options.count)
        if Listener.possible(engine):
            print("without LISTEN:")
            Listener.possible = staticmethod(lambda engine: False)  # type: ignore[method-assign]
            others(engine, ear, options.count)


if __name__ == "__main__":
    main()
