"""A host's transaction that keeps the row of one job holds up that job alone. SQLite locks no rows: a host that writes
holds up every writer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, JobRequest, JobStore, Runner
from jobkit.tables import content_jobs
from tests.support.databases import Database
from tests.support.invariants import violations
from tests.support.runners import Gate, note, only, seen, statuses, until

c = content_jobs.c
LEASE = 1.5


@pytest.fixture
def engine(postgres_database: Database) -> sa.Engine:
    return postgres_database.engine


def created(engine: sa.Engine, count: int, company: str = "acme") -> list[jobkit.Job]:
    with engine.begin() as connection:
        return JobStore(connection).create_many(company, [JobRequest("note")] * count)


def renewed_for(engine: sa.Engine, job: jobkit.Job, seconds: float) -> None:
    """Wait until the job's lease was prolonged by so much."""
    first = seen(engine, job).lease_until
    until(lambda: (seen(engine, job).lease_until - first).total_seconds() > seconds, "renewals")


def test_a_locked_job_holds_up_neither_renewals_nor_results_nor_claims(engine: sa.Engine, tmp_path: Path) -> None:
    gate, store = Gate(), AssetStore(tmp_path / "assets")
    locked, *others = created(engine, 4)
    with Runner(engine, store, only(gate), lease=LEASE, concurrency=6) as runner:
        gate.entered(4)
        with engine.connect() as host:
            JobStore(host).cancel(locked.id)
            renewed_for(engine, others[0], 2 * LEASE)
            gate.contexts[0].progress(0.5, "all of them report")
            for ctx in gate.contexts:
                ctx.progress(0.5)
            until(lambda: all(seen(engine, job).progress == 0.5 for job in others))
            gate.open()
            until(lambda: all(seen(engine, job).status == "done" for job in others))
            (late,) = created(engine, 1, "globex")
            runner.dispatch(late)
            until(lambda: seen(engine, late).status == "done")
            assert seen(engine, locked).status == "running"
            host.commit()
        until(lambda: seen(engine, locked).status in ("done", "cancelled"))
    assert sorted(gate.jobs) == sorted(job.id for job in (locked, *others, late))
    assert violations(engine, tmp_path / "assets") == []


@pytest.mark.parametrize("backwards", [False, True])
def test_no_order_in_which_a_host_changes_jobs_deadlocks(backwards: bool, engine: sa.Engine, tmp_path: Path) -> None:
    gate, store = Gate(), AssetStore(tmp_path / "assets")
    jobs = sorted(created(engine, 3), key=lambda job: job.id, reverse=backwards)
    with Runner(engine, store, only(gate), lease=LEASE, concurrency=3):
        gate.entered(3)
        with engine.connect() as host:
            host.exec_driver_sql("SET deadlock_timeout = '100ms'")
            for changed, job in enumerate(jobs, 1):
                host.execute(sa.update(content_jobs).where(c.id == job.id).values(source_task_id="mine"))
                for ctx in gate.contexts:  # the runner wants them all, again and again
                    ctx.progress(changed / 10)
                if changed < 3:
                    renewed_for(engine, jobs[-1], LEASE / 3)
            host.commit()
        gate.open()
        until(lambda: statuses(engine) == ["done"] * 3)
    assert len(gate.jobs) == 3


@pytest.mark.parametrize("moment", ["queued", "lost"])
def test_a_job_that_an_open_transaction_refers_to_is_run_and_rescued(
    moment: str, engine: sa.Engine, tmp_path: Path
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE orders (job_id uuid REFERENCES content_jobs (id))")
    (job,) = created(engine, 1)
    if moment == "lost":
        lost = sa.func.now() - sa.text("interval '1 hour'")
        with engine.begin() as connection:
            values = {"status": "running", "fence": 1, "attempt": 1, "lease_until": lost, "worker_id": "lost"}
            connection.execute(sa.update(content_jobs).values(values))
    with engine.connect() as host:
        host.execute(sa.text("INSERT INTO orders VALUES (:id)"), {"id": job.id})
        with Runner(engine, AssetStore(tmp_path / "assets"), only(note)):
            until(lambda: seen(engine, job).status == "done")
        host.commit()


Lock = Callable[[sa.Connection, jobkit.Job], object]
LOCKS: dict[str, Lock] = {
    "cancel": lambda host, job: JobStore(host).cancel(job.id),
    "for update": lambda host, job: host.execute(sa.select(content_jobs).where(c.id == job.id).with_for_update()),
    "for share": lambda host, job: host.execute(
        sa.select(content_jobs).where(c.id == job.id).with_for_update(read=True)
    ),
}


@pytest.mark.parametrize("lock", LOCKS)
def test_stop_returns_while_a_row_is_locked(lock: str, engine: sa.Engine, tmp_path: Path) -> None:
    gate = Gate()
    locked, other = created(engine, 2)
    runner = Runner(engine, AssetStore(tmp_path / "assets"), only(gate), concurrency=2).start()
    gate.entered(2)
    with engine.connect() as host:
        LOCKS[lock](host, locked)
        runner.stop(0)
        assert seen(engine, other).status == "queued"
        assert seen(engine, locked).status == "running"
        host.rollback()
    gate.open()
