"""Replays: after a cursor comes everything, once, in order per job, however the process that had it ended."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobEvent, JobStore, Relay, signals
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import Position
from jobkit.db.dialects.postgresql import Postgresql
from jobkit.events import feed, relay
from jobkit.events.log import DeliveredEvents
from jobkit.tables import content_job_events
from tests.events.test_feed import ById, ByIdBelowTheHorizon, taking_a_number
from tests.support.databases import Database, SqliteDatabase
from tests.support.recorder import Recorder
from tests.support.runners import until

Create = Callable[..., jobkit.Job]
BEGINNING = "1-0"


@pytest.fixture
def reborn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What follows happens in a process that knows nothing of what was told before."""
    return lambda: monkeypatch.setattr(relay._shared, "delivered", DeliveredEvents())


def cancel(engine: sa.Engine, job: jobkit.Job) -> None:
    with engine.begin() as connection:
        JobStore(connection).cancel(job.id)


def logged(engine: sa.Engine) -> dict[int, tuple[UUID, int]]:
    c = content_job_events.c
    with engine.connect() as connection:
        return {row.id: (row.job_id, row.seq) for row in connection.execute(sa.select(c.id, c.job_id, c.seq))}


# --- a process that is killed and begins again


class Writers:
    """Threads that create, start and end jobs; on PostgreSQL a third of the transactions are numbered long before they
    write.
    """

    def __init__(self, database: Database, jobs: int) -> None:
        self._database, self._jobs = database, jobs
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(3)]
        self.errors: list[BaseException] = []

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
        assert not self.errors, self.errors

    def _work(self, seed: int) -> None:
        engine, chance = self._database.connect(), random.Random(seed)
        try:
            for number in range(self._jobs):
                with Session(engine) as early:
                    if engine.dialect.name == "postgresql" and chance.random() < 0.3:
                        taking_a_number(early)
                    with Session(engine) as session, session.begin():
                        job = JobStore(session).create(f"c{number % 3}", job_type="note")
                    with Session(engine) as session, session.begin():
                        JobStore(session).transition(job.id, status="running")
                    JobStore(early).transition(job.id, status=chance.choice(["failed", "cancelled"]))
                    early.commit()
        except BaseException as error:
            self.errors.append(error)


def lines(file: Path) -> list[list[str]]:
    """What was written whole."""
    text = file.read_text() if file.exists() else ""
    return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]


def test_a_subscriber_that_is_killed_and_begins_again_at_its_cursor_hears_everything_in_order(
    database: Database, tmp_path: Path
) -> None:
    file, script = tmp_path / "heard", Path(__file__).parents[1] / "support" / "subscriber.py"
    chance, cursor, lives = random.Random(1), BEGINNING, 0

    def subscriber() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), database.url, str(file), cursor])

    def complete() -> bool:
        heard = {int(line[0]) for line in lines(file)}
        return bool(heard) and heard == logged(database.engine).keys()

    with Writers(database, 30) as writers:
        while lives < 5:
            before, process = len(lines(file)), subscriber()
            try:
                enough = before + chance.randrange(1, 40)
                until(lambda enough=enough: len(lines(file)) >= enough or complete(), "more events", 60)  # type: ignore[misc]
            finally:
                process.kill()
                process.wait()
            cursor, lives = lines(file)[-1][3], lives + 1
        writers.join()
    process = subscriber()
    try:
        until(complete, "every event", 60)
    finally:
        process.kill()
        process.wait()
    told = list(dict.fromkeys(tuple(line[:3]) for line in lines(file)))
    assert {int(number): (UUID(job), int(seq)) for number, job, seq in told} == logged(database.engine)
    seqs: dict[str, list[int]] = {}
    for _, job, seq in told:
        seqs.setdefault(job, []).append(int(seq))
    assert len(seqs) == 90
    assert {tuple(found) for found in seqs.values()} == {(1, 2, 3)}


def test_each_cursor_is_the_place_below_which_nothing_is_missing(
    engine: sa.Engine, recorder: Recorder, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BATCH", 7)
    jobs = [create() for _ in range(20)]
    for job in reversed(jobs):
        cancel(engine, job)
    with Relay(engine, after=BEGINNING):
        recorder.wait(lambda types: len(types) == 40)
    statements = statements_for(engine)
    ids = [event.id for event in recorder.events]
    for number, event in enumerate(recorder.events):
        with engine.connect() as connection:
            after = Position.parse(event.cursor)
            rows, _ = statements.scan(connection, after, statements.start_after(after), 500)
        # No more is repeated than had to be: this event is the first one told that the cursor does not cover.
        assert {row.id for row in rows} == set(ids[number:])


# --- a feed that is there already


def test_a_replay_tells_what_the_process_has_not_told_and_nothing_twice(
    engine: sa.Engine, recorder: Recorder, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BATCH", 7)
    missed = [create() for _ in range(20)]
    with Relay(engine):
        heard = create()
        cancel(engine, missed[0])
        recorder.wait(lambda types: len(types) == 2)
        with Relay(engine, after=BEGINNING), Relay(engine, after=BEGINNING):
            recorder.wait(lambda types: len(types) == 22)
            last = create()
            recorder.wait(lambda _: recorder.types(last.id) == ["queued"])
    assert [event.job_id for event in recorder.events[:2]] == [heard.id, missed[0].id]
    assert [event.job_id for event in recorder.events[2:]] == [*(job.id for job in missed), last.id]
    assert len({event.id for event in recorder.events}) == len(recorder.events) == 23


def test_a_later_relay_goes_on_where_the_process_left_off_and_repeats_nothing(
    engine: sa.Engine, recorder: Recorder, create: Create
) -> None:
    with Relay(engine):
        heard = create()
        recorder.wait(lambda types: len(types) == 1)
    missed = create()
    cancel(engine, heard)
    for _ in range(2):
        with Relay(engine, after=recorder.events[0].cursor):
            last = create()
            recorder.wait(lambda _, last=last: recorder.types(last.id) == ["queued"])  # type: ignore[misc]
    assert recorder.types(heard.id) == ["queued", "cancelled"]
    assert recorder.types(missed.id) == ["queued"]
    assert len({event.id for event in recorder.events}) == len(recorder.events) == 5


def test_who_connects_after_the_start_hears_the_replay_too(engine: sa.Engine, create: Create) -> None:
    job = create()
    with Relay(engine, after=BEGINNING):
        running = relay.running_feed(engine)
        assert running is not None
        scanned = running._last_scan
        until(lambda: running._last_scan > scanned, "a scan without receivers")
        with Recorder() as late:
            late.wait(lambda types: types == ["queued"])
        assert late.events[0].job_id == job.id


def test_a_database_that_was_made_anew_at_the_same_place_is_another_log(tmp_path: Path, recorder: Recorder) -> None:
    for _ in range(3):
        path = tmp_path / "host.db"
        for file in tmp_path.glob("host.db*"):
            file.unlink()
        database = SqliteDatabase(path)
        with database.engine.begin() as connection:
            job = JobStore(connection).create("acme", job_type="note")
        with Relay(database.engine, after=BEGINNING):
            recorder.wait(lambda _, job=job: recorder.types(job.id) == ["queued"])  # type: ignore[misc]
        database.close()
    assert len(recorder.events) == 3


@pytest.mark.parametrize("started", ["before", "by the replay"])
def test_what_was_committed_before_the_start_by_a_late_number_is_replayed_once_the_horizon_allows(
    started: str, postgres_database: Database, recorder: Recorder
) -> None:
    engine = postgres_database.engine

    def made() -> jobkit.Job:
        with Session(engine) as session, session.begin():
            return JobStore(session).create("acme", job_type="note")

    early = made()
    with Session(engine) as old:
        taking_a_number(old)
        beyond = made()  # beyond the horizon, and in the snapshot of a feed that begins now
        with Relay(engine, after=None if started == "before" else BEGINNING), Relay(engine, after=BEGINNING):
            recorder.wait(lambda _: recorder.types(early.id) == ["queued"])
            JobStore(old).create("acme", job_type="note")
            old.commit()
            recorder.wait(lambda types: len(types) == 3)
    assert recorder.types(beyond.id) == ["queued"]
    assert len({event.id for event in recorder.events}) == 3


# --- naive cursors


@pytest.mark.parametrize(("statements", "complete"), [(Postgresql, True), (ById, False), (ByIdBelowTheHorizon, False)])
def test_a_replay_after_a_naive_cursor_is_seen_to_miss_what_committed_late(
    statements: type[Postgresql],
    complete: bool,
    postgres_database: Database,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    reborn: Callable[[], None],
) -> None:
    monkeypatch.setitem(jobkit.db.dialects._KNOWN, "postgresql", statements())
    engine = postgres_database.engine
    with Session(engine) as old, Session(engine) as young:
        taking_a_number(old)
        with Relay(engine, after=BEGINNING):
            JobStore(young).create("acme", job_type="young")
            JobStore(old).create("acme", job_type="old")
            old.commit()
            recorder.wait(lambda types: len(types) == 1)
            running = relay.running_feed(engine)
            assert running is not None
            until(lambda: running.cursor > Position.parse(recorder.events[0].cursor), "the cursor to pass it")
            cursor = str(running.cursor)
            young.commit()
    reborn()
    recorder.events.clear()
    with Relay(engine, after=cursor), Session(engine) as session, session.begin():
        last = JobStore(session).create("acme", job_type="last")
        session.commit()
        recorder.wait(lambda _: recorder.types(last.id) == ["queued"])
    assert (len(recorder.events) == 2) is complete


# --- cursors that lead nowhere


def prune(engine: sa.Engine, upto: str) -> None:
    statements = statements_for(engine)
    with engine.begin() as connection:
        statements.mark_pruned(connection, Position.parse(upto))


@pytest.mark.parametrize("running", [False, True])
def test_a_cursor_older_than_the_log_or_of_another_log_is_refused_and_nothing_is_left(
    running: bool, engine: sa.Engine, recorder: Recorder, create: Create
) -> None:
    with Relay(engine):
        create()
        create()
        recorder.wait(lambda types: len(types) == 2)
    older, newer = (event.cursor for event in recorder.events)
    prune(engine, newer)
    prune(engine, older)  # a mark never moves back
    other = Relay(engine)
    if running:
        other.start()
    for cursor, reason in [(older, "removed"), (BEGINNING, "removed"), ("9000000000000000000-9", "another log")]:
        late = Relay(engine, after=cursor)
        with pytest.raises(jobkit.errors.EventsPruned, match=f"{cursor}.*{reason}"):
            late.start()
        late.stop()
    assert (relay.running_feed(engine) is not None) is running
    with Relay(engine, after=newer):
        pass
    other.stop()


@pytest.mark.parametrize("cursor", ["", "1", "1-", "a-b", "1-2-3", "-1-2", "1-2\n", "٣-1", 5, "1" * 20 + "-1"])
def test_what_is_not_a_cursor_is_a_value_error(engine: sa.Engine, cursor: Any) -> None:
    with pytest.raises(ValueError, match="not a cursor"):
        Relay(engine, after=cursor)


def test_events_that_were_removed_before_they_were_told_are_missed_aloud(
    engine: sa.Engine,
    recorder: Recorder,
    create: Create,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    entered, let_go = threading.Event(), threading.Event()

    def slow(_: str, *, event: JobEvent) -> None:
        entered.set()
        assert let_go.wait(60)

    with signals.content_job_queued.connected_to(slow), Relay(engine):
        create()
        assert entered.wait(60)
        with engine.connect() as connection:
            end = statements_for(engine).start(connection).position
        prune(engine, str(Position(end.xid + 1, end.id + 1)))
        monkeypatch.setattr(feed, "STALE", 0.0)
        let_go.set()
        until(lambda: "removed from the log before" in caplog.text)


def test_the_mark_of_a_pruned_log_is_no_event(engine: sa.Engine, recorder: Recorder, create: Create) -> None:
    prune(engine, BEGINNING)
    with Relay(engine, after=BEGINNING):
        job = create()
        recorder.wait(lambda types: len(types) == 1)
    assert [event.job_id for event in recorder.events] == [job.id]
