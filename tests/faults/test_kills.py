"""A worker is killed at every step, by a real SIGKILL. What it leaves, and that the checks would see a bug there."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit.base.clock import utcnow
from jobkit.db.dialects.postgresql import jobs as postgresql
from jobkit.db.dialects.sql import Sql
from jobkit.db.dialects.sqlite import jobs as sqlite
from jobkit.jobs import claims
from jobkit.tables import asset_intents, content_jobs
from tests.support import doomed
from tests.support.databases import Database
from tests.support.invariants import spooled, violations

WHOLE = {"-first.txt": doomed.FIRST, "-second.txt": doomed.SECOND}
Create = Callable[..., jobkit.Job]


def kill_at(step: str, database: Database, folder: Path, bug: str | None = None) -> None:
    """Run a worker that dies at ``step``; fail unless it did."""
    url = database.engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "tests.support.doomed", url, str(folder), step, *([bug] if bug else [])]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def state(database: Database, folder: Path, job: jobkit.Job) -> dict[str, Any]:
    with database.engine.connect() as connection:
        row = connection.execute(sa.select(content_jobs).where(content_jobs.c.id == job.id)).one()
        intents = connection.execute(sa.select(sa.func.count()).select_from(asset_intents)).scalar_one()
    objects = [p for p in folder.rglob("*.txt") if p.is_file()]
    return {
        "status": row.status,
        "attempt": row.attempt,
        "events": row.event_seq,
        "intents": intents,
        "objects": len(objects),
    }


LEFT = {
    "in_claim": {"status": "queued", "attempt": 0, "events": 1, "intents": 0, "objects": 0},
    "after_claim": {"status": "running", "attempt": 1, "events": 2, "intents": 0, "objects": 0},
    "in_render": {"status": "running", "attempt": 1, "events": 2, "intents": 0, "objects": 0},
    "after_intents": {"status": "running", "attempt": 1, "events": 2, "intents": 2, "objects": 0},
    "after_object": {"status": "running", "attempt": 1, "events": 2, "intents": 2, "objects": 1},
    "after_objects": {"status": "running", "attempt": 1, "events": 2, "intents": 2, "objects": 2},
    "in_finish": {"status": "running", "attempt": 1, "events": 2, "intents": 2, "objects": 2},
    "after_commit": {"status": "done", "attempt": 1, "events": 3, "intents": 0, "objects": 2},
}


@pytest.mark.parametrize("step", doomed.STEPS)
def test_a_killed_worker_leaves_only_what_the_step_before_committed(
    step: str, database: Database, tmp_path: Path, create: Create
) -> None:
    job, folder = create("pair"), tmp_path / "assets"
    kill_at(step, database, folder)
    # A claim alone is one statement on PostgreSQL, and committed with it.
    last = "after_claim" if step == "in_claim" and database.engine.dialect.name == "postgresql" else step
    assert state(database, folder, job) == LEFT[last]
    assert violations(database.engine, folder, WHOLE) == []
    others_work_on(database, folder, create())
    assert violations(database.engine, folder) == []


def others_work_on(database: Database, folder: Path, job: jobkit.Job) -> None:
    renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"x"))
    jobkit.Runner(database.engine, jobkit.AssetStore(folder), renderers).run_until_idle(timeout=60)
    with database.engine.connect() as connection:
        found = jobkit.JobStore(connection).get_by_id(job.id)
    assert found is not None
    assert found.status == "done"


def test_a_kill_in_the_renderer_leaves_spool_files_outside_any_key(
    database: Database, tmp_path: Path, create: Create
) -> None:
    create("pair")
    kill_at("in_render", database, tmp_path / "assets")
    assert len(spooled(tmp_path / "assets")) == 2


@pytest.mark.parametrize(
    ("bug", "step", "complaint"),
    [
        ("no_intents", "after_object", "neither a row nor an intent"),
        ("rows_before_the_finish", "in_finish", "I5"),
        ("done_without_event", "after_commit", "I8"),
        ("fence_not_raised", "after_claim", "I3"),
        ("written_in_place", "after_object", "is not whole"),
    ],
)
def test_the_checks_see_a_planted_bug(
    bug: str, step: str, complaint: str, database: Database, tmp_path: Path, create: Create
) -> None:
    create("pair")
    kill_at(step, database, tmp_path / "assets", bug)
    assert complaint in "; ".join(violations(database.engine, tmp_path / "assets", WHOLE))


# --- a worker that wakes up late


def claim_one(engine: sa.Engine, worker: str) -> claims.Claim:
    with engine.begin() as connection:
        taken, events = claims.claim(connection, limit=1, worker_id=worker, lease=60.0, now=utcnow())
    assert [event.type for event in events] == ["content_job.running"]
    return taken[0]


def end(engine: sa.Engine, claim: claims.Claim, error: str) -> int:
    with engine.begin() as connection:
        return len(claims.finish(connection, [claims.failed(claim, error)], now=utcnow()).events)


def put_back(engine: sa.Engine, job: jobkit.Job) -> None:
    with engine.begin() as connection:
        jobkit.JobStore(connection).transition(job.id, expect="running", status="queued")


def zombie_wins(engine: sa.Engine, job: jobkit.Job) -> bool:
    """Two claims in a row, the first one's worker comes back while the second runs: whether it can end the job."""
    first = claim_one(engine, "first")
    put_back(engine, job)
    second = claim_one(engine, "second")
    assert (first.fence, second.fence) == (1, 2)
    return end(engine, first, "from the past") > 0


def test_a_worker_that_lost_its_claim_changes_nothing(engine: sa.Engine, create: Create, tmp_path: Path) -> None:
    assert not zombie_wins(engine, create())
    assert violations(engine, tmp_path / "assets") == []


def test_a_finish_without_the_fence_is_seen(engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    module, condition = {
        "sqlite": (sqlite, "\n    AND fence = json_extract(f.value, '$.fence')"),
        "postgresql": (postgresql, " AND j.fence = f.fence"),
    }[engine.dialect.name]
    right = module.FINISH
    assert condition in right._template
    monkeypatch.setattr(module, "FINISH", Sql(right._template.replace(condition, ""), *right._columns, **right._types))
    assert zombie_wins(engine, create())


def test_a_released_claim_is_not_charged_and_cannot_finish(engine: sa.Engine, create: Create, tmp_path: Path) -> None:
    job = create()
    claim = claim_one(engine, "first")
    with engine.begin() as connection:
        assert len(claims.release(connection, [claim], now=utcnow())) == 1
        assert claims.release(connection, [claim], now=utcnow()) == []
    assert end(engine, claim, "late") == 0
    with engine.connect() as connection:
        now = jobkit.JobStore(connection).get_by_id(job.id)
    assert now is not None
    assert (now.status, now.attempt, now.fence, now.lease_until, now.worker_id) == ("queued", 0, 1, None, None)
    assert violations(engine, tmp_path / "assets") == []


def test_a_lease_is_counted_on_the_clock_of_the_database(engine: sa.Engine, create: Create) -> None:
    create()
    long_ago = utcnow() - timedelta(days=365)
    with engine.begin() as connection:
        claims.claim(connection, limit=1, worker_id="w", lease=60.0, now=long_ago)
        lease = connection.execute(sa.select(content_jobs.c.lease_until)).scalar_one()
    assert timedelta(seconds=30) < lease - utcnow() < timedelta(seconds=90)
