"""Lists by task and date, without inputs; counts; all that match cancelled, retried, deleted, in batches."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from jobkit import ANY_COMPANY, AssetStore, Job, JobStatus, JobStore, Runner, aio
from jobkit.tables import asset_intents, assets, content_job_events, content_jobs
from tests.support import shared as module_database
from tests.support.runners import only

shared, database = module_database.shared, module_database.database
START = datetime(2026, 1, 1, tzinfo=UTC)
STATUSES = list(JobStatus)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(hours=1)
        return self.now


def filled(engine: sa.Engine) -> dict[tuple[str, str, str], Job]:
    """A job for each company, type and status, an hour apart, each of a task of its own."""
    made = {}
    with Session(engine) as session, session.begin():
        jobs = JobStore(session, clock=Clock())
        for company in ("acme", "globex"):
            for kind in ("note", "bill"):
                for status in STATUSES:
                    job = jobs.create(
                        company, job_type=kind, input={"a": "x" * 1_000}, source_task_id=f"{kind} {status}"
                    )
                    if status is not JobStatus.QUEUED:
                        job = jobs.transition(job.id, company_id=company, status=status)
                    made[company, kind, str(status)] = job
    return made


def statuses(engine: sa.Engine) -> dict[Any, str]:
    with engine.connect() as connection:
        return {row.id: row.status for row in connection.execute(sa.select(content_jobs))}


def event_count(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        query = sa.select(sa.func.count()).select_from(content_job_events).where(content_job_events.c.id > 0)
        return connection.scalar(query) or 0


# --- lists and counts


def test_a_list_by_task_and_by_date(engine: sa.Engine) -> None:
    made = filled(engine)
    with Session(engine) as session:
        jobs = JobStore(session)
        one = made["acme", "bill", "failed"]
        assert jobs.list_by_company("acme", source_task_id="bill failed") == [one]
        assert jobs.list_by_company("globex", source_task_id="bill nothing") == []
        newest_first = jobs.list_by_company("acme")
        assert jobs.list_by_company("acme", since=one.created_at) == newest_first[: newest_first.index(one) + 1]
        assert jobs.list_by_company("acme", until=one.created_at) == newest_first[newest_first.index(one) + 1 :]
        assert jobs.list_by_company("acme", since=one.created_at, until=one.created_at + timedelta(seconds=1)) == [one]
        assert jobs.list_by_company("acme", job_type="bill", since=one.created_at, limit=1) == newest_first[:1]


def test_a_list_without_inputs_leaves_them_in_the_database(engine: sa.Engine) -> None:
    filled(engine)
    with Session(engine) as session:
        jobs = JobStore(session)
        read: list[str] = []
        sa.event.listen(engine, "before_cursor_execute", lambda *given: read.append(given[2]))
        found = jobs.list_by_company("acme", with_input=False, limit=3)
        assert ["content_jobs.input" in statement for statement in read] == [False]
        whole = jobs.list_by_company("acme", limit=3)
    assert [job.id for job in found] == [job.id for job in whole]
    for job in found:
        assert job.input == {}
        assert "input" not in job.to_dict()
        with pytest.raises(KeyError, match="with_input"):
            job.input["a"]
    assert whole[0].to_dict() == {**found[0].to_dict(), "input": whole[0].input}
    with Session(engine) as session:
        assert JobStore(session).list_by_company("acme", before=found[0], limit=1) == [whole[1]]


def test_a_count_by_status_and_type(engine: sa.Engine) -> None:
    filled(engine)
    with Session(engine) as session:
        jobs = JobStore(session)
        jobs.create("acme", job_type="note")
        counts = jobs.count_by_company("acme")
        assert counts == {status: {"bill": 1, "note": 1 + (status == "queued")} for status in STATUSES}
        assert counts["queued"]["note"] == 2  # type: ignore[index]  # a status is its text
        assert jobs.count_by_company("acme", status="failed") == {"failed": {"bill": 1, "note": 1}}
        assert jobs.count_by_company("acme", job_type="note", status="done") == {"done": {"note": 1}}
        assert jobs.count_by_company("nobody") == {}


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ({"since": datetime(2026, 1, 1)}, ValueError, "since must have a time zone, .*"),
        ({"until": "2026-01-01"}, TypeError, "until must be a datetime, not str"),
        ({"source_task_id": 7}, TypeError, "source_task_id must be text, not int"),
        ({"source_task_id": "a\0"}, ValueError, "source_task_id contains a NUL character"),
        ({"status": "lost"}, ValueError, "status must be one of .*"),
        ({"limit": -1}, ValueError, "limit must be a count, not -1"),
        ({"statuses": []}, TypeError, ".*statuses.*"),
    ],
    ids=repr,
)
def test_a_wrong_filter_is_refused_by_every_call(
    engine: sa.Engine, which: dict[str, Any], error: type[Exception], message: str
) -> None:
    filled(engine)
    before = statuses(engine)
    with Session(engine) as session:
        jobs = JobStore(session)
        calls: list[Any] = [jobs.list_by_company, jobs.cancel_all, jobs.retry_all, jobs.delete]
        for call in [*calls, *([] if "limit" in which else [jobs.count_by_company])]:
            with pytest.raises(error, match=f"^{message}$"):
                call("acme", **which)
        session.commit()
    assert statuses(engine) == before


@pytest.mark.parametrize("company", [None, "", b"acme", True], ids=repr)
def test_what_is_no_company_has_nothing_changed(engine: sa.Engine, company: Any) -> None:
    filled(engine)
    before = statuses(engine)
    with Session(engine) as session:
        jobs = JobStore(session)
        for call in (jobs.count_by_company, jobs.cancel_all, jobs.retry_all, jobs.delete):
            with pytest.raises((ValueError, TypeError), match=r"^company_id "):
                call(company)
        with pytest.raises(TypeError, match=r"^company_id "):
            jobs.count_by_company(ANY_COMPANY)  # type: ignore[arg-type]
        session.commit()
    assert statuses(engine) == before


# --- all that match


def all_of(engine: sa.Engine, name: str, company: Any, **which: Any) -> list[int]:
    """Call it until it finds none, a transaction each."""
    found = []
    while not found or found[-1]:
        with Session(engine) as session, session.begin():
            found.append(getattr(JobStore(session), name)(company, **which))
    return found


def test_all_that_match_are_cancelled_in_batches_with_one_event_each(engine: sa.Engine) -> None:
    made = filled(engine)
    before, told = statuses(engine), event_count(engine)
    assert all_of(engine, "cancel_all", "acme", limit=3) == [3, 1, 0]
    after = statuses(engine)
    changed = {job.id for key, job in made.items() if key[0] == "acme" and key[2] == "queued"}
    assert {job_id for job_id in after if after[job_id] != before[job_id]} == changed
    assert {after[job_id] for job_id in changed} == {"cancelled"}
    assert event_count(engine) == told + 2
    with engine.connect() as connection:
        asked = connection.scalars(sa.select(content_jobs.c.id).where(content_jobs.c.cancel_requested_at.is_not(None)))
        assert set(asked) == {made["acme", kind, "running"].id for kind in ("note", "bill")}


def test_all_that_match_are_retried_and_no_others(engine: sa.Engine) -> None:
    made = filled(engine)
    told = event_count(engine)
    one = made["acme", "note", "failed"]
    assert all_of(engine, "retry_all", "acme", status="failed", job_type="note") == [1, 0]
    assert all_of(engine, "retry_all", "acme", status="done") == [0]
    assert all_of(engine, "retry_all", "acme", until=one.created_at) == [0]
    assert statuses(engine)[one.id] == "queued"
    assert event_count(engine) == told + 1
    assert all_of(engine, "retry_all", ANY_COMPANY, limit=2) == [2, 2, 2, 1, 0]
    assert "failed" not in statuses(engine).values()


def test_what_matches_is_deleted_with_its_events_and_asked_files(engine: sa.Engine, disk: AssetStore) -> None:
    runner = Runner(engine, disk, only())
    kept, gone = (runner.submit(company, job_type="file") for company in ("globex", "acme"))
    runner.run_until_idle(timeout=60)
    made = filled(engine)
    with Session(engine) as session:
        [file] = disk.list_by_job(session, gone.id, company_id="acme")
    assert all_of(engine, "delete", "acme", job_type="file", provider=disk.provider) == [1, 0]
    with engine.connect() as connection:
        assert list(connection.scalars(sa.select(assets.c.job_id))) == [kept.id]
        assert connection.scalar(sa.select(asset_intents.c.state).where(asset_intents.c.object_key == file.object_key))
        left = sa.select(sa.func.count()).select_from(content_job_events)
        assert connection.scalar(left.where(content_job_events.c.job_id == gone.id)) == 0
        assert connection.scalar(left.where(content_job_events.c.job_id == kept.id)) == 3
    before = statuses(engine)
    assert sum(all_of(engine, "delete", "acme", limit=2)) == sum(
        before[job.id] in ("done", "failed", "cancelled") for key, job in made.items() if key[0] == "acme"
    )
    assert {key[2] for key, job in made.items() if key[0] == "acme" and job.id in statuses(engine)} <= {
        "queued",
        "running",
    }


def test_a_rolled_back_batch_changes_nothing(engine: sa.Engine) -> None:
    filled(engine)
    before, told = statuses(engine), event_count(engine)
    with Session(engine) as session:
        for name in ("cancel_all", "retry_all", "delete"):
            assert getattr(JobStore(session), name)("acme") > 0
        session.rollback()
    assert (statuses(engine), event_count(engine)) == (before, told)


def test_a_job_that_another_transaction_changes_is_left_to_a_later_call(postgres_database: Any) -> None:
    engine = postgres_database.engine
    made = filled(engine)
    held = made["acme", "note", "queued"]
    with engine.connect() as other, other.begin():
        other.execute(sa.select(content_jobs.c.id).where(content_jobs.c.id == held.id).with_for_update())
        assert all_of(engine, "cancel_all", "acme") == [3, 0]
    assert all_of(engine, "cancel_all", "acme") == [1, 0]
    assert statuses(engine)[held.id] == "cancelled"


def test_they_are_awaited_too(lane: Any) -> None:
    filled(lane.engine)

    async def ask() -> list[Any]:
        async with AsyncSession(lane.async_engine) as session, session.begin():
            jobs = aio.AsyncJobStore(session)
            return [
                len(await jobs.list_by_company("acme", with_input=False, job_type="note")),
                (await jobs.count_by_company("acme"))[JobStatus.DONE],
                await jobs.cancel_all("acme"),
                await jobs.retry_all("acme", status="failed"),
                await jobs.delete("acme", status="done"),
            ]

    assert lane.run(ask) == [5, {"bill": 1, "note": 1}, 4, 2, 2]
