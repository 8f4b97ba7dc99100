"""``aio.subscribe`` and ``aio.watch``: committed events on the host's loop, from the relay's thread, and nothing left
behind.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

import jobkit
from jobkit import ANY_COMPANY, Job, JobEvent, JobNotFound, JobState, JobStore, Relay, Runner, aio, signals
from jobkit.aio import AsyncJobStore
from jobkit.base.clock import utcnow
from jobkit.errors import SubscriberTooSlow
from jobkit.events import hub
from jobkit.events.watch import Watcher
from tests.support.asynchronous import Lane
from tests.support.garbage import collected
from tests.support.runners import Gate, only

COMPANY = "acme"
Create = Callable[..., Job]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with collected():
        yield
    assert hub.subscribers._subscribers == {}
    assert not signals.any_receivers()


def run(story: Callable[[], Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await story()

    return asyncio.run(bounded())


async def until(holds: Callable[[], Any]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


def short(event: JobEvent) -> str:
    return event.type.removeprefix("content_job.")


def made(number: int, company_id: str = COMPANY) -> JobEvent:
    return JobEvent(number, number, "0-0", company_id, "content_job.queued", uuid4(), utcnow(), {})


def deliver(*numbers: int) -> None:
    """As the relay does, on a thread of its own."""
    thread = threading.Thread(target=signals.deliver, args=([made(number) for number in numbers],))
    thread.start()
    thread.join()


# --- subscribe


def test_a_committed_job_is_followed_from_an_asynchronous_transaction_to_its_file(
    lane: Lane, disk_of: Callable[[sa.Engine], jobkit.AssetStore]
) -> None:
    async def story() -> None:
        async with aio.subscribe(COMPANY) as events, aio.subscribe("beta") as others:
            with Runner(lane.engine, disk_of(lane.engine), only(), poll_interval=0.05) as runner:
                async with AsyncSession(lane.async_engine) as session:
                    await AsyncJobStore(session).create(COMPANY, job_type="note")
                    await session.rollback()
                    job = await AsyncJobStore(session).create(COMPANY, job_type="note")
                    await session.commit()
                runner.dispatch(job)
                heard = [await anext(events) for _ in range(3)]
                await asyncio.to_thread(runner.stop)
        assert [(short(event), event.seq) for event in heard] == [("queued", 1), ("running", 2), ("done", 3)]
        assert {event.job_id for event in heard} == {job.id}
        assert [event async for event in others] == []

    lane.run(story)


@pytest.fixture
def disk_of(tmp_path: Any) -> Callable[[sa.Engine], jobkit.AssetStore]:
    return lambda engine: jobkit.AssetStore(tmp_path / "assets", engine=engine)


def test_it_hears_from_the_call_on_not_from_the_first_step() -> None:
    async def story() -> list[int]:
        async with aio.subscribe(COMPANY) as events:
            deliver(1, 2)
            return [(await anext(events)).id, (await anext(events)).id]

    assert run(story) == [1, 2]


def test_a_cancelled_or_timed_out_step_loses_nothing() -> None:
    async def story() -> list[int]:
        async with aio.subscribe(COMPANY) as events:
            for _ in range(50):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(events), 0)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            deliver(1)  # wakes the one that waits
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert waiting.cancelled()
            deliver(2)
            return [(await anext(events)).id for _ in range(2)]

    assert run(story) == [1, 2]


def test_a_slow_reader_gets_what_waits_and_is_then_told_that_it_is_too_slow() -> None:
    async def story() -> None:
        async with aio.subscribe(COMPANY, limit=3) as slow, aio.subscribe(COMPANY) as quick:
            deliver(1, 2, 3)
            assert (await anext(slow)).id == 1
            deliver(4)
            deliver(5, 6)
            assert [(await anext(slow)).id for _ in range(3)] == [2, 3, 4]
            for _ in range(2):
                with pytest.raises(SubscriberTooSlow, match="more than 3 events of company 'acme'"):
                    await anext(slow)
            deliver(7)
            assert [(await anext(quick)).id for _ in range(7)] == [1, 2, 3, 4, 5, 6, 7]

    run(story)


def test_a_loop_that_is_busy_is_woken_once_however_much_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        loop, calls = asyncio.get_running_loop(), []
        original = loop.call_soon_threadsafe
        async with aio.subscribe(COMPANY, limit=5_000) as events:
            monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *a: calls.append(a) or original(*a))
            deliver(*range(4_000))
            monkeypatch.undo()
            assert len(calls) == 1
            assert [(await anext(events)).id for _ in range(4_000)] == list(range(4_000))

    run(story)


def test_several_tasks_may_share_one_and_each_event_goes_to_one_of_them() -> None:
    async def take(events: aio.Subscription, heard: list[int]) -> None:
        async for event in events:
            heard.append(event.id)
            await asyncio.sleep(0)

    async def story() -> None:
        heard: list[int] = []
        async with aio.subscribe(COMPANY) as events:
            tasks = [asyncio.create_task(take(events, heard)) for _ in range(3)]
            for number in range(100):
                signals.deliver([made(number)])
                await asyncio.sleep(0)
            await until(lambda: len(heard) == 100)
        await asyncio.gather(*tasks)
        assert sorted(heard) == list(range(100))

    run(story)


async def closed() -> None:
    events = aio.subscribe(COMPANY)
    waiting = asyncio.ensure_future(anext(events, None))
    await asyncio.sleep(0)
    await events.aclose()
    await events.aclose()
    assert await waiting is None
    assert [event async for event in events] == []


async def left_by_an_error() -> None:
    with pytest.raises(LookupError):
        async with aio.subscribe(COMPANY):
            raise LookupError


async def cancelled() -> None:
    async def consume() -> None:
        async with aio.subscribe(COMPANY) as events:
            async for _ in events:
                pass

    task = asyncio.create_task(consume())
    await until(signals.any_receivers)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def dropped() -> None:
    events = aio.subscribe(COMPANY)
    deliver(1)
    async for _ in events:
        break


@pytest.mark.parametrize("way", [closed, left_by_an_error, cancelled, dropped], ids=lambda way: way.__name__)
def test_no_receiver_is_left_whichever_way_it_ends(way: Callable[[], Any]) -> None:
    run(way)
    gc.collect()
    assert not signals.any_receivers()


def test_one_whose_loop_has_ended_is_disconnected_by_the_next_event() -> None:
    async def story() -> aio.Subscription:
        return aio.subscribe(COMPANY)

    kept = run(story)
    deliver(1, 2)
    assert not signals.any_receivers()
    del kept


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "1"])
def test_a_limit_that_is_no_count_is_refused(limit: Any) -> None:
    async def story() -> None:
        with pytest.raises(ValueError, match="limit must be a count"):
            aio.subscribe(COMPANY, limit=limit)

    run(story)


def test_outside_a_loop_it_is_refused_and_connects_nothing() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        aio.subscribe(COMPANY)


# --- watch


@pytest.fixture
def by_signals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is asked only when a watch knows that it missed something."""
    monkeypatch.setattr("jobkit.events.hub.POLL", 600.0)


def move(engine: sa.Engine, job: Job, *statuses: str) -> None:
    for status in statuses:
        with Session(engine) as session, session.begin():
            JobStore(session).transition(job.id, status=status)


def test_a_job_is_watched_from_its_state_to_its_end(engine: sa.Engine, disk: jobkit.AssetStore, create: Create) -> None:
    gate, job = Gate(), create()

    async def story() -> list[JobEvent]:
        items = []
        with Runner(engine, disk, only(gate), poll_interval=0.05):
            async with aclosing(aio.watch(engine, job.id, company_id=COMPANY)) as events:
                async for item in events:
                    items.append(item)
                    gate.open()
        return items

    items = run(story)
    assert isinstance(items[0], JobState)
    assert items[0].job.id == job.id
    assert [item.seq for item in items] == list(range(items[0].seq, 4))
    assert short(items[-1]) == "done"
    assert run(lambda: everything(engine, job)) == ["done"]


async def everything(engine: sa.Engine, job: Job, **options: Any) -> list[str]:
    return [short(item) async for item in aio.watch(engine, job.id, **options)]


def test_what_is_committed_between_its_look_and_its_subscription_is_told(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()
    start = Relay.start

    def then_move(relay: Relay) -> Relay:
        started = start(relay)
        move(engine, job, "running")
        return started

    monkeypatch.setattr(Relay, "start", then_move)

    async def story() -> list[str]:
        told = []
        async for item in aio.watch(engine, job.id):
            told.append(short(item))
            if len(told) == 1:
                move(engine, job, "failed")
        return told

    assert run(story) == ["running", "failed"]


@pytest.mark.usefixtures("by_signals_alone")
def test_two_hundred_watchers_of_one_loop_each_see_every_event(engine: sa.Engine, create: Create) -> None:
    jobs = [create() for _ in range(20)]

    async def story() -> list[list[str]]:
        watchers = [asyncio.create_task(everything(engine, job)) for job in jobs for _ in range(10)]
        await until(lambda: sum(map(len, hub.subscribers._subscribers.values())) == 200)
        for job in jobs:
            await asyncio.to_thread(move, engine, job, "running", "done")
        return await asyncio.gather(*watchers)

    assert run(story) == [["queued", "running", "done"]] * 200


@pytest.mark.parametrize("timeout", [0, 0.2])
def test_a_timeout_ends_it_without_an_error(engine: sa.Engine, create: Create, timeout: float) -> None:
    job = create()
    assert run(lambda: everything(engine, job, timeout=timeout)) == ["queued"]


def test_an_unknown_or_foreign_job_is_not_found(engine: sa.Engine, create: Create) -> None:
    job = create()

    async def story() -> None:
        for asked, company in ((uuid4(), ANY_COMPANY), ("nonsense", "acme"), (job.id, "beta")):
            with pytest.raises(JobNotFound):
                await anext(aio.watch(engine, asked, company_id=company))
        with pytest.raises(ValueError, match="company_id"):
            await anext(aio.watch(engine, job.id, company_id=None))  # type: ignore[arg-type]

    run(story)


@pytest.mark.parametrize("way", ["cancel", "aclose", "abandon"])
def test_a_page_that_is_closed_leaves_no_receiver_and_no_relay(engine: sa.Engine, create: Create, way: str) -> None:
    job = create()

    async def story() -> None:
        if way == "cancel":
            task = asyncio.create_task(everything(engine, job))
            await until(lambda: hub.subscribers._subscribers)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()
        elif way == "aclose":
            events = aio.watch(engine, job.id)
            await anext(events)
            await events.aclose()
        else:
            async for _ in aio.watch(engine, job.id):
                break
            gc.collect()
        await until(lambda: not hub.subscribers._subscribers)

    run(story)
    assert not signals.any_receivers()


@pytest.mark.parametrize("name", ["open", "take"])
def test_a_task_that_is_cancelled_while_its_thread_asks_the_database_leaves_nothing(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    job = create()
    entered, go = threading.Event(), threading.Event()
    original = getattr(Watcher, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert go.wait(60)
        return original(*args, **kwargs)

    monkeypatch.setattr(Watcher, name, call)

    async def story() -> None:
        task = asyncio.create_task(everything(engine, job))
        if name == "take":
            await until(lambda: hub.subscribers._subscribers)
            await asyncio.to_thread(move, engine, job, "running")
        await until(entered.is_set)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    run(story)
    assert hub.subscribers._subscribers == {}


@pytest.mark.parametrize("inner", [False, True], ids=["AsyncEngine", "its sync_engine"])
def test_an_asynchronous_engine_is_refused_with_what_helps(inner: bool, tmp_path: Path) -> None:
    made: Any = create_async_engine("postgresql+psycopg_async://host/db")
    engine = made.sync_engine if inner else made

    async def story() -> None:
        await anext(aio.watch(engine, uuid4()))

    for use in (
        lambda: run(story),
        lambda: Relay(engine),
        lambda: jobkit.AssetStore(tmp_path, engine=engine),
        lambda: Runner(engine, jobkit.AssetStore(tmp_path), only()),
    ):
        with pytest.raises(jobkit.ConfigurationError, match=r"AsyncEngine.*postgresql\+psycopg"):
            use()
