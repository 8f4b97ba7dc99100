"""A job that may be what kills workers runs alone, and no other job fails for it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, Runner
from jobkit.base.clock import utcnow
from jobkit.db.dialects.base import SUSPECT_AFTER
from jobkit.jobs import claims
from jobkit.jobs.fairness import RoundRobin
from jobkit.tables import content_jobs
from tests.support.databases import Database
from tests.support.invariants import violations
from tests.support.runners import Gate, only, seen, statuses, until
from tests.support.sent import hearing

Create = Callable[..., jobkit.Job]
c = content_jobs.c


def take(engine: sa.Engine, rotation: RoundRobin, limit: int, *, alone: bool) -> list[claims.Claim]:
    with engine.begin() as connection:
        return claims.claim(
            connection, limit=limit, worker_id="w", lease=60.0, now=utcnow(),
            pick=lambda c, terms: rotation.claim(c, terms, check_scheduled=True, alone=alone),
        )[0]  # fmt: skip


def lose(engine: sa.Engine, times: int = SUSPECT_AFTER) -> None:
    """Claim whatever there is and lose it, so often."""
    for _ in range(times):
        with engine.begin() as connection:
            claims.claim(connection, limit=100, worker_id="lost", lease=60.0, now=utcnow())
            connection.execute(sa.update(content_jobs).values(lease_until=datetime(2020, 1, 1, tzinfo=UTC)))
            claims.rescue(connection, limit=100, now=utcnow())


def test_a_suspect_waits_for_an_idle_runner_and_then_has_it_for_itself(engine: sa.Engine, create: Create) -> None:
    suspect = create()
    lose(engine)
    others = [create() for _ in range(3)]
    rotation = RoundRobin(engine)
    assert {claim.job_id for claim in take(engine, rotation, 2, alone=False)} <= {job.id for job in others}
    assert not rotation.draining
    [alone] = take(engine, rotation, 2, alone=True)
    assert alone.job_id == suspect.id
    assert rotation.isolated is alone


def test_a_runner_that_is_always_busy_drains_for_a_suspect_once_the_others_had_their_turn(
    engine: sa.Engine, create: Create
) -> None:
    first, second = create(), create()
    lose(engine)
    for _ in range(9):
        create()
    rotation = RoundRobin(engine, patience=60.0)
    assert len(take(engine, rotation, 1, alone=False)) == 1
    rotation._drain_at = 0.0  # a while later
    assert take(engine, rotation, 3, alone=False) == []
    assert rotation.draining
    rotation._draining_until = 0.0  # what was running has ended
    assert [claim.job_id for claim in take(engine, rotation, 3, alone=True)] == [first.id]
    found = [claim.job_id for claim in take(engine, rotation, 3, alone=True)]  # the others' turn
    assert len(found) == 3
    assert second.id not in found


def test_a_suspect_is_in_its_place_in_the_queue(engine: sa.Engine, create: Create) -> None:
    late, first, second = create(priority=-1), create(), create()
    lose(engine)
    rotation = RoundRobin(engine)
    order = [claim.job_id for _ in range(3) for claim in take(engine, rotation, 9, alone=True)]
    assert order == [first.id, second.id, late.id]


def test_a_runner_renders_nothing_beside_a_suspect(engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    suspect = create()
    lose(engine)
    create()
    gate = Gate()
    with Runner(engine, disk, only(gate), concurrency=4, poll_interval=0.05) as runner:
        gate.entered()
        assert gate.jobs == [suspect.id]
        runner.dispatch(create())
        looked = threading.Event()
        with hearing(engine, lambda *_: looked.set()):
            assert looked.wait(60)  # a pass of the keeper or the rescuer later
        assert statuses(engine) == ["running", "queued", "queued"]
        gate.open()
        until(lambda: statuses(engine) == ["done"] * 3)


@pytest.mark.parametrize("concurrency", [4, 2])
def test_a_poison_job_fails_in_six_deaths_and_the_jobs_beside_it_do_not(
    concurrency: int, database: Database, tmp_path: Path, create: Create
) -> None:
    poison = create("poison")
    innocent = [create() for _ in range(4)]
    arguments = [sys.executable, "-m", "tests.support.poisoned", database.url, str(tmp_path / "assets"), "1.0"]
    deaths = 0

    def ended() -> bool:
        return {*statuses(database.engine)} <= {"done", "failed"}

    while not ended():
        with subprocess.Popen(
            [*arguments, str(concurrency)], stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]
        ) as worker:
            try:
                until(lambda: ended() or worker.poll() is not None)
                deaths += worker.poll() is not None
            finally:
                worker.kill()
    assert deaths <= claims.MAX_RESCUES + 1
    failed = seen(database.engine, poison)
    assert (failed.status, failed.rescues) == ("failed", claims.MAX_RESCUES + 1)
    assert [seen(database.engine, job).status for job in innocent] == ["done"] * 4
    assert violations(database.engine, tmp_path / "assets") == []
