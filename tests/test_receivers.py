"""Receivers that are slow, raise, re-enter, come and go: they cost themselves time, and nobody else anything."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobEvent, JobStore, Relay, Runner, signals
from jobkit.base.clock import utcnow
from jobkit.base.ids import new_id
from jobkit.db.dialects.base import EventRow
from jobkit.events import feed, own_events, relay
from jobkit.events.feed import Feed
from jobkit.tables import content_job_events
from tests.support.databases import Database
from tests.support.recorder import ALL, Recorder
from tests.support.runners import only, seen, statuses, until

Create = Callable[..., jobkit.Job]
WHOLE = ["queued", "running", "done"]


class Slow:
    """A receiver of everything, stuck in its first event until it is let go."""

    def __init__(self) -> None:
        self.heard: list[JobEvent] = []
        self.entered, self.let_go = threading.Event(), threading.Event()

    def __call__(self, _: str, *, event: JobEvent) -> None:
        self.entered.set()
        assert self.let_go.wait(60)
        self.heard.append(event)


@pytest.fixture
def slow() -> Iterator[Slow]:
    receiver = Slow()
    for signal in ALL:
        signal.connect(receiver)
    yield receiver
    receiver.let_go.set()


def running(engine: sa.Engine) -> Feed:
    found = relay.running_feed(engine)
    assert found is not None
    return found


def append(engine: sa.Engine, jobs: int, seqs: range) -> list[EventRow]:
    """Events of jobs that are nowhere else, committed all at once: all of the first ``seq``, then the next."""
    ids, now = [new_id() for _ in range(jobs)], utcnow()
    rows = [
        {
            "company_id": "acme",
            "job_id": job_id,
            "seq": seq,
            "type": "content_job.running",
            "payload": {"jobId": str(job_id), "text": "x" * 200},
            "created_at": now,
        }
        for seq in seqs
        for job_id in ids
    ]
    columns = [content_job_events.c[name] for name in ("id", "seq", "company_id", "type", "job_id", "created_at")]
    with engine.begin() as connection:
        connection.execute(content_job_events.insert(), rows)
        mine = sa.select(*columns, content_job_events.c.payload).where(content_job_events.c.job_id >= ids[0])
        found = connection.execute(mine.order_by(content_job_events.c.id)).all()
    return [EventRow(row.id, 0, *row[1:]) for row in found if row.job_id in set(ids)]


def assert_each_once_and_in_order(events: list[JobEvent], jobs: int, last: int) -> None:
    by_job: dict[UUID, list[int]] = {}
    for event in events:
        by_job.setdefault(event.job_id, []).append(event.seq)
    assert len(by_job) == jobs
    assert all(seqs == list(range(1, last + 1)) for seqs in by_job.values())


# --- slow


def test_a_slow_receiver_holds_no_slot_no_lease_and_no_more_connections(
    engine: sa.Engine, disk: AssetStore, create: Create, slow: Slow
) -> None:
    with Runner(engine, disk, only(), concurrency=2, lease=5) as runner:
        jobs = [create() for _ in range(20)]
        assert slow.entered.wait(60)
        until(lambda: statuses(engine) == ["done"] * 20, timeout=60)
        assert slow.heard == []
        assert runner.metrics().ended == 20
        pool: Any = engine.pool
        assert pool.checkedout() <= 4
        assert {seen(engine, job).rescues for job in jobs} == {0}
        slow.let_go.set()
        until(lambda: len(slow.heard) == 60, timeout=60)
    types = {job.id: [e.type.removeprefix("content_job.") for e in slow.heard if e.job_id == job.id] for job in jobs}
    assert list(types.values()) == [WHOLE] * 20


def test_of_a_burst_that_a_slow_receiver_keeps_waiting_little_is_held_and_all_is_told(
    engine: sa.Engine, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_events, "MOST_WAITING", 500)
    with Relay(engine):
        append(engine, 1, range(1, 2))
        assert slow.entered.wait(60)
        own = running(engine)
        rows = append(engine, 800, range(1, 6))
        for start in range(0, len(rows), 100):
            assert own.publish(rows[start : start + 100])
            assert len(own._own._waiting) <= 500
        assert len(rows) == 4_000
        assert not own.flush(0)
        slow.let_go.set()
        assert own.flush(60)
        until(lambda: len(slow.heard) == 4_001, timeout=60)
        until(lambda: len(own._reader.position.delivered_ahead) == 0, timeout=60)
    assert_each_once_and_in_order(slow.heard[1:], jobs=800, last=5)


def test_what_waits_when_the_feed_ends_is_told_before_it_does(
    engine: sa.Engine, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_events, "MOST_WAITING", 100)
    one = Relay(engine).start()
    append(engine, 1, range(1, 2))
    assert slow.entered.wait(60)
    rows = append(engine, 300, range(1, 4))
    running(engine).publish(rows)
    threading.Timer(0.05, slow.let_go.set).start()
    one.stop(timeout=60)
    assert_each_once_and_in_order(slow.heard[1:], jobs=300, last=3)


def test_events_told_while_a_writer_is_left_open_are_remembered_up_to_a_number_and_told_once(
    postgres_database: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MOST_AHEAD", 200)
    engine = postgres_database.engine
    with Relay(engine), Session(postgres_database.connect()) as idle:
        own = running(engine)
        idle.execute(sa.text("SELECT pg_current_xact_id()"))
        for _ in range(10):
            rows = append(engine, 20, range(1, 4))
            assert own.publish(rows)
            assert own.flush(60)
        assert 200 <= len(own._reader.position.delivered_ahead) <= 260
        assert len(recorder.events) < 600
        idle.rollback()
        recorder.wait(lambda types: len(types) == 600, timeout=60)
        until(lambda: len(own._reader.position.delivered_ahead) == 0, timeout=60)
    assert_each_once_and_in_order(recorder.events, jobs=200, last=3)


# --- raising


@pytest.mark.parametrize(
    "error", [ValueError("mine"), SystemExit(3), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_whatever_a_receiver_raises_the_job_and_the_other_receivers_go_on(
    error: BaseException, engine: sa.Engine, disk: AssetStore, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: str, *, event: JobEvent) -> None:
        raise error

    with signals.content_job_running.connected_to(fail), Runner(engine, disk, only()) as runner:
        jobs = [runner.submit("acme", job_type="note") for _ in range(3)]
        recorder.wait(lambda types: types.count("done") == 3, timeout=60)
    assert [recorder.types(job.id) for job in jobs] == [WHOLE] * 3
    logged = [record for record in caplog.records if "fail" in record.message and record.exc_info]
    assert len(logged) == 3


# --- re-entering


def depth() -> int:
    frame: Any = sys._getframe()
    count = 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


@pytest.mark.parametrize("started", [True, False])
def test_a_receiver_may_create_cancel_and_read_and_recursion_has_no_depth(
    started: bool, engine: sa.Engine, disk: AssetStore, recorder: Recorder
) -> None:
    runner = Runner(engine, disk, only(), poll_interval=60)
    depths: list[int] = []
    found: list[str] = []

    def again(_: str, *, event: JobEvent) -> None:
        depths.append(depth())
        with Session(engine) as session, session.begin():
            job = JobStore(session).get_by_id(event.job_id)
            assert job is not None
            found.append(job.status.value)
            if len(depths) < 100:
                JobStore(session).cancel(JobStore(session).create("acme", job_type="note").id)
        if len(depths) < 100:
            runner.submit("other", job_type="note")

    with signals.content_job_queued.connected_to(again, sender="other"):
        if started:
            with runner:
                runner.submit("other", job_type="note")
                until(lambda: len(depths) == 100, timeout=60)
                recorder.wait(lambda types: types.count("done") == 100, timeout=60)
        else:
            runner.submit("other", job_type="note")
            assert len(depths) == 100
    assert max(depths) - min(depths) <= 40
    assert set(found) <= {"queued", "running", "done"}
    assert statuses(engine).count("cancelled") == 99


# --- coming and going


def test_who_is_connected_or_disconnected_in_the_middle_of_an_event(
    engine: sa.Engine, create: Create, recorder: Recorder
) -> None:
    heard: list[tuple[str, UUID]] = []

    def first(_: str, *, event: JobEvent) -> None:
        heard.append(("first", event.job_id))
        signals.content_job_queued.disconnect(first)
        signals.content_job_queued.connect(second)

    def second(_: str, *, event: JobEvent) -> None:
        heard.append(("second", event.job_id))

    with Relay(engine), signals.content_job_queued.connected_to(first):
        jobs = []
        for number in (1, 2, 3):
            jobs.append(create())
            recorder.wait(lambda types, number=number: len(types) == number, timeout=60)  # type: ignore[misc]
    assert heard == [("first", jobs[0].id), ("second", jobs[1].id), ("second", jobs[2].id)]
