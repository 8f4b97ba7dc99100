"""Prune: what is old and over goes whole, what is not stays whole, whoever works on it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import AssetStore, ConfigurationError, EventsPruned, Job, JobStore, PruneReport, Relay, Runner, prune
from jobkit.base.clock import utcnow
from jobkit.db.dialects.base import MARK
from jobkit.maintenance import prune as pruning
from jobkit.tables import assets, content_job_events, content_jobs
from tests.support.databases import Database
from tests.support.files import intents, objects
from tests.support.recorder import Recorder
from tests.support.runners import note, only
from tests.support.sweeping import collect, intend

Create = Callable[..., Job]
DAY = timedelta(days=1)
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


def ended(engine: sa.Engine, job: Job, status: str = "failed", at: datetime = LONG_AGO) -> None:
    with engine.begin() as connection:
        jobs = JobStore(connection)
        if status in ("done", "failed"):
            jobs.transition(job.id, status="running")
            jobs.transition(job.id, expect="running", status=status)
        else:
            jobs.cancel(job.id)
        connection.execute(content_jobs.update().where(content_jobs.c.id == job.id).values(finished_at=at))


def left(engine: sa.Engine) -> tuple[set[Any], set[Any]]:
    """The ids of the jobs that are left, and of those whose events are."""
    with engine.connect() as connection:
        jobs = set(connection.execute(sa.select(content_jobs.c.id)).scalars())
        events = connection.execute(sa.select(content_job_events.c.job_id).where(content_job_events.c.id > 0)).scalars()
        return jobs, set(events)


def sums(report: PruneReport) -> tuple[int, int, int]:
    return report.jobs, report.events, report.assets


def test_what_ended_long_ago_goes_with_its_events_and_the_rest_stays(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "PAGE", 3)  # one page has nothing old in it
    monkeypatch.setattr(pruning, "BATCH", 2)
    old = [create() for _ in range(7)]
    queued, running, young = create(), create(), create()
    old += [create() for _ in range(6)]
    for number, job in enumerate(old):
        ended(engine, job, ["done", "failed", "cancelled"][number % 3])
    with engine.begin() as connection:
        JobStore(connection).transition(running.id, status="running")
    ended(engine, young, at=utcnow() - DAY / 2)
    kept = {queued.id, running.id, young.id}

    first = tuple(job.id for job in old[:10])
    looked = prune(engine, older_than=DAY)
    assert looked == PruneReport(dry_run=True, jobs=13, events=13 * 3 - 4, sample=first)
    assert left(engine) == (kept | {job.id for job in old}, kept | {job.id for job in old})
    gone = prune(engine, older_than=DAY, dry_run=False)
    assert gone == PruneReport(dry_run=False, jobs=13, events=13 * 3 - 4, sample=first)
    assert left(engine) == (kept, kept)
    assert prune(engine, older_than=86400.0, dry_run=False) == PruneReport(dry_run=False)
    assert prune(engine, older_than=0, dry_run=False).sample == (young.id,)


def test_the_age_is_told_by_the_clock_given_and_a_job_without_an_end_counts_from_its_last_change(
    engine: sa.Engine, create: Create
) -> None:
    by_hand, ended_long_ago = create(), create()
    with engine.begin() as connection:
        JobStore(connection, clock=lambda: LONG_AGO).transition(by_hand.id, status="cancelled")
    ended(engine, ended_long_ago, at=LONG_AGO)
    assert prune(engine, older_than=DAY, clock=lambda: LONG_AGO + DAY / 2) == PruneReport(True)
    assert prune(engine, older_than=1e300) == PruneReport(True)
    exactly = prune(engine, older_than=DAY, clock=lambda: LONG_AGO + DAY, dry_run=False)
    assert exactly.sample == (by_hand.id, ended_long_ago.id)
    assert left(engine) == (set(), set())


def test_assets_stay_unless_their_store_is_given_and_then_go_at_a_sweep(
    engine: sa.Engine, disk: AssetStore, tmp_path: Path, create: Create
) -> None:
    other = AssetStore(tmp_path / "other", provider="other")
    for store in (disk, disk, other):
        create()
        Runner(engine, store, only(note)).run_until_idle(timeout=60)
    with engine.begin() as connection:
        one, _, of_other = list(connection.execute(sa.select(content_jobs.c.id).order_by(content_jobs.c.id)).scalars())
        connection.execute(content_jobs.update().where(content_jobs.c.id == one).values(finished_at=LONG_AGO))
    assert sums(prune(engine, older_than=DAY, dry_run=False)) == (1, 3, 0)
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(assets)).scalar_one() == 3
    assert sums(prune(engine, older_than=0, assets=disk)) == (2, 6, 1)
    assert sums(prune(engine, older_than=0, assets=disk, dry_run=False)) == (2, 6, 1)
    with engine.connect() as connection:
        rows = connection.execute(sa.select(assets.c.job_id, assets.c.provider, assets.c.object_key)).all()
    assert {(row.job_id, row.provider) for row in rows} == {(one, "local_disk"), (of_other, "other")}
    (buried,) = intents(engine)
    assert intents(engine)[buried] == "tombstone"
    collect(disk)
    assert objects((tmp_path / "assets").as_uri()).keys() == {
        row.object_key for row in rows if row.provider == "local_disk"
    }


def test_an_asset_whose_key_is_recorded_already_goes_too(engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    create()
    Runner(engine, disk, only(note)).run_until_idle(timeout=60)
    with engine.connect() as connection:
        key = connection.execute(sa.select(assets.c.object_key)).scalar_one()
    intend(engine, object_key=key, state="collected")
    assert sums(prune(engine, older_than=0, assets=disk, dry_run=False)) == (1, 3, 1)
    assert intents(engine) == {key: "collected"}


def test_a_key_is_free_again(engine: sa.Engine, create: Create) -> None:
    job = create(idempotency_key="once")
    ended(engine, job)
    assert create(idempotency_key="once").id == job.id
    prune(engine, older_than=DAY, dry_run=False)
    assert create(idempotency_key="once").id != job.id


def test_the_mark_is_the_newest_position_that_went_and_never_a_signal(
    engine: sa.Engine, create: Create, recorder: Recorder
) -> None:
    def mark() -> Any:
        with engine.connect() as connection:
            return connection.execute(
                sa.select(content_job_events.c.payload).where(content_job_events.c.job_id == MARK)
            ).scalar_one_or_none()

    def newest(job: Job) -> Any:
        c = content_job_events.c
        with engine.connect() as connection:
            row = connection.execute(sa.select(c.xid, c.id).where(c.job_id == job.id).order_by(c.id.desc())).first()
        assert row is not None
        return {"xid": row.xid or 0, "id": row.id}

    first, second, third = create(), create(), create()
    ended(engine, second)
    ended(engine, first)
    assert mark() is None
    with Relay(engine):
        expected = max((newest(first), newest(second)), key=lambda p: (p["xid"], p["id"]))
        prune(engine, older_than=DAY, dry_run=False)
        assert mark() == expected
        ended(engine, third, at=LONG_AGO)
        later = newest(third)
        prune(engine, older_than=DAY, dry_run=False)
        assert mark() == later
        last = create()
        recorder.wait(lambda types: recorder.events[-1:] != [] and recorder.events[-1].job_id == last.id)
    assert {event.job_id for event in recorder.events} <= {third.id, last.id}


@pytest.mark.parametrize("wrong", [-1, True, "1", float("nan"), timedelta(-1), None])
def test_an_age_that_is_none_is_refused_with_its_name(wrong: Any, engine: sa.Engine) -> None:
    with pytest.raises((TypeError, ValueError), match="older_than"):
        prune(engine, older_than=wrong)


def test_what_cannot_be_pruned_is_refused(database: Database, create: Create) -> None:
    engine = database.engine
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="Engine"):
        prune(connection, older_than=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="AssetStore, not str"):
        prune(engine, older_than=1, assets="files")  # type: ignore[arg-type]
    if engine.dialect.name == "sqlite":
        with Session(engine) as session, session.begin():
            JobStore(session).create("acme", job_type="note")
            with pytest.raises(ConfigurationError, match="for ever"):
                prune(engine, older_than=1, dry_run=False)


def test_a_replay_from_before_what_was_pruned_is_refused_and_one_from_after_it_is_not(
    engine: sa.Engine, create: Create, recorder: Recorder
) -> None:
    with Relay(engine):
        ended(engine, create())
        recorder.wait(lambda types: "failed" in types)
        before = recorder.events[0].cursor
        kept = create()
        recorder.wait(lambda types: types[-1] == "queued" and recorder.events[-1].job_id == kept.id)
    prune(engine, older_than=DAY, dry_run=False)
    with pytest.raises(EventsPruned):
        Relay(engine, after=before).start()
