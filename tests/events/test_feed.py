"""The feed: nothing is skipped, nothing comes twice, and one job's events come in order, however commits interleave."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobStore, Relay, Runner
from jobkit.base.clock import utcnow
from jobkit.db.dialects.base import EventRow, Position, Start
from jobkit.db.dialects.postgresql import Postgresql
from jobkit.events import feed
from jobkit.events import log as bookmark
from jobkit.events.feed import Feed
from jobkit.events.log import DeliveredEvents, LogReader
from jobkit.tables import content_job_events
from tests.support.databases import Database
from tests.support.recorder import Recorder
from tests.support.runners import only, until

Create = Callable[..., jobkit.Job]


@pytest.fixture
def pg(postgres_database: Database) -> sa.Engine:
    return postgres_database.engine


@pytest.fixture
def by_hand(engine: sa.Engine) -> Iterator[Feed]:
    """A feed without its thread: the test says when it scans."""
    made = Feed(engine, DeliveredEvents(), "log")
    yield made
    made._link.close()


def taking_a_number(session: Session) -> Session:
    """Begin the transaction's writing: PostgreSQL numbers it now."""
    session.execute(sa.text("SELECT pg_current_xact_id()"))
    return session


def row(number: int, seq: int = 1) -> EventRow:
    return EventRow(number, 0, seq, "acme", "content_job.queued", uuid4(), utcnow(), {})


# --- the cursor on PostgreSQL


class ById(Postgresql):
    """Planted: the cursor is the id."""

    def scan(self, connection: sa.Connection, after: Position, start: Start, limit: int) -> Any:
        found = sa.select(content_job_events).where(content_job_events.c.id > after.id)
        rows = connection.execute(found.order_by(content_job_events.c.id)).all()
        events = [EventRow(r.id, 1, r.seq, r.company_id, r.type, r.job_id, r.created_at, r.payload) for r in rows]
        return events, Position(1, events[-1].id) if events else after


class ByIdBelowTheHorizon(ById):
    """Planted: the cursor is the id, of transactions below the horizon."""

    def scan(self, connection: sa.Connection, after: Position, start: Start, limit: int) -> Any:
        horizon = connection.execute(
            sa.text("SELECT CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)")
        ).scalar_one()
        events, _ = super().scan(connection, after, start, limit)
        numbers = dict(
            connection.execute(sa.text("SELECT id, CAST(CAST(xid AS text) AS bigint) FROM content_job_events")).all()
        )
        below = [event for event in events if numbers[event.id] < horizon]
        return below, Position(1, below[-1].id) if below else after


def late_commit(engine: sa.Engine, look: Callable[[], None]) -> int:
    """The smaller event id is committed last."""
    with Session(engine) as slow, Session(engine) as quick:
        JobStore(slow).create("acme", job_type="slow")
        JobStore(quick).create("acme", job_type="quick")
        quick.commit()
        look()
        slow.commit()
    return 2


def late_commit_of_a_late_number(engine: sa.Engine, look: Callable[[], None]) -> int:
    """The smaller event id is committed last, and by the younger transaction."""
    with Session(engine) as old, Session(engine) as young:
        taking_a_number(old)
        JobStore(young).create("acme", job_type="young")
        JobStore(old).create("acme", job_type="old")
        old.commit()
        look()
        young.commit()
    return 2


def early_number_late_event(engine: sa.Engine, look: Callable[[], None]) -> int:
    """The oldest transaction appends and commits last; a third one is open all the time."""
    with Session(engine) as old, Session(engine) as young, Session(engine) as idle:
        taking_a_number(old)
        taking_a_number(idle)
        JobStore(young).create("acme", job_type="young")
        young.commit()
        look()
        JobStore(old).create("acme", job_type="old")
        old.commit()
        look()
    return 2


def numbers_turned_round(engine: sa.Engine, look: Callable[[], None]) -> int:
    """The older transaction has the greater event id, and both are seen at once."""
    with Session(engine) as old, Session(engine) as young:
        taking_a_number(old)
        JobStore(young).create("acme", job_type="young")
        JobStore(old).create("acme", job_type="old")
        young.commit()
        old.commit()
    look()
    return 2


def rolled_back(engine: sa.Engine, look: Callable[[], None]) -> int:
    with Session(engine) as lost, Session(engine) as kept:
        JobStore(lost).create("acme", job_type="lost")
        JobStore(kept).create("acme", job_type="kept")
        kept.commit()
        look()
        lost.rollback()
    return 1


INTERLEAVINGS = [
    late_commit,
    late_commit_of_a_late_number,
    early_number_late_event,
    numbers_turned_round,
    rolled_back,
]


def heard(engine: sa.Engine, statements: Postgresql, interleaving: Any, batch: int = 500) -> tuple[list[str], int]:
    """What a reader with these statements gets, looking whenever the interleaving says so, and how many are right."""
    ids: list[str] = []
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        start = statements.start(connection)
        position = start.position

        def look() -> None:
            nonlocal position
            rows: list[Any] = [None] * batch
            while len(rows) == batch:
                rows, position = statements.scan(connection, position, start, batch)
                ids.extend(str(row.job_id) for row in rows)

        committed = interleaving(engine, look)
        look()
    return ids, committed


@pytest.mark.parametrize("batch", [1, 500])
@pytest.mark.parametrize("interleaving", INTERLEAVINGS)
def test_a_scan_skips_nothing_and_repeats_nothing(pg: sa.Engine, interleaving: Any, batch: int) -> None:
    ids, committed = heard(pg, Postgresql(), interleaving, batch)
    assert (len(ids), len(set(ids))) == (committed, committed)


@pytest.mark.parametrize(
    ("naive", "interleaving"), [(ById, late_commit), (ByIdBelowTheHorizon, late_commit_of_a_late_number)]
)
def test_the_interleavings_catch_a_naive_cursor(pg: sa.Engine, naive: type[Postgresql], interleaving: Any) -> None:
    ids, committed = heard(pg, naive(), interleaving)
    assert len(set(ids)) < committed


@pytest.mark.parametrize("interleaving", INTERLEAVINGS)
def test_a_relay_tells_every_committed_event_once(pg: sa.Engine, interleaving: Any, recorder: Recorder) -> None:
    with Relay(pg):
        committed = interleaving(pg, lambda: None)
        recorder.wait(lambda types: len(types) == committed)
    assert len(recorder.events) == committed


def test_foreign_events_wait_for_the_oldest_writer_and_own_ones_do_not(
    pg: sa.Engine, disk: AssetStore, recorder: Recorder, postgres_database: Database
) -> None:
    writer = postgres_database.connect()
    with Runner(pg, AssetStore(disk.storage.root), only(), poll_interval=0.05) as runner, Session(writer) as open_one:
        taking_a_number(open_one)
        with Session(writer) as session, session.begin():
            foreign = JobStore(session).create("acme", job_type="by hand")
            JobStore(session).transition(foreign.id, status="cancelled")
        own = runner.submit("acme", job_type="note")
        recorder.wait(lambda _: recorder.types(own.id) == ["queued", "running", "done"])
        assert recorder.types(foreign.id) == []
        open_one.commit()
        recorder.wait(lambda _: recorder.types(foreign.id) == ["queued", "cancelled"])
    assert len(recorder.events) == 5


@pytest.fixture
def disk(tmp_path: Any) -> AssetStore:
    return AssetStore(tmp_path / "assets")


# --- the order within a job


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("restored", [True, False])
def test_seq_restores_the_order_that_transaction_numbers_turn_round(
    between: bool, restored: bool, pg: sa.Engine, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``between``: the horizon lies between the two. ``restored=False`` plants its absence."""
    if not restored:
        monkeypatch.setattr(feed, "in_order", list)
        monkeypatch.setattr(LogReader, "earlier", lambda *_, **__: [])
    with Session(pg) as session, session.begin():
        job = JobStore(session).create("acme", job_type="note")
    with Relay(pg), Session(pg) as idle, Session(pg) as old, Session(pg) as young:
        if not between:
            taking_a_number(idle)
        taking_a_number(old)
        if between:
            taking_a_number(idle)
        JobStore(young).transition(job.id, status="running")
        young.commit()
        JobStore(old).transition(job.id, status="failed")
        old.commit()
        if between:
            recorder.wait(lambda types: "failed" in types)
        idle.commit()
        recorder.wait(lambda types: len(types) == 2)
    assert (recorder.types() == ["running", "failed"]) is restored


# --- scan and offer meet


def test_an_event_that_the_scan_told_before_it_was_offered_comes_once(
    engine: sa.Engine, disk: AssetStore, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Feed.publish

    def late(self: Feed, rows: Any) -> bool:
        told = {row.id for row in rows}
        until(lambda: told <= {event.id for event in recorder.events}, "the scan")
        until(lambda: not told & self._reader.position.delivered_ahead)
        return original(self, rows)

    monkeypatch.setattr(Feed, "publish", late)
    with Runner(engine, disk, only()) as runner:
        jobs = [runner.submit("acme", job_type="note") for _ in range(3)]
        recorder.wait(lambda types: types.count("done") == 3)
        runner.run_until_idle(timeout=60)
    assert [recorder.types(job.id) for job in jobs] == [["queued", "running", "done"]] * 3


def test_where_nobody_notifies_jobs_of_others_are_looked_for_often_after_one_though_nobody_listens(
    sqlite_database: Database,
) -> None:
    alone = Feed(sqlite_database.engine, DeliveredEvents(), "log")
    alone._scan()
    assert alone._next_scan - alone._last_scan == pytest.approx(feed.IDLE_SQLITE_POLL)
    with sqlite_database.connect().begin() as connection:
        JobStore(connection).create("acme", job_type="note")
    alone._scan()
    assert alone._next_scan - alone._last_scan == pytest.approx(feed.ACTIVE_SQLITE_POLL)
    alone._link.close()


def test_an_event_that_was_offered_is_skipped_by_the_scan(by_hand: Feed, create: Create, recorder: Recorder) -> None:
    jobs = [create() for _ in range(3)]
    rows, _ = by_hand._ask(by_hand._statements.scan, by_hand.cursor, by_hand._reader.position.start, 500)
    by_hand._deliver_own(rows[1:2])
    assert [event.job_id for event in recorder.events] == [jobs[1].id]
    by_hand._scan()
    assert [event.job_id for event in recorder.events] == [jobs[1].id, jobs[0].id, jobs[2].id]
    assert by_hand._reader.position.delivered_ahead == set()


def test_a_scan_after_a_scan_tells_nothing_again(
    engine: sa.Engine, by_hand: Feed, create: Create, recorder: Recorder
) -> None:
    job = create()
    with engine.begin() as connection:
        JobStore(connection).transition(job.id, status="cancelled")
    for _ in range(3):
        by_hand._scan()
    assert recorder.types() == ["queued", "cancelled"]


def test_a_cursor_is_a_position_below_which_nothing_is_missing(
    by_hand: Feed, create: Create, recorder: Recorder
) -> None:
    create()
    by_hand._scan()
    create()
    by_hand._scan()
    cursor = Position(*map(int, recorder.events[-1].cursor.split("-")))
    rows, _ = by_hand._ask(by_hand._statements.scan, cursor, by_hand._reader.position.start, 500)
    assert recorder.events[-1].id in {row.id for row in rows}


# --- what is remembered


def test_ten_thousand_events_that_nobody_hears_leave_nothing(by_hand: Feed) -> None:
    by_hand.start()
    by_hand.publish([row(number) for number in range(1, 10_001)])
    assert by_hand.flush(20)
    by_hand.close(20)
    left = (
        by_hand._reader.position.delivered_ahead,
        by_hand._reader.position._last,
        by_hand._own._waiting,
        by_hand._reader.history.events._seen,
    )
    assert [len(each) for each in left] == [0, 0, 0, 0]


def test_what_is_remembered_of_jobs_and_events_is_bounded(
    by_hand: Feed, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bookmark, "REMEMBERED_JOBS", 10)
    monkeypatch.setattr(bookmark, "REMEMBERED_EVENTS", 20)
    by_hand._deliver_own([row(number) for number in range(1, 101)])
    assert len(recorder.events) == 100
    assert (len(by_hand._reader.position._last), len(by_hand._reader.history.events._seen)) == (10, 20)


def test_what_was_told_ahead_is_forgotten_once_scanned(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    with Runner(engine, disk, only(), concurrency=8) as runner:
        for _ in range(100):
            create()
        runner.run_until_idle(timeout=60)
        running = jobkit.events.relay.running_feed(engine)
        assert running is not None
        until(lambda: not running._reader.position.delivered_ahead, "an empty set of events told ahead")
    assert len(recorder.events) == 300


def test_events_of_a_time_when_nobody_listened_are_owed_to_nobody(by_hand: Feed, create: Create) -> None:
    create()
    by_hand._scan()
    with Recorder() as late:
        by_hand._scan()
        job = create()
        by_hand._scan()
        assert [event.job_id for event in late.events] == [job.id]


def test_more_events_than_a_batch_come_all_and_in_order(
    engine: sa.Engine, by_hand: Feed, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BATCH", 7)
    with Session(engine) as session, session.begin():
        jobs = [JobStore(session).create("acme", job_type="note") for _ in range(50)]
    looks = 1
    while not by_hand._scan():
        looks += 1
    assert looks == 8
    assert [event.job_id for event in recorder.events] == [job.id for job in jobs]


def test_ids_are_not_used_again_after_the_log_was_pruned(
    engine: sa.Engine, by_hand: Feed, create: Create, recorder: Recorder
) -> None:
    create()
    by_hand._scan()
    with engine.begin() as connection:
        connection.execute(content_job_events.delete())
    job = create()
    by_hand._scan()
    assert [event.job_id for event in recorder.events][1:] == [job.id]


# --- trouble


def test_while_the_log_cannot_be_read_own_events_wait_rather_than_overtake(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []
    earlier, scan = LogReader.earlier, Feed._scan

    def unreadable(method: Any) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            if len(failures) < 3:
                failures.append(1)
                raise sa.exc.OperationalError("SELECT", {}, OSError("gone"))
            return method(self, *args, **options)

        return call

    with Runner(engine, disk, only(), poll_interval=0.01) as runner:
        monkeypatch.setattr(LogReader, "earlier", unreadable(earlier))
        monkeypatch.setattr(Feed, "_scan", unreadable(scan))
        jobs = [create() for _ in range(3)]
        recorder.wait(lambda types: types.count("done") == 3)
        runner.run_until_idle(timeout=60)
    assert [recorder.types(job.id) for job in jobs] == [["queued", "running", "done"]] * 3


def test_the_feed_survives_a_lost_connection_and_says_so_once(
    pg: sa.Engine, postgres_database: Database, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "jobkit"), Relay(pg):
        for number in range(1, 4):
            terminate_others(postgres_database)
            with Session(pg) as session, session.begin():
                job = JobStore(session).create("acme", job_type="note")
            recorder.wait(lambda types, number=number: len(types) == number)
            assert recorder.events[-1].job_id == job.id
    errors = [record for record in caplog.records if "could not be read" in record.message]
    assert 1 <= len(errors) <= 3


def terminate_others(database: Database) -> None:
    database.engine.dispose()
    with database.connect(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
