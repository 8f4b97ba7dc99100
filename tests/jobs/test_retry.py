"""``retry``: a job that failed or was cancelled starts anew, and what is left of its earlier run changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import InvalidTransition, JobStatus, JobStore
from jobkit.base.clock import utcnow
from jobkit.base.ids import new_id
from jobkit.jobs import claims
from jobkit.jobs.claims import Claim
from jobkit.jobs.fairness import RoundRobin
from jobkit.tables import JOB_COLUMNS, content_jobs
from tests.jobs.test_cancel import told
from tests.support.recorder import Recorder
from tests.support.runners import Gate, only, seen

Create = Callable[..., jobkit.Job]
CLEARED = (
    "error_message",
    "result_asset_id",
    "started_at",
    "finished_at",
    "run_at",
    "cancel_requested_at",
    "lease_until",
)


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_retry_makes_a_job_new_but_for_its_fence_and_events(status: str, engine: sa.Engine, create: Create) -> None:
    job = create(
        priority=3,
        idempotency_key="k",
        source_task_id="t",
        input={"a": 1},
        run_at=datetime.fromisoformat("2020-01-01T00:00Z"),
    )
    with engine.begin() as connection:
        take_due(connection)
        store = JobStore(connection)
        store.cancel(job.id)
        store.transition(job.id, status=status, error_message="no", result_asset_id=new_id(), finished_at=utcnow())
        connection.execute(content_jobs.update().values(rescues=4, attempt=2, progress=0.5, progress_message="half"))
        again = store.retry(str(job.id), company_id="acme")
    assert [getattr(again, name) for name in CLEARED] == [None] * len(CLEARED)
    assert (again.status, again.attempt, again.rescues) == (JobStatus.QUEUED, 0, 0)
    assert (again.fence, again.event_seq) == (1, 4)
    assert (again.priority, again.idempotency_key, again.source_task_id, again.input) == (3, "k", "t", {"a": 1})
    assert again.created_at == job.created_at
    assert tuple(seen(engine, job))[4:-1] == tuple(getattr(again, c.name) for c in JOB_COLUMNS)[4:]
    assert told(engine, job) == ["queued", "running", status, "queued"]


def take_due(connection: sa.Connection) -> Claim:
    rotation = RoundRobin(connection.engine)
    pick = lambda c, terms: rotation.claim(c, terms, check_scheduled=True)  # noqa: E731
    return claims.claim(connection, limit=1, worker_id="w", lease=60.0, now=utcnow(), pick=pick)[0][0]


@pytest.mark.parametrize("status", ["queued", "running", "done"])
def test_only_what_failed_or_was_cancelled_can_be_retried(status: str, engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.begin() as connection:
        if status != "queued":
            JobStore(connection).transition(job.id, status=status)
    with engine.begin() as connection, pytest.raises(InvalidTransition, match="only a failed or cancelled job"):
        JobStore(connection).retry(job.id)


def test_a_zombie_of_the_run_before_a_retry_changes_nothing(
    engine: sa.Engine, disk: jobkit.AssetStore, create: Create, recorder: Recorder
) -> None:
    gate = Gate()
    with jobkit.Runner(engine, disk, only(gate), poll_interval=0.05):
        job = create()
        gate.entered()
        with engine.begin() as connection:  # by hand: the renderer goes on
            store = JobStore(connection)
            store.cancel(job.id)
            store.transition(job.id, status="cancelled")
            store.retry(job.id)
            assert store.transition(job.id, status="running").fence == 2
        gate.open()
        other = create()
        recorder.wait(lambda _: "done" in recorder.types(other.id))
    row = seen(engine, job)
    assert (row.status, row.fence, row.result_asset_id) == ("running", 2, None)
    assert told(engine, job) == ["queued", "running", "cancelled", "queued", "running"]
    assert [a.job_id for a in assets_of(engine)] == [other.id]


def assets_of(engine: sa.Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(jobkit.tables.assets)))
