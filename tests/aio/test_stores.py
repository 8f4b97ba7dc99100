"""``jobkit.aio``: the stores in the host's own asynchronous transaction, under each asynchronous driver."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from aiosqlite import Connection
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobNotFound, JobRequest, JobStore
from jobkit.aio import AsyncAssetStore, AsyncJobStore
from jobkit.tables import content_job_events, content_jobs
from tests.support.asynchronous import Lane

COMPANY = "acme"
# What runners use of the synchronous stores, and no promise to hosts.
INTERNAL = {"JobStore": {"insert"}, "AssetStore": {"draft", "spool_folder"}}


def committed(lane: Lane) -> tuple[list[str], int]:
    """The job types that any other connection sees, in order, and how many events."""
    with lane.engine.connect() as connection:
        types = connection.execute(sa.select(content_jobs.c.job_type).order_by(content_jobs.c.created_at)).scalars()
        events = connection.execute(sa.select(sa.func.count()).select_from(content_job_events)).scalar_one()
        return list(types), events


# --- one implementation


def methods(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("_") and callable(value)}


@pytest.mark.parametrize(
    ("cls", "twin", "more"),
    [(JobStore, AsyncJobStore, set()), (jobkit.AssetStore, AsyncAssetStore, {"stream"})],
    ids=["jobs", "assets"],
)
def test_every_method_is_there_with_its_signature_and_its_words(cls: type, twin: type, more: set[str]) -> None:
    ours, theirs = methods(twin), methods(cls)
    assert set(ours) == set(theirs) - INTERNAL[cls.__name__] | more
    for name in set(ours) - more:
        mine, original = inspect.signature(ours[name]), inspect.signature(theirs[name])
        assert list(mine.parameters.values())[1:] == list(original.parameters.values())[1:], name
        assert inspect.iscoroutinefunction(ours[name]) or name == "writer"
        assert ours[name].__qualname__ == f"{twin.__name__}.{name}"
        assert (ours[name].__doc__ == theirs[name].__doc__) == (name != "writer")
    mine, original = inspect.signature(AsyncJobStore), inspect.signature(JobStore)
    assert list(mine.parameters.values())[1:] == list(original.parameters.values())[1:]


def test_without_greenlet_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['greenlet'] = None\n"
        "import jobkit\n"
        "try:\n    import jobkit.aio\nexcept ImportError as error:\n    print(error)"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'jobkit[asyncio]'" in ran.stdout


@pytest.mark.parametrize("wrong", [Session(), None, "session", object], ids=lambda wrong: type(wrong).__name__)
def test_what_is_not_an_asynchronous_session_is_refused(wrong: Any) -> None:
    async def story() -> None:
        with pytest.raises(TypeError, match="expected an AsyncSession, async_scoped_session or AsyncConnection"):
            await AsyncJobStore(wrong).create(COMPANY, job_type="note")

    asyncio.run(story())
    with pytest.raises(TypeError, match="expected an AssetStore"):
        AsyncAssetStore(wrong)


# --- the host's own transaction


def test_jobs_go_with_the_hosts_transaction_savepoints_included(lane: Lane) -> None:
    async def story() -> None:
        async with AsyncSession(lane.async_engine) as session:
            jobs = AsyncJobStore(session)
            await jobs.create(COMPANY, job_type="rolled back")
            await session.rollback()
            await jobs.create(COMPANY, job_type="kept")
            savepoint = await session.begin_nested()
            await jobs.create_many(COMPANY, [JobRequest("rolled back")] * 3)
            await savepoint.rollback()
            async with session.begin_nested():
                await jobs.create(COMPANY, job_type="kept too")
            assert committed(lane) == ([], 0)
            await session.commit()
            async with session.begin_nested():
                await jobs.create(COMPANY, job_type="rolled back")
            await session.rollback()

    lane.run(story)
    assert committed(lane) == (["kept", "kept too"], 2)


def test_the_hosts_row_and_the_job_are_one_transaction(lane: Lane) -> None:
    reports = sa.Table("reports", sa.MetaData(), sa.Column("job_id", sa.Uuid, primary_key=True))
    reports.create(lane.engine)

    async def order(connection: AsyncConnection, *, fail: bool) -> None:
        job = await AsyncJobStore(connection).create(COMPANY, job_type="report")
        await connection.execute(reports.insert(), {"job_id": job.id})
        if fail:
            raise LookupError

    async def story() -> None:
        async with lane.async_engine.begin() as connection:
            await order(connection, fail=False)
        with pytest.raises(LookupError):
            async with lane.async_engine.begin() as connection:
                await order(connection, fail=True)

    lane.run(story)
    with lane.engine.connect() as connection:
        told = set(connection.execute(sa.select(reports.c.job_id)).scalars())
        assert told == set(connection.execute(sa.select(content_jobs.c.id)).scalars())
        assert len(told) == 1


def test_every_method_awaited_gives_what_the_synchronous_one_gives(lane: Lane) -> None:
    async def story() -> None:
        async with AsyncSession(lane.async_engine) as session:
            jobs = AsyncJobStore(session, max_input_bytes=100)
            first = await jobs.create(COMPANY, job_type="note", input={"ü": [1, None, 2.5]}, priority=2)
            second, third = await jobs.create_many(COMPANY, [JobRequest("note"), JobRequest("other")])
            assert await jobs.get_by_id(str(first.id), company_id=COMPANY) == first
            assert await jobs.get_by_id("nonsense") is None
            assert await jobs.list_by_company(COMPANY, job_type="note", before=third) == [second, first]
            failed = await jobs.transition(first.id, expect="queued", status="failed", error_message="no")
            assert (failed.status, failed.error_message) == ("failed", "no")
            assert (await jobs.retry(first.id)).status == "queued"
            assert (await jobs.cancel(first.id)).status == "cancelled"
            with pytest.raises(ValueError, match="input"):
                await jobs.create(COMPANY, job_type="note", input={"text": "x" * 100})
            with pytest.raises(JobNotFound):
                await jobs.cancel("nonsense")
            await session.commit()
            assert await session.run_sync(lambda s: JobStore(s).list_by_company(COMPANY)) == (
                await jobs.list_by_company(COMPANY)
            )

    lane.run(story)
    assert len(committed(lane)[0]) == 3


def test_a_scoped_session_is_that_of_the_task_that_calls(lane: Lane) -> None:
    async def order(scoped: async_scoped_session[AsyncSession], jobs: AsyncJobStore, name: str, commit: bool) -> None:
        await jobs.create(COMPANY, job_type=name)
        await (scoped.commit() if commit else scoped.rollback())
        await scoped.remove()

    async def story() -> None:
        scoped = async_scoped_session(async_sessionmaker(lane.async_engine), scopefunc=asyncio.current_task)
        jobs = AsyncJobStore(scoped)
        await asyncio.gather(*(order(scoped, jobs, f"job {n}", n % 2 == 0) for n in range(6)))

    lane.run(story)
    assert sorted(committed(lane)[0]) == ["job 0", "job 2", "job 4"]


def test_tasks_at_once_each_have_their_own_transaction(lane: Lane) -> None:
    async def order(number: int) -> None:
        async with AsyncSession(lane.async_engine) as session:
            jobs = AsyncJobStore(session)
            await jobs.list_by_company(COMPANY, limit=1)
            await jobs.create(COMPANY, job_type=f"job {number}")
            await (session.commit() if number % 3 else session.rollback())

    async def story() -> None:
        await asyncio.gather(*(order(number) for number in range(30)))

    lane.run(story)
    kept = {f"job {number}" for number in range(30) if number % 3}
    assert (set(committed(lane)[0]), committed(lane)[1]) == (kept, len(kept))


def test_a_key_has_one_job_however_many_tasks_ask(lane: Lane) -> None:
    async def order() -> Any:
        async with AsyncSession(lane.async_engine) as session, session.begin():
            return (await AsyncJobStore(session).create(COMPANY, job_type="note", idempotency_key="k")).id

    async def story() -> list[Any]:
        return await asyncio.gather(*(order() for _ in range(12)))

    assert len(set(lane.run(story))) == 1
    assert committed(lane) == (["note"], 1)


# --- a task that is cancelled in the middle of a call


async def holding(lane: Lane) -> tuple[AsyncConnection, Any]:
    """A transaction that makes everyone else who creates with the key ``k`` wait."""
    connection = await lane.async_engine.connect()
    return connection, await AsyncJobStore(connection).create(COMPANY, job_type="held", idempotency_key="k")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0)


def waits_for_a_lock(lane: Lane) -> bool:
    """Whether a statement is blocked; SQLite does not tell, but there the first one of a second writer is."""
    if lane.driver == "aiosqlite":
        return True
    with lane.engine.connect() as connection:
        return connection.execute(sa.text("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")).scalar_one()


@pytest.mark.parametrize("nested", [False, True])
def test_a_cancelled_call_leaves_the_session_as_sqlalchemy_does_and_nothing_committed(lane: Lane, nested: bool) -> None:
    entered: list[AsyncSession] = []
    if lane.driver == "aiosqlite":  # a statement in its thread cannot be cut short, and ends with this
        jobkit.configure_sqlite(lane.async_engine, synchronous="NORMAL", busy_timeout=0.5)

    async def waiting(session: AsyncSession) -> None:
        jobs = AsyncJobStore(session)
        if lane.driver != "aiosqlite":  # there a writer waits at its first write
            await jobs.create(COMPANY, job_type="lost")
        entered.append(session)
        if nested:
            async with session.begin_nested():
                await jobs.create(COMPANY, job_type="held", idempotency_key="k")
        else:
            await jobs.create(COMPANY, job_type="held", idempotency_key="k")

    async def story() -> None:
        connection, _ = await holding(lane)
        async with AsyncSession(lane.async_engine) as session:
            task = asyncio.create_task(waiting(session))
            await until(lambda: bool(entered) and waits_for_a_lock(lane))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await connection.rollback()
            await connection.close()
            try:
                await session.rollback()
            except (InvalidRequestError, PendingRollbackError):
                await session.close()
            await AsyncJobStore(session).create(COMPANY, job_type="after")
            await session.commit()
        async with AsyncSession(lane.async_engine) as session, session.begin():
            await AsyncJobStore(session).create(COMPANY, job_type="held", idempotency_key="k")

    lane.run(story)
    assert committed(lane) == (["after", "held"], 2)


def test_a_cancel_at_any_step_commits_all_or_nothing(lane: Lane) -> None:
    async def order() -> None:
        async with AsyncSession(lane.async_engine) as session, session.begin():
            jobs = AsyncJobStore(session)
            await jobs.create(COMPANY, job_type="a")
            async with session.begin_nested():
                await jobs.create(COMPANY, job_type="b")

    async def story() -> list[BaseException | None]:
        ends: list[BaseException | None] = []
        for step in [*range(30), *range(30, 300, 7)]:
            task = asyncio.create_task(order())
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            ends += await asyncio.gather(task, return_exceptions=True)
        await order()
        return ends

    cancelled = [end for end in lane.run(story) if end is not None]
    assert {type(end) for end in cancelled} == {asyncio.CancelledError}
    types, events = committed(lane)
    assert types.count("a") == types.count("b") == events / 2 >= 1


def test_a_connection_in_autocommit_is_refused_because_nothing_could_be_rolled_back(lane: Lane) -> None:
    async def story() -> None:
        async with lane.async_engine.connect() as connection:
            committing = await connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(jobkit.ConfigurationError, match="AUTOCOMMIT"):
                await AsyncJobStore(committing).create(COMPANY, job_type="note")

    lane.run(story)
    assert committed(lane) == ([], 0)


@pytest.mark.parametrize("lane", ["aiosqlite"], indirect=True)
def test_a_task_that_is_cancelled_at_any_statement_leaves_no_lock_behind(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, victim, last = 0, None, 0
    original = Connection._execute

    async def execute(connection: Connection, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if victim is not None and asyncio.current_task() is victim:
            calls += 1
            if calls == last:
                victim.cancel()  # takes effect while the driver's thread is at work on this
        return await original(connection, *args, **kwargs)

    async def order() -> None:
        async with AsyncSession(lane.async_engine) as session, session.begin():
            await AsyncJobStore(session).create(COMPANY, job_type="a")
            async with session.begin_nested():
                await AsyncJobStore(session).create(COMPANY, job_type="b")

    async def story() -> None:
        nonlocal calls, victim, last
        ends: list[Any] = []  # with their tracebacks, which hold the cursors
        while calls >= last:
            calls, last = 0, last + 1
            victim = asyncio.create_task(order())
            ends += await asyncio.gather(victim, return_exceptions=True)
            with Session(lane.engine) as session, session.begin():
                JobStore(session).create(COMPANY, job_type="others")
        assert len(ends) > 15
        assert [type(end) for end in ends] == [asyncio.CancelledError] * (len(ends) - 1) + [type(None)]

    monkeypatch.setattr(Connection, "_execute", execute)
    jobkit.configure_sqlite(lane.engine, synchronous="NORMAL", busy_timeout=2)
    lane.run(story)
    types, _ = committed(lane)
    assert types.count("a") == types.count("b") >= 1
