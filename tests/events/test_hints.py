"""Hints: what makes a feed look at once, and what happens without them. In most tests here polling is off."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobStore, Relay
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.postgresql import Postgresql
from jobkit.events import feed, relay
from jobkit.events import hints as listener
from jobkit.events.feed import Feed
from jobkit.events.hints import Listener
from jobkit.events.log import DeliveredEvents
from tests.support.databases import Database
from tests.support.postgres import Server, start_own_server
from tests.support.proxy import Proxy
from tests.support.recorder import Recorder
from tests.support.runners import until

Create = Callable[..., jobkit.Job]


@pytest.fixture
def no_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that no hint asks for comes after an hour. SQLite's look at its version number is a hint."""
    monkeypatch.setattr(feed, "ACTIVE_POLL", 3600.0)
    monkeypatch.setattr(feed, "IDLE_POLL", 3600.0)


@pytest.fixture
def pg(postgres_database: Database) -> sa.Engine:
    return postgres_database.engine


def running(engine: sa.Engine) -> Feed:
    found = relay.running_feed(engine)
    assert found is not None
    return found


def listens(engine: sa.Engine) -> None:
    """Wait until hints arrive, where they are sent."""
    mine = running(engine)._listener
    until(lambda: mine is None or mine.listening, "LISTEN", 60)


def listeners(engine: sa.Engine) -> list[int]:
    """The server processes of this database that wait for notifications."""
    last = "query = 'SELECT count(*) FROM pg_listening_channels()'"  # how the connection is asked whether it listens
    query = f"SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND {last}"
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(query).scalars())


def create_in(engine: sa.Engine) -> jobkit.Job:
    with Session(engine) as session, session.begin():
        return JobStore(session).create("acme", job_type="note")


def mark(engine: sa.Engine) -> None:
    """Hint at the log. Hints come in order, so those from before are in when this is."""
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT pg_notify('jobkit_log', '')")


class Hints:
    """The hints that the feed of ``engine`` gets from now on: whether each was about jobs."""

    def __init__(self, engine: sa.Engine) -> None:
        self.heard: list[bool] = []
        mine = running(engine)._listener
        assert mine is not None
        until(lambda: mine.listening, "LISTEN", 60)
        self._through, mine._on_notify = mine._on_notify, self._hear
        mark(engine)
        until(lambda: self.heard[-1:] == [False], "the mark", 60)
        self.heard.clear()

    def _hear(self, jobs: bool) -> None:
        self.heard.append(jobs)
        self._through(jobs)

    def wait(self, count: int) -> list[bool]:
        until(lambda: len(self.heard) >= count, "a hint", 60)
        return self.heard


# --- what is hinted at


def test_every_way_to_change_a_job_is_hinted_at_once_and_in_vain_to_no_runner(pg: sa.Engine) -> None:
    def change(method: Callable[[JobStore], Any]) -> Any:
        with Session(pg) as session, session.begin():
            return method(JobStore(session))

    ways: list[tuple[Callable[[JobStore], Any], bool]] = [
        (lambda jobs: jobs.create("acme", job_type="note", idempotency_key="k"), True),
        (lambda jobs: jobs.create_many("acme", [jobkit.JobRequest("note")] * 5), True),
        (lambda jobs: [jobs.create("acme", job_type="note") for _ in range(5)], True),
        (lambda jobs: jobs.transition(job.id, status="running"), False),
        (lambda jobs: jobs.transition(job.id, status="failed"), False),
        (lambda jobs: jobs.retry(job.id), True),
        (lambda jobs: jobs.cancel(job.id), False),
    ]
    job = create_in(pg)
    with Relay(pg):
        hints = Hints(pg)
        for number, (way, _) in enumerate(ways, 1):
            change(way)
            hints.wait(number)
        assert hints.heard == [jobs for _, jobs in ways]


WORKER = """
import sys
import sqlalchemy as sa, jobkit
engine = sa.create_engine(sys.argv[1])
renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"x"))
with jobkit.Runner(engine, jobkit.AssetStore(sys.argv[2]), renderers, poll_interval=0.05) as runner:
    print("started", flush=True)
    sys.stdin.read()
"""


def test_what_the_runner_of_another_process_commits_is_hinted_at(
    pg: sa.Engine, tmp_path: Path, recorder: Recorder
) -> None:
    url = pg.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", WORKER, url, str(tmp_path / "assets")]
    with Relay(pg), subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "started\n"
            hints = Hints(pg)
            until(lambda: len(listeners(pg)) == 2, "LISTEN of both", 60)
            # Creating jobs hints at jobs; at the log alone hints only what the worker commits.
            while False not in hints.heard:
                job = create_in(pg)
                recorder.wait(lambda _, job=job: recorder.types(job.id)[-1:] == ["done"], 60)  # type: ignore[misc]
        finally:
            worker.communicate()


@pytest.mark.usefixtures("no_polling")
def test_a_hint_makes_a_feed_look_at_once_when_somebody_listens(pg: sa.Engine) -> None:
    with Relay(pg):
        mine = running(pg)
        until(lambda: mine._next_scan > 0, "the first scan", 60)
        before = mine._last_scan
        mine._hint(False)
        assert not mine._hinted
        with Recorder():
            mine._hint(False)
            until(lambda: mine._last_scan > before, "a scan", 60)


def test_a_change_that_is_rolled_back_or_asked_not_to_hint_does_not(pg: sa.Engine) -> None:
    with Relay(pg):
        hints = Hints(pg)
        with Session(pg) as session:
            JobStore(session).create("acme", job_type="note")
            session.rollback()
            JobStore(session, notify=False).create("acme", job_type="note")
            session.commit()
            mark(pg)
            assert hints.wait(1) == [False]
            JobStore(session).create("acme", job_type="note")
            session.commit()
            assert hints.wait(2) == [False, True]


# --- who is told of jobs


@pytest.mark.parametrize("listened_to", [False, True])
def test_runners_are_woken_for_jobs_of_others_until_they_are_not_interested(
    listened_to: bool, engine: sa.Engine, create: Create, caplog: pytest.LogCaptureFixture
) -> None:
    woken = threading.Semaphore(0)

    def fail() -> None:
        raise RuntimeError("not now")

    with Relay(engine), Recorder() as recorder:
        if not listened_to:
            recorder.__exit__()
        forget_failing = running(engine).on_jobs(fail)
        forget = running(engine).on_jobs(woken.release)
        listens(engine)
        while woken.acquire(timeout=0.5):  # of the beginning
            pass
        create()
        assert woken.acquire(timeout=60)
        assert "not now" in caplog.text
        forget_failing()
        forget()
        forget()
        assert running(engine)._job_listeners == {}


def test_a_job_that_is_over_wakes_no_runner(pg: sa.Engine, recorder: Recorder) -> None:
    jobs = [create_in(pg) for _ in range(3)]
    woken: list[int] = []
    with Relay(pg):
        listens(pg)
        recorder.events.clear()
        forget = running(pg).on_jobs(lambda: woken.append(1))
        for job in jobs:
            with Session(pg) as session, session.begin():
                JobStore(session).cancel(job.id)
        recorder.wait(lambda types: types.count("cancelled") == 3, 60)
        forget()
    assert woken == []


# --- own commits


def test_what_is_offered_here_is_hinted_at_elsewhere_and_not_here(
    pg: sa.Engine, postgres_database: Database, recorder: Recorder
) -> None:
    job = create_in(pg)
    with Session(pg) as session, session.begin():
        JobStore(session, notify=False).transition(job.id, status="running")
    here = running_feed(pg)
    there = running_feed(postgres_database.connect())
    hints: dict[str, list[bool]] = {"here": [], "there": []}
    try:
        for name, each in (("here", here), ("there", there)):
            assert each._listener is not None
            each._listener._on_notify = hints[name].append
            until(lambda each=each: each._listener.listening, "LISTEN", 60)  # type: ignore[misc]
        for heard in hints.values():
            heard.clear()
        with Session(pg) as session, session.begin():
            JobStore(session, notify=False).transition(job.id, status="failed")
        rows = here._ask(here._statements.scan, here._reader.position.start.position, here._reader.position.start, 9)[0]
        assert [row.type for row in rows] == ["content_job.failed"]
        here.publish(rows)
        until(lambda: hints["there"], "a hint", 60)
        assert hints == {"here": [], "there": [False]}
    finally:
        here.close(20)
        there.close(20)


def running_feed(engine: sa.Engine) -> Feed:
    made = Feed(engine, DeliveredEvents(), "log")
    made.start()
    return made


# --- without hints


@pytest.mark.parametrize("why", ["driver", "unheard"])
def test_without_hints_polling_is_complete(
    why: str, engine: sa.Engine, create: Create, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "driver":
        monkeypatch.setattr(Listener, "possible", lambda _: False)
    else:
        monkeypatch.setattr(Listener, "_listen", lambda self, _: self._stopped.wait(60))
    with Relay(engine):
        jobs = [create() for _ in range(20)]
        recorder.wait(lambda types: len(types) == 20, 60)
        assert [event.job_id for event in recorder.events] == [job.id for job in jobs]


@pytest.fixture
def unheard(no_polling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no notifications, and it has been silent for a while."""
    monkeypatch.setattr(feed, "ACTIVE_FOR", -3600.0)
    monkeypatch.setattr(Listener, "possible", lambda _: False)


@pytest.mark.usefixtures("unheard")
def test_without_hints_others_are_soon_heard_of_out_of_silence(
    engine: sa.Engine, create: Create, recorder: Recorder
) -> None:
    with Relay(engine):
        for count in range(1, 4):
            create()
            recorder.wait(lambda types, count=count: len(types) == count, 60)  # type: ignore[misc]


@pytest.mark.usefixtures("unheard")
def test_a_look_without_hints_finds_what_an_open_writer_held_back(pg: sa.Engine, recorder: Recorder) -> None:
    looked, original = threading.Semaphore(0), Postgresql.version

    def look(self: Postgresql, connection: sa.Connection) -> int:
        looked.release()
        return original(self, connection)

    with pytest.MonkeyPatch.context() as patch, pg.connect() as writer, Relay(pg):
        patch.setattr(Postgresql, "version", look)
        writer.execute(sa.text("SELECT pg_current_xact_id()"))
        create_in(pg)
        for _ in range(looked._value + 3):
            assert looked.acquire(timeout=60)
        assert recorder.events == []
        writer.rollback()
        recorder.wait(lambda types: len(types) == 1, 60)


@pytest.mark.usefixtures("unheard", "recorder")
def test_a_look_that_shows_nothing_new_scans_nothing(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, looked = type(statements_for(engine)), threading.Semaphore(0)
    scans: list[object] = []

    def version(self: object, connection: sa.Connection) -> int:
        looked.release()
        return 7

    monkeypatch.setattr(kind, "version", version)
    monkeypatch.setattr(kind, "scan", lambda self, *place: scans.append(place) or ([], place[1]))
    with Relay(engine):
        create()
        for _ in range(10):
            assert looked.acquire(timeout=60)
    assert len(scans) == 1


# --- the listening connection


def test_a_listening_connection_that_is_lost_is_made_again_and_what_was_missed_is_looked_for(
    pg: sa.Engine, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with Relay(pg):
        for count in range(1, 6):
            hints = Hints(pg)
            for pid in listeners(pg):
                with pg.connect() as other:
                    other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 60000)")
            until(lambda: listeners(pg), "another", 60)
            assert hints.wait(1)[0]  # whatever it was
            create_in(pg)
            hints.wait(2)
            recorder.wait(lambda types, count=count: len(types) == count, 60)  # type: ignore[misc]
    assert [record.levelname for record in caplog.records if record.levelno >= 30] == []


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that a test may crash."""
    server = start_own_server()
    yield server
    server.stop()


@pytest.mark.parametrize("started", [False, True])
def test_a_listener_ends_before_it_has_begun(started: bool, pg: sa.Engine) -> None:
    mine = Listener(pg, ("jobkit", "jobkit_log"), lambda _: None)
    if started:
        mine.start()
    mine.notify(jobs=True)
    mine.stop()
    assert not mine._thread.is_alive()
    assert mine.link._connection is None


def test_a_server_that_crashes_and_comes_back_is_listened_to_again(own_server: Any, recorder: Recorder) -> None:
    engine = sa.create_engine(own_server.create_database())
    try:
        jobkit.migrations.upgrade(engine)
        with Relay(engine):
            listens(engine)
            create_in(engine)
            recorder.wait(lambda types: len(types) == 1, 60)
            own_server.crash()
            mine = running(engine)._listener
            assert mine is not None
            until(lambda: not mine.listening, "the loss", 60)
            own_server.start()
            engine.dispose()
            hints = Hints(engine)
            create_in(engine)
            hints.wait(1)
            recorder.wait(lambda types: len(types) == 2, 60)
    finally:
        engine.dispose()


def test_a_listening_connection_that_falls_silent_is_cut_and_holds_nothing_up(
    pg: sa.Engine, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HEARTBEAT", 0.1)
    with Proxy(pg.url.host or "", pg.url.port or 0) as proxy:
        far = sa.create_engine(pg.url.set(host="127.0.0.1", port=proxy.port), poolclass=sa.NullPool)
        mine = Feed(pg, DeliveredEvents(), "log")
        mine._listener = Listener(far, mine._statements.channels, mine._hint)
        mine.hurry(0.4)
        mine.start()
        try:
            for count in range(1, 4):
                until(lambda: mine._listener and mine._listener.listening, "LISTEN", 60)
                made = proxy.accepted
                proxy.stall()
                create_in(pg)
                recorder.wait(lambda types, count=count: len(types) == count, 60)  # type: ignore[misc]
                until(lambda made=made: proxy.accepted > made, "another connection", 60)  # type: ignore[misc]
            proxy.stall(new=True)
        finally:
            mine.close(20)
    until(lambda: not [t for t in threading.enumerate() if t.name in ("jobkit-listen", "jobkit-relay")], "the end", 60)


def test_where_listen_has_no_effect_the_connection_is_given_back(
    pg: sa.Engine, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a pooler that gives each transaction another connection."""
    monkeypatch.setattr(listener, "HEARTBEAT", 0.05)
    original, checked = Listener._check, threading.Event()

    def check(self: Listener) -> None:
        with self.link.use() as connection:
            connection.exec_driver_sql("UNLISTEN *")
        checked.set()
        original(self)

    monkeypatch.setattr(Listener, "_check", check)
    with Relay(pg):
        mine = running(pg)._listener
        assert mine is not None
        assert checked.wait(60)
        until(lambda: not mine.listening and mine.link._connection is None, "the end of listening", 60)
        assert mine._thread.is_alive()
        create_in(pg)
        recorder.wait(lambda types: len(types) == 1, 60)


def test_a_process_has_one_listening_connection_outside_the_pool_and_none_afterwards(
    postgres_database: Database, recorder: Recorder
) -> None:
    engine = postgres_database.connect(pool_size=2, max_overflow=0, pool_timeout=5)
    with Relay(engine), Relay(engine), Relay(postgres_database.connect()):
        listens(engine)
        assert len(listeners(postgres_database.engine)) == 1
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT 1").scalar_one() == 1
            assert engine.pool.checkedout() == 2  # type: ignore[attr-defined]
    until(lambda: listeners(postgres_database.engine) == [], "no listener", 60)
