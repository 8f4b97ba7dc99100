"""Workers as processes, killed and frozen: their jobs run again elsewhere, and late results change nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import jobkit
from jobkit import AssetStore, JobEvent, Runner, signals
from jobkit.base.clock import utcnow
from tests.support.databases import Database
from tests.support.files import intents, objects
from tests.support.invariants import violations
from tests.support.runners import note, only, seen, statuses, until
from tests.support.sweeping import collect

Create = Callable[..., jobkit.Job]
LEASE = 1.0
# What forty jobs take on a machine that does nothing else, in seconds, generously.
CONTROL = 1.0


class Worker:
    """A worker process; ``said`` is what it told so far, ``ask`` sends it a line and returns the next it tells."""

    def __init__(self, database: Database, folder: Path, concurrency: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker", database.url, str(folder), str(LEASE), str(concurrency)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def working(database: Database, folder: Path, concurrency: int = 1) -> Iterator[Worker]:
    worker = Worker(database, folder, concurrency)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "assets"


def test_the_jobs_of_a_killed_worker_run_again_within_its_lease_and_two_seconds(
    database: Database, folder: Path, create: Create
) -> None:
    again: dict[object, float] = {}

    def hear(company_id: str, *, event: JobEvent) -> None:
        again.setdefault(event.job_id, time.monotonic())

    jobs = [create() for _ in range(40)]
    with working(database, folder, concurrency=40) as worker:
        begun = {worker.line()[1] for _ in jobs}
        assert begun == {str(job.id) for job in jobs}
        signals.content_job_running.connect(hear)
        store = AssetStore(folder)
        with Runner(database.engine, store, only(note), lease=LEASE, concurrency=8, poll_interval=0.05):
            worker.send(signal.SIGKILL)
            killed = time.monotonic()
            until(lambda: statuses(database.engine) == ["done"] * 40, timeout=60)
            # The same number of jobs of the same runner tell how fast this machine is just now.
            began = time.monotonic()
            others = [create() for _ in range(40)]
            until(lambda: statuses(database.engine) == ["done"] * 80, timeout=60)
    waited = sorted(again[job.id] - killed for job in jobs)
    slowness = max(1.0, (max(again[job.id] for job in others) - began) / CONTROL)
    print(f"run again after {waited[0]:.2f} to {waited[-1]:.2f} s; the machine is {slowness:.1f} times as slow")
    assert waited[-1] <= LEASE + 2 * slowness
    assert violations(database.engine, folder) == []


def test_what_a_frozen_worker_does_when_it_wakes_up_changes_nothing_and_is_counted(
    database: Database, folder: Path, create: Create
) -> None:
    job = create()
    store = AssetStore(folder)
    with working(database, folder) as worker:
        assert worker.line() == ["begun", str(job.id)]
        worker.send(signal.SIGSTOP)
        runner = Runner(database.engine, store, only(note), lease=LEASE, poll_interval=0.05)
        with runner:
            until(lambda: statuses(database.engine) == ["done"], timeout=60)
        done = seen(database.engine, job)
        assert (done.fence, done.rescues, done.attempt) == (2, 1, 1)
        worker.send(signal.SIGCONT)
        worker.tell("go")

        def rejected() -> bool:
            worker.tell("report")
            return worker.line() == ["metrics", "0", "1"]

        until(rejected, timeout=60)
    assert seen(database.engine, job) == done
    named = set(intents(database.engine))
    assert len(named) == 1, "what the zombie stored is named by its record"
    assert len(objects(folder.as_uri())) == 2
    collect(store)  # whatever was recorded counts as abandoned: no job is left
    assert set(objects(folder.as_uri())).isdisjoint(named)
    assert violations(database.engine, folder) == []


def test_a_frozen_worker_that_wakes_up_before_anyone_took_its_job_ends_it(
    database: Database, folder: Path, create: Create
) -> None:
    job = create()
    with working(database, folder) as worker:
        assert worker.line() == ["begun", str(job.id)]
        worker.send(signal.SIGSTOP)
        lease_until = seen(database.engine, job).lease_until
        until(lambda: utcnow() > lease_until, timeout=60)  # the database's clock is this machine's
        worker.send(signal.SIGCONT)
        worker.tell("go")
        until(lambda: statuses(database.engine) == ["done"], timeout=60)
    assert violations(database.engine, folder) == []
