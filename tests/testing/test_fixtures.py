"""What ``jobkit.testing`` gives the tests of a host: assertions, a clock, a storage, and fixtures for pytest."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobStore, signals
from jobkit.testing import FrozenClock, assert_job_created, assert_no_job_created, temporary_assets
from tests.support.files import put

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


# --- assertions


def test_the_newest_job_with_all_that_is_given_is_found(engine: sa.Engine, session: Session) -> None:
    jobs = JobStore(session)
    older = jobs.create("acme", job_type="bill", input={"cups": 2, "to": {"name": "a"}}, source_task_id="t")
    newer = jobs.create("acme", job_type="bill", input={"cups": 3}, priority=5)
    other = jobs.create(7, job_type="note", run_at=NOON)
    assert assert_job_created(session) == other
    assert assert_job_created(session, job_type="bill") == newer
    assert assert_job_created(session, "acme", input={"cups": 2}) == older
    assert assert_job_created(session, input={"to": {"name": "a"}}, source_task_id="t", status="queued") == older
    assert assert_job_created(session, 7, run_at=NOON, priority=0) == other
    session.rollback()
    with pytest.raises(AssertionError, match="there are none"):
        assert_job_created(session)


@pytest.mark.parametrize(
    "given",
    [
        {"company_id": "beta"},
        {"job_type": "note"},
        {"input": {"cups": 3}},
        {"input": {"cups": 2, "more": None}},
        {"status": "done"},
        {"run_at": NOON},
        {"source_task_id": "t"},
    ],
    ids=str,
)
def test_what_was_not_created_is_an_error_that_tells_what_was(given: dict[str, Any], session: Session) -> None:
    JobStore(session).create("acme", job_type="bill", input={"cups": 2})
    with pytest.raises(AssertionError, match=r"'acme' 'bill' queued \{'cups': 2\}") as raised:
        assert_job_created(session, **given)
    assert all(f"{name}=" in str(raised.value) for name in given)
    assert_no_job_created(session, **given)
    with pytest.raises(AssertionError, match="'acme' 'bill' queued"):
        assert_no_job_created(session, "acme", job_type="bill", input={"cups": 2})
    with pytest.raises(AssertionError, match="a job with anything was created"):
        assert_no_job_created(session)


def test_an_attribute_that_no_job_has_is_a_type_error(session: Session) -> None:
    for check in (assert_job_created, assert_no_job_created):
        with pytest.raises(TypeError, match="a job has no statsu"):
            check(session, statsu="queued")


def test_a_long_list_is_cut(session: Session) -> None:
    JobStore(session).create_many("acme", [jobkit.JobRequest("note", {"text": "x" * 10_000})] * 50)
    with pytest.raises(AssertionError, match="and 30 more") as raised:
        assert_job_created(session, job_type="bill")
    assert len(str(raised.value)) < 6_000


# --- the clock


def test_a_frozen_clock_stands_still_until_it_is_moved() -> None:
    clock = FrozenClock(NOON)
    assert clock() == clock() == NOON
    assert clock.advance(1.5) == clock() == NOON + timedelta(seconds=1.5)
    assert clock.advance(timedelta(days=1)) == NOON + timedelta(days=1, seconds=1.5)
    assert clock.move_to(NOON.astimezone(timezone(timedelta(hours=2)))) == NOON
    assert clock().tzinfo is UTC
    assert repr(clock) == "FrozenClock(2026-03-01T12:00:00+00:00)"
    before = datetime.now(UTC)
    assert before <= FrozenClock()() <= datetime.now(UTC)
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="by must be"):
            clock.advance(wrong)
    with pytest.raises(ValueError, match="time zone"):
        FrozenClock(datetime(2026, 3, 1))


# --- the storage


def test_temporary_assets_are_gone_afterwards() -> None:
    with temporary_assets(max_bytes=10) as store:
        folder = store.storage.root  # type: ignore[attr-defined]
        put(store, b"content")
        with pytest.raises(jobkit.AssetTooLarge):
            put(store, b"x" * 11)
        assert list(folder.rglob("*a.txt"))
    assert not folder.exists()


# --- fixtures


def test_a_hosts_tests_get_fixtures_by_name(tmp_path: Path) -> None:
    (tmp_path / "test_host.py").write_text(
        """
import sqlalchemy as sa
import pytest
import jobkit
from jobkit.testing import drain, inline
from sqlalchemy.orm import Session

@pytest.fixture
def session():
    engine = sa.create_engine("sqlite://")
    jobkit.configure_sqlite(engine)
    jobkit.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()

def renderer(ctx):
    raise jobkit.Retry(60)

@pytest.mark.parametrize("round", [1, 2])
def test_a_job(session, jobkit_assets, jobkit_clock, jobkit_events, round):
    renderers = jobkit.Renderers()
    renderers.register("note", max_attempts=2)(renderer)
    jobkit.JobStore(session).create("acme", job_type="note")
    begun = jobkit_clock()
    [job] = drain(session, jobkit_assets, renderers, jobkit_clock)
    assert (job.status, job.attempt) == ("failed", 2)
    assert (jobkit_clock() - begun).total_seconds() == 60
    assert [event.type.split(".")[1] for event in jobkit_events] == [
        "queued", "running", "retrying", "running", "failed"]
"""
    )
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr


def test_a_test_run_that_asks_for_none_of_them_imports_neither_jobkit_nor_sqlalchemy(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n"
        "def test_it():\n"
        "    assert '_jobkit_pytest' in sys.modules\n"
        "    assert not {'jobkit', 'sqlalchemy', 'fsspec', 'blinker', 'alembic'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr


def test_the_events_fixture_leaves_no_receiver(jobkit_events: list[jobkit.JobEvent], jobkit_assets: AssetStore) -> None:
    assert signals.any_receivers()
    assert jobkit_events == []
    assert jobkit_assets.engine is None
