"""Sweeps that are killed at every step; sweeps beside writers that die, deletes and runners: nothing is lost, and
nothing is stored that no record names.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetNotFound, AssetStore
from jobkit.assets.intents import GarbageCollector
from jobkit.db.dialects import statements_for
from jobkit.jobs import claims
from tests.support import doomed_sweep
from tests.support.databases import Database
from tests.support.files import COMPANY, intents, keep, put, rows
from tests.support.invariants import violations
from tests.support.runners import objects, until
from tests.support.sweeping import DAY, age, collect, delete

# How old a record must be before the sweeps below take it: about as long as a writer needs, so that either may win.
SHORT = 0.02
# Longer than any writer is held up between its record and its object.
QUARANTINE = 5.0


def url(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


@pytest.mark.parametrize("step", doomed_sweep.STEPS)
def test_what_a_killed_sweep_leaves_a_later_one_finishes(step: str, database: Database, tmp_path: Path) -> None:
    engine, folder = database.engine, tmp_path / "assets"
    disk = AssetStore(folder, engine=engine)
    kept, late = keep(disk, engine), [put(disk), put(disk)]
    collect(disk)
    for stored in late:
        (folder / stored.object_key).write_bytes(b"late")
    delete(disk, engine, keep(disk, engine))
    put(disk)
    age(engine, DAY)
    command = [sys.executable, "-m", "tests.support.doomed_sweep", url(database), str(folder), step]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert violations(engine, folder) == []
    disk.verify(kept)
    for _ in range(2):
        age(engine, DAY)
        collect(disk, DAY)
    assert [path.relative_to(folder).as_posix() for path in objects(folder)] == [kept.object_key]
    assert intents(engine) == {}
    disk.verify(kept)


@contextmanager
def sweeping(engines: list[sa.Engine], disk: AssetStore) -> Iterator[Counter[str]]:
    """One sweep after the other on each engine, until the block ends; how many keys went in all."""
    stopped, swept = threading.Event(), Counter[str]()
    errors: list[BaseException] = []

    def run(engine: sa.Engine) -> None:
        try:
            while not stopped.is_set():
                report = GarbageCollector(engine, disk.storage, older_than=SHORT, quarantine=QUARANTINE).run()
                swept.update(abandoned=report.abandoned, deleted=report.deleted, settled=report.settled)
                stopped.wait(0.001)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(engine,), daemon=True) for engine in engines]
    for thread in threads:
        thread.start()
    try:
        yield swept
    finally:
        stopped.set()
        for thread in threads:
            thread.join(60)
    assert errors == []


def test_sweeps_beside_writers_that_die_deletes_and_a_runner_lose_nothing_and_leave_nothing(
    database: Database, tmp_path: Path, create: Callable[..., jobkit.Job]
) -> None:
    engine, folder = database.engine, tmp_path / "assets"
    disk = AssetStore(folder, engine=engine)
    renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.bin", "a/b", str(ctx.job_id).encode()))
    command = [sys.executable, "-m", "tests.support.writers", url(database), str(folder), "24", "12", "1"]
    writers = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writers.stdout is not None
    told: Counter[str] = Counter()
    reader = threading.Thread(target=lambda: told.update(line.strip() for line in writers.stdout), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        with sweeping([database.connect(), database.connect()], disk) as swept:
            with jobkit.Runner(engine, disk, renderers, concurrency=2):
                jobs = []
                while writers.poll() is None:
                    jobs.append(create())
                    ended = jobs[-1].id
                    until(lambda: status(engine, ended) in ("done", "failed"), timeout=60)  # noqa: B023
            assert violations(engine, folder) == []
    finally:
        writers.kill()
        writers.wait(60)
        reader.join(60)
        writers.stdout.close()
    outcomes = Counter(status(engine, job.id) for job in jobs)
    assert (writers.returncode, told["failed"]) == (0, 0)
    for what in ("kept", "swept", "rolled-back", "forgotten", "deleted", "died"):
        assert told[what] >= 5, (told, swept, outcomes)
    assert swept["abandoned"] >= 20, swept
    assert violations(engine, folder) == []
    for _ in range(2):
        age(engine, DAY)
        collect(disk)
    live = rows(engine)
    for asset in live:
        disk.verify(asset)
    assert sorted(path.relative_to(folder).as_posix() for path in objects(folder)) == sorted(a.object_key for a in live)
    assert intents(engine) == {}
    assert outcomes["done"] == sum(asset.job_id is not None for asset in live)


def status(engine: sa.Engine, job_id: Any) -> str | None:
    with engine.connect() as connection:
        job = jobkit.JobStore(connection).get_by_id(job_id)
    return job and str(job.status)


# --- one at a time: who comes second waits, and is told


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("way", ["create", "finish"])
def test_a_row_for_a_key_that_a_sweep_is_just_claiming_is_refused_if_it_commits(
    way: str, commits: bool, disk: AssetStore, engine: sa.Engine, create: Callable[..., jobkit.Job]
) -> None:
    stored = put(disk)
    job = create()
    now = job.created_at + timedelta(seconds=1)
    with engine.begin() as connection:
        (claim,), _ = claims.claim(connection, limit=1, worker_id="w", lease=60, now=now)

    def give_row() -> None:
        with Session(engine) as session, session.begin():
            if way == "create":
                disk.create(session, COMPANY, stored, source_task_id=None)
            else:
                claims.finish(session.connection(), [claims.Completion(claim, files=(stored,))], now=now)

    raised: list[BaseException | None] = []

    def second() -> None:
        try:
            give_row()
        except BaseException as error:
            raised.append(error)
        else:
            raised.append(None)

    thread = threading.Thread(target=second, daemon=True)
    with engine.connect() as sweeping:
        transaction = sweeping.begin()
        taken = statements_for(engine).claim_intents(
            sweeping, [stored.object_key], provider="local_disk", state="pending", early=1e6, hold=60
        )
        assert taken == [stored.object_key]
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), raised
        transaction.commit() if commits else transaction.rollback()
    thread.join(60)
    assert len(raised) == 1
    if commits:
        assert isinstance(raised[0], AssetNotFound)
        assert (rows(engine), intents(engine)) == ([], {stored.object_key: "collected"})
    else:
        assert raised == [None]
        assert intents(engine) == {}
        disk.verify(rows(engine)[0])
