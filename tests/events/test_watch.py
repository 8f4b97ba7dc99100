"""watch: the state, then every event, in order, until the job ends, whatever is committed meanwhile and by whom."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Job, JobEvent, JobNotFound, JobState, JobStore, Relay, Runner, signals, watch
from jobkit.base.clock import utcnow
from jobkit.events import hub
from jobkit.events.watch import Watcher
from jobkit.tables import content_job_events, content_jobs
from tests.support.databases import Database
from tests.support.recorder import Recorder
from tests.support.runners import Gate, only, until

Create = Callable[..., Job]
Items = Generator[JobEvent, None, None]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert hub.subscribers._subscribers == {}
    assert not signals.any_receivers()


@pytest.fixture
def by_signals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is asked only when a watch knows that it missed something."""
    monkeypatch.setattr(hub, "POLL", 600.0)


@pytest.fixture
def by_looks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is heard."""
    monkeypatch.setattr(hub, "POLL", 0.02)
    monkeypatch.setattr(Watcher, "hear", lambda *_: None)


def move(engine: sa.Engine, job: Job, *statuses: str) -> None:
    """Change a job as a host would by hand, each change in a transaction of its own."""
    for status in statuses:
        with Session(engine) as session, session.begin():
            JobStore(session).transition(job.id, status=status)


def told(items: Any) -> list[str]:
    return [item.type.removeprefix("content_job.") for item in items]


def relays() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jobkit-relay"]


class Follower:
    """A thread that iterates a watch to its end."""

    def __init__(self, items: Iterator[JobEvent]) -> None:
        self.items: list[JobEvent] = []
        self._iterator = items
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for item in self._iterator:
            self.items.append(item)

    def begun(self, count: int = 1) -> Follower:
        until(lambda: len(self.items) >= count, f"{count} items", timeout=60)
        return self

    def ended(self) -> list[JobEvent]:
        self._thread.join(60)
        assert not self._thread.is_alive(), told(self.items)
        return self.items


# --- what comes


@pytest.mark.usefixtures("by_signals_alone")
def test_the_state_then_each_event_until_the_end(engine: sa.Engine, disk: AssetStore) -> None:
    gate = Gate()
    with Runner(engine, disk, only(gate)) as runner:
        job = runner.submit("acme", job_type="note", input={"a": 1})
        gate.entered()
        follower = Follower(watch(engine, str(job.id), company_id="acme")).begun()
        gate.open()
        items = follower.ended()
    assert told(items) == ["running", "done"]
    state, last = items
    assert isinstance(state, JobState)
    assert (state.job.id, state.job.input, state.job.status) == (job.id, {"a": 1}, "running")
    assert state.payload == {"jobId": str(job.id)}
    assert state.to_dict().keys() == last.to_dict().keys()
    assert (state.seq, last.seq) == (2, 3)
    assert not isinstance(last, JobState)
    with Session(engine) as session:
        found = JobStore(session).get_by_id(job.id)
    assert found is not None
    assert last.payload == {"jobId": str(job.id), "assetId": str(found.result_asset_id)}


@pytest.mark.usefixtures("by_signals_alone")
def test_a_process_that_renders_nothing_watches_what_another_process_does(
    engine: sa.Engine, database: Database, tmp_path: Path, create: Create
) -> None:
    job = create()
    follower = Follower(watch(engine, job.id)).begun()
    command = [sys.executable, "-c", OTHER, database.engine.url.render_as_string(False), str(tmp_path / "files")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.stdout == "1\n", ended.stderr
    assert told(follower.ended()) == ["queued", "running", "done"]


OTHER = """
import sys
import sqlalchemy as sa, jobkit
engine = sa.create_engine(sys.argv[1])
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)
renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"x"))
print(jobkit.Runner(engine, jobkit.AssetStore(sys.argv[2]), renderers).run_until_idle(timeout=60))
"""


@pytest.mark.parametrize("status", ["done", "failed", "cancelled"])
def test_a_job_that_has_ended_is_one_item_and_needs_no_relay(
    status: str, engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()
    move(engine, job, "running", status)
    monkeypatch.setattr(Relay, "start", None)
    watched = watch(engine, job.id)
    state = next(watched)
    assert isinstance(state, JobState)
    assert (state.type, state.seq, state.job.status) == (f"content_job.{status}", 3, status)
    assert told(watched) == []


def test_a_job_without_events_is_watched_from_its_row(engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.begin() as connection:  # as an adopted table has them
        connection.execute(content_job_events.delete())
        connection.execute(content_jobs.update().values(event_seq=0))
    follower = Follower(watch(engine, job.id)).begun()
    move(engine, job, "running", "failed")
    assert [(item.id > 0, item.seq) for item in follower.ended()] == [(False, 0), (True, 1), (True, 2)]


def test_an_event_ends_a_watch_by_its_type_whatever_its_payload_says(engine: sa.Engine, create: Create) -> None:
    job = create()
    follower = Follower(watch(engine, job.id)).begun()
    with engine.begin() as connection:
        values = {"company_id": "acme", "job_id": job.id, "seq": 2, "type": "content_job.progress"}
        payload = {"jobId": str(job.id), "status": "done", "type": "content_job.done"}
        connection.execute(content_jobs.update().values(event_seq=2))
        connection.execute(content_job_events.insert().values(**values, payload=payload, created_at=utcnow()))
    follower.begun(2)
    move(engine, job, "cancelled")
    assert told(follower.ended()) == ["queued", "progress", "cancelled"]


def test_a_watch_ends_at_the_first_end_and_a_new_one_sees_the_retry(engine: sa.Engine, create: Create) -> None:
    job = create()
    watcher = Watcher(engine, job.id, wake=lambda: None)
    watcher.open()
    move(engine, job, "failed")
    with Session(engine) as session, session.begin():
        JobStore(session).retry(job.id)
    assert told(watcher.take(look=True)) == ["failed"]
    assert watcher.over
    assert watcher.take(look=True) == []
    again = watch(engine, job.id)
    assert next(again).type == "content_job.queued"
    again.close()


# --- nothing is missed between the read and the subscription


POINTS = {
    "before it is read": (Watcher, "read", True),
    "after it is read": (Watcher, "read", False),
    "before it subscribes": (hub.Hub, "add", True),
    "after it subscribed": (hub.Hub, "add", False),
    "before its relay starts": (Relay, "start", True),
    "after its relay started": (Relay, "start", False),
}


@pytest.mark.usefixtures("by_signals_alone")
@pytest.mark.parametrize("moves", [["running"], ["running", "done"]], ids=" ".join)
@pytest.mark.parametrize(
    ("point", "nth"), [(point, nth) for point in POINTS for nth in (1, 2, 3) if nth == 1 or POINTS[point][1] == "read"]
)
def test_what_is_committed_while_a_watch_begins_comes_once(
    point: str, nth: int, moves: list[str], engine: sa.Engine, create: Create, recorder: Recorder, monkeypatch: Any
) -> None:
    job, calls = create(), []
    owner, name, before = POINTS[point]
    original = getattr(owner, name)

    def commit() -> None:
        began = bool(relays())
        move(engine, job, *moves)
        if began:  # it is told now, to whoever listens by now
            recorder.wait(lambda types: types[-1:] == moves[-1:], timeout=60)

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(1)
        mine = len(calls) == nth
        if mine and before:
            commit()
        found = original(self, *args)
        if mine and not before:
            commit()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        follower = Follower(watch(engine, job.id)).begun()
    if "done" not in moves:
        move(engine, job, "done")
    items = follower.ended()
    assert items[-1].type == "content_job.done"
    assert [item.seq for item in items] == list(range(items[0].seq, 4))


@pytest.mark.usefixtures("by_signals_alone")
def test_many_watch_many_jobs_at_once_and_each_sees_all(engine: sa.Engine, create: Create) -> None:
    jobs = [create() for _ in range(12)]
    go = threading.Event()

    def later(job: Job) -> Iterator[JobEvent]:
        go.wait(60)
        yield from watch(engine, job.id)

    followers = [Follower(watch(engine, job.id)) for job in jobs for _ in range(2)]
    followers += [Follower(later(job)) for job in jobs for _ in range(2)]
    for number, job in enumerate(jobs):
        if number == 4:
            go.set()
        move(engine, job, "running", "queued", "running", "done")
    for follower in followers:
        items = follower.ended()
        assert items[-1].type == "content_job.done"
        assert [item.seq for item in items] == list(range(items[0].seq, 6))
    assert all(follower.items[0].seq < 6 for follower in followers[8:24])


# --- signals may be late or too many


@pytest.mark.usefixtures("by_looks_alone")
def test_a_watch_is_complete_without_any_signal(engine: sa.Engine, create: Create) -> None:
    job = create()
    follower = Follower(watch(engine, job.id)).begun()
    move(engine, job, "running", "queued", "running", "done")
    assert told(follower.ended()) == ["queued", "running", "queued", "running", "done"]


def test_a_transaction_left_open_delays_a_watch_only_until_it_looks(
    postgres_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "POLL", 0.05)
    engine = postgres_database.engine
    with Session(postgres_database.connect()) as idle:
        idle.execute(sa.text("SELECT pg_current_xact_id()"))
        with Session(engine) as session, session.begin():
            job = JobStore(session).create("acme", job_type="note")
        follower = Follower(watch(engine, job.id)).begun()
        move(engine, job, "running", "done")
        assert told(follower.ended()) == ["queued", "running", "done"]


@pytest.mark.usefixtures("by_signals_alone")
def test_a_slow_watcher_holds_no_more_than_its_limit_and_misses_nothing(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "MOST_WAITING", 5)
    job = create()
    held: list[int] = []
    watcher = Watcher(engine, job.id, wake=lambda: held.append(len(watcher._heard)))
    watcher.open()
    for heard in (12, 24, 36):
        move(engine, job, *["running", "queued"] * 6)
        until(partial(lambda heard: len(held) >= heard, heard), timeout=60)
        assert [event.seq for event in watcher.take()] == list(range(heard - 10, heard + 2))
    move(engine, job, "done")
    until(lambda: len(held) > 36, timeout=60)
    assert told(watcher.take()) == ["done"]
    assert max(held) == 5


def test_a_watch_survives_an_outage(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hub, "POLL", 0.02)
    monkeypatch.setattr(Watcher, "hear", lambda *_: None)
    job, failures = create(), []
    follower = Follower(watch(engine, job.id)).begun()

    def fail(*_: Any) -> None:
        failures.append(1)
        raise sa.exc.OperationalError("SELECT", {}, OSError("gone"))

    with caplog.at_level(logging.WARNING, "jobkit"):
        sa.event.listen(engine, "engine_connect", fail)
        until(lambda: len(failures) >= 5, timeout=60)
        sa.event.remove(engine, "engine_connect", fail)
    move(engine, job, "done")
    assert told(follower.ended()) == ["queued", "done"]
    assert any("could not be read, and will be again" in record.message for record in caplog.records)


def test_a_receiver_that_watches_on_the_relays_own_thread_is_not_stuck(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "POLL", 0.02)
    seen: list[str] = []
    began, over = threading.Event(), threading.Event()

    def receive(_: str, *, event: JobEvent) -> None:
        for item in watch(engine, event.job_id):
            seen.append(item.type)
            began.set()
        over.set()

    with Relay(engine), signals.content_job_queued.connected_to(receive):
        job = create()
        assert began.wait(60)
        move(engine, job, "done")
        assert over.wait(60)
    assert seen == ["content_job.queued", "content_job.done"]


# --- how it ends


def test_a_timeout_ends_it_without_an_error_and_gives_what_has_come(engine: sa.Engine, create: Create) -> None:
    job = create()
    assert told(watch(engine, job.id, timeout=0.05)) == ["queued"]
    watched = watch(engine, job.id, timeout=0)
    assert next(watched).type == "content_job.queued"
    move(engine, job, "running", "done")
    assert told(watched) == ["running", "done"]
    assert relays() == []


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "1", True])
def test_a_timeout_that_is_none_is_refused_with_its_name(wrong: Any, engine: sa.Engine, create: Create) -> None:
    with pytest.raises((ValueError, TypeError), match="timeout"):
        watch(engine, create().id, timeout=wrong)


@pytest.mark.parametrize("end", [lambda items: items.close(), lambda items: gc.collect()])
def test_closing_or_dropping_it_lets_go_of_relay_and_signals(
    end: Callable[[Any], Any], engine: sa.Engine, create: Create
) -> None:
    job = create()
    watched: Items | None = watch(engine, job.id)
    assert watched is not None
    assert (len(relays()), signals.any_receivers()) == (0, False)
    next(watched)
    assert (len(relays()), signals.any_receivers()) == (1, True)
    if end(watched) is not None:
        watched = None
        gc.collect()
    until(lambda: relays() == [])
    assert not signals.any_receivers()


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine, job: watch(engine, uuid4()),
        lambda engine, job: watch(engine, "not an id"),
        lambda engine, job: watch(engine, job.id, company_id="other"),
        lambda engine, job: watch(engine, str(job.id), company_id=UUID(int=7)),
    ],
)
def test_an_unknown_or_foreign_job_is_not_found_at_once(
    ask: Callable[[Any, Any], Any], engine: sa.Engine, create: Create
) -> None:
    with pytest.raises(JobNotFound):
        ask(engine, create())
    assert relays() == []


def test_a_job_that_is_deleted_while_it_is_watched_is_not_found(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "POLL", 0.02)
    job = create()
    watched = watch(engine, job.id)
    next(watched)
    with engine.begin() as connection:
        connection.execute(content_job_events.delete())
        connection.execute(content_jobs.delete())
    with pytest.raises(JobNotFound, match=str(job.id)):
        next(watched)
    assert relays() == []


def test_a_watcher_whose_wake_raises_does_not_keep_others_from_hearing(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed() -> None:
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(hub, "POLL", 600.0)
    job = create()
    broken = Watcher(engine, job.id, wake=closed)
    broken.open()
    follower = Follower(watch(engine, job.id)).begun()
    move(engine, job, "done")
    assert told(follower.ended()) == ["queued", "done"]
    assert told(broken.take()) == ["done"]


@pytest.mark.parametrize("kind", ["asynchronous", "in memory"])
def test_an_engine_that_would_not_do_is_refused(kind: str) -> None:
    if kind == "asynchronous":
        from sqlalchemy.ext.asyncio import create_async_engine

        with pytest.raises(jobkit.ConfigurationError, match="AsyncEngine"):
            watch(create_async_engine("postgresql+psycopg://host/db"), uuid4())  # type: ignore[arg-type]
    else:
        engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
        jobkit.configure_sqlite(engine)
        jobkit.migrations.upgrade(engine)
        with engine.begin() as connection:
            job = JobStore(connection).create("acme", job_type="note")
        with pytest.raises(jobkit.ConfigurationError, match="in memory"):
            next(watch(engine, job.id))
        engine.dispose()
