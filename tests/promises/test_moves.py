"""A log that comes to another server, by dump, COPY, replication, promotion: nothing is told again, nothing missed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Job, JobStore, Relay, Runner, prune, sse
from jobkit.db.logs import log_of
from jobkit.events import relay
from jobkit.events.log import DeliveredEvents
from jobkit.tables import content_job_epochs, content_job_events
from tests.support.databases import PostgresDatabase
from tests.support.moves import WAYS, numbered, spend
from tests.support.postgres import QUICK, OwnServer, Standby, start_own_server
from tests.support.proxy import Proxy
from tests.support.recorder import Recorder
from tests.support.runners import only
from tests.support.sse import Message, Parser


@pytest.fixture(scope="module")
def old() -> Iterator[OwnServer]:
    server = start_own_server((*QUICK, "wal_level=logical"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def new() -> Iterator[OwnServer]:
    server = start_own_server()
    yield server
    server.stop()


@pytest.fixture
def reborn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What follows happens in a process that knows nothing of what was told before."""
    return lambda: monkeypatch.setattr(relay._shared, "delivered", DeliveredEvents())


@contextmanager
def engine_of(url: str) -> Iterator[sa.Engine]:
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


@contextmanager
def migrated(server: OwnServer) -> Iterator[PostgresDatabase]:
    with closing(PostgresDatabase(server, None)) as database:
        jobkit.migrations.upgrade(database.engine)
        yield database


def create(engine: sa.Engine, kind: str = "note") -> Job:
    with Session(engine) as session, session.begin():
        return JobStore(session).create("acme", job_type=kind)


def cancel(engine: sa.Engine, job: Job) -> None:
    with Session(engine) as session, session.begin():
        JobStore(session).cancel(job.id)


def heard(recorder: Recorder) -> list[tuple[Any, str]]:
    return [(event.job_id, event.type.removeprefix("content_job.")) for event in recorder.events]


def queued(*jobs: Job) -> list[tuple[Any, str]]:
    return [(job.id, "queued") for job in jobs]


def streamed(engine: sa.Engine, job: Callable[[], Job], last_event_id: str | None = None) -> list[Message]:
    """What a company's stream gives from its head to the event of ``job``, which is created once it is open."""
    parser, messages = Parser(), []
    with closing(sse.stream(engine, "acme", last_event_id=last_event_id)) as stream:
        messages += parser.feed(next(stream))
        awaited = str(job().id)
        for piece in stream:
            messages += parser.feed(piece)
            if any(awaited in str(message.data) for message in messages):
                return messages
    return messages


def numbers(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return list(
            connection.execute(sa.select(content_job_events.c.xid).where(content_job_events.c.seq > 0)).scalars()
        )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.__name__))
def test_on_a_younger_server_nothing_is_told_again_and_nothing_is_missed(
    way: Callable[..., None],
    old: OwnServer,
    new: OwnServer,
    recorder: Recorder,
    reborn: Callable[[], None],
    tmp_path: Path,
) -> None:
    spend(old.url, numbered(new.url) + 1_000)
    with migrated(old) as source, closing(PostgresDatabase(new, None)) as target:
        with Relay(source.engine):
            ended, *jobs = [create(source.engine) for _ in range(4)]
            cancel(source.engine, ended)
            recorder.wait(lambda types: len(types) == 5)
        assert prune(source.engine, older_than=0, dry_run=False).jobs == 1
        create(source.engine)  # so that a cursor of now is beyond the mark
        with Relay(source.engine):
            last = create(source.engine)
            recorder.wait(lambda types: len(types) == 6)
        cursor, first_cursor = recorder.events[-1].cursor, recorder.events[0].cursor
        way(source.url, old, target.url, new)
        engine = target.engine
        assert min(numbers(engine)) > numbered(new.url)  # it is younger
        early = create(engine)  # by a host, before anybody reads
        reborn()
        recorder.events.clear()
        with Relay(engine):
            fresh = [create(engine)]
            recorder.wait(lambda types: len(types) == 1)
            after = recorder.events[0].cursor
            spend(new.url, numbered(old.url) + 100)
            fresh.append(create(engine))
            recorder.wait(lambda types: len(types) == 2)
        assert heard(recorder) == queued(*fresh)
        assert [m.type for m in streamed(engine, lambda: fresh.append(create(engine)) or fresh[-1])] == ["queued"]
        reborn()
        recorder.events.clear()
        with Relay(engine, after=after):  # a cursor that the new server gave, above no mark of the old one
            fresh.append(create(engine))
            recorder.wait(lambda types: len(types) == 4)
        assert heard(recorder) == queued(*fresh)
        reborn()
        recorder.events.clear()
        with Relay(engine, after=cursor):  # one that the old server gave
            fresh.append(create(engine))
            recorder.wait(lambda _: (fresh[-1].id, "queued") in heard(recorder))
        assert heard(recorder) == queued(last, early, *fresh)
        with pytest.raises(jobkit.errors.EventsPruned):
            Relay(engine, after=first_cursor).start()
        recorder.events.clear()
        assert len(jobs) == 3
        with Runner(engine, AssetStore(tmp_path / "assets"), only()):
            recorder.wait(lambda types: types.count("done") == 4 + 1 + 1 + len(fresh))
        assert set(recorder.types()) == {"running", "done"}


def test_a_log_that_goes_on_from_server_to_server_keeps_every_cursor(
    old: OwnServer, new: OwnServer, recorder: Recorder, reborn: Callable[[], None]
) -> None:
    """There and back, which is onto a server that is older than the log."""
    spend(old.url, numbered(new.url) + 1_000)
    way = WAYS[0]
    with (
        migrated(old) as source,
        closing(PostgresDatabase(new, None)) as there,
        closing(PostgresDatabase(old, None)) as back,
    ):
        cursors, jobs = [], []
        for database, onto in ((source, there), (there, back), (back, None)):
            reborn()
            with Relay(database.engine):
                count = len(recorder.events)
                jobs += [create(database.engine), create(database.engine)]
                recorder.wait(lambda types, count=count: len(types) == count + 2)  # type: ignore[misc]
                cursors.append(recorder.events[count].cursor)
            if onto is there:
                way(database.url, old, onto.url, new)
            elif onto is back:
                way(database.url, new, onto.url, old)
        for place, cursor in enumerate(cursors):
            reborn()
            recorder.events.clear()
            with Relay(back.engine, after=cursor):
                recorder.wait(lambda types, place=place: len(types) == 6 - 2 * place)  # type: ignore[misc]
            assert heard(recorder) == queued(*jobs[2 * place :])
        with back.engine.connect() as connection:
            epochs = connection.execute(sa.select(content_job_epochs.c.epoch).order_by(content_job_epochs.c.epoch))
            assert epochs.scalars().all() == [0, 1, 2]


def test_a_restore_on_the_same_server_is_no_move(
    old: OwnServer, recorder: Recorder, reborn: Callable[[], None]
) -> None:
    with migrated(old) as source, closing(PostgresDatabase(old, None)) as target:
        with Relay(source.engine):
            jobs = [create(source.engine), create(source.engine)]
            recorder.wait(lambda types: len(types) == 2)
        cursor = recorder.events[0].cursor
        WAYS[0](source.url, old, target.url, old)
        before = numbers(target.engine)
        reborn()
        recorder.events.clear()
        for _ in range(2):
            with Relay(target.engine, after=cursor):
                recorder.wait(lambda types: len(types) == 2)
            target.engine.dispose()
        assert heard(recorder) == queued(*jobs)
        assert numbers(target.engine) == before


# --- a copy of the server that takes its place


@pytest.fixture
def primary() -> Iterator[OwnServer]:
    server = start_own_server()
    yield server
    server.stop()


@contextmanager
def promoted(standby: Standby) -> Iterator[Standby]:
    standby.promote()
    try:
        yield standby
    finally:
        standby.stop()


def on(server: OwnServer, url: str) -> str:
    return sa.make_url(url).set(port=server.port).render_as_string(hide_password=False)


def test_a_promoted_standby_that_lacks_the_last_events_refuses_older_cursors_and_tells_nothing_again(
    primary: OwnServer, recorder: Recorder, reborn: Callable[[], None]
) -> None:
    with migrated(primary) as database:
        with Relay(database.engine):
            create(database.engine)
            recorder.wait(lambda types: len(types) == 1)
            standby = Standby(primary)
            for count in range(2, 12):
                create(database.engine)  # lost
                recorder.wait(lambda types, count=count: len(types) == count)  # type: ignore[misc]
        cursors = [recorder.events[0].cursor, recorder.events[-1].cursor]
        last = numbered(primary.url)
        with promoted(standby), engine_of(on(standby, database.url)) as engine:
            unread = create(engine)
            reborn()
            recorder.events.clear()
            with Relay(engine):
                fresh = create(engine)
                recorder.wait(lambda types: len(types) == 1)
            assert heard(recorder) == queued(fresh)
            after = recorder.events[0].cursor
            for cursor in cursors:
                with pytest.raises(jobkit.errors.EventsPruned):
                    Relay(engine, after=cursor).start()
            spend(standby.url, last + 100)
            for cursor in cursors:
                with pytest.raises(jobkit.errors.EventsPruned):
                    Relay(engine, after=cursor).start()
                again = streamed(engine, lambda: create(engine), cursor)
                assert [message.type for message in again] == ["resync", "queued"]
            reborn()
            recorder.events.clear()
            with Relay(engine, after=after):
                recorder.wait(lambda types: len(types) == 3)
            assert unread.id not in {event.job_id for event in recorder.events}


@contextmanager
def through(proxy: Proxy, database: PostgresDatabase) -> Iterator[sa.Engine]:
    with engine_of(sa.make_url(database.url).set(port=proxy.port).render_as_string(hide_password=False)) as engine:
        yield engine


def test_a_relay_that_runs_when_a_standby_takes_over_misses_nothing_there_and_repeats_nothing(
    primary: OwnServer, recorder: Recorder
) -> None:
    with migrated(primary) as database, Proxy("127.0.0.1", primary.port) as proxy, through(proxy, database) as engine:
        running = Relay(engine).start()
        kept = [create(database.engine), create(database.engine)]
        recorder.wait(lambda types: len(types) == 2)
        standby, lost = Standby(primary), []
        for count in range(3, 23):
            lost.append(create(database.engine))
            recorder.wait(lambda types, count=count: len(types) == count)  # type: ignore[misc]
        with promoted(standby), engine_of(on(standby, database.url)) as direct:
            # In the numbers that the primary had given to what is lost.
            fresh = [create(direct) for _ in range(3)]
            assert numbered(standby.url) < numbered(primary.url)
            proxy.turn("127.0.0.1", standby.port)
            recorder.wait(lambda types: len(types) == 25)
            cancel(direct, kept[1])
            fresh.append(create(direct))
            recorder.wait(lambda types: len(types) == 27)
            running.stop()
            engine.dispose()
        told = [*queued(*kept, *lost, *fresh[:3]), (kept[1].id, "cancelled"), *queued(fresh[3])]
        assert heard(recorder) == told


def test_a_stream_that_has_to_read_on_after_a_takeover_begins_anew_and_says_so(primary: OwnServer) -> None:
    with migrated(primary) as database, Proxy("127.0.0.1", primary.port) as proxy, through(proxy, database) as engine:
        stream, parser = sse.stream(engine, "acme", keep_alive=0.5), Parser()

        def take() -> list[Message]:
            """What comes next, but for silence."""
            deadline, taken = time.monotonic() + 60, []
            while not taken:
                assert time.monotonic() < deadline
                taken += parser.feed(next(stream))
            return taken

        next(stream)
        next(stream)
        create(database.engine)
        messages = take()
        assert [message.type for message in messages] == ["queued"]
        with promoted(Standby(primary)) as standby, engine_of(on(standby, database.url)) as direct:
            proxy.turn("127.0.0.1", standby.port)
            engine.dispose()
            log_of(direct)  # whoever comes first writes down that the log is on another server
            stream._session._source._follower._mark_missed()  # type: ignore[union-attr]
            messages = take()
            assert [(message.event, message.data) for message in messages] == [("resync", {"reason": "pruned"})]
            job = create(direct)
            messages += take()
            assert [message.type for message in messages] == ["resync", "queued"]
            assert str(job.id) in str(messages[-1].data)
            stream.close()
            engine.dispose()


# --- who may know, and who may write


def test_a_role_that_may_not_write_is_told_what_to_do_and_goes_on_when_it_is_done(
    old: OwnServer, new: OwnServer
) -> None:
    spend(old.url, numbered(new.url) + 1_000)
    with migrated(old) as source, closing(PostgresDatabase(new, None)) as target:
        create(source.engine)
        WAYS[1](source.url, old, target.url, new)
        reader = target.connect(connect_args={"options": "-c default_transaction_read_only=on"})
        with pytest.raises(jobkit.ConfigurationError, match=r"another server.*run jobkit migrate"):
            Relay(reader).start()
        with Relay(target.engine):
            pass
        with Relay(reader):
            pass


def test_whoever_may_not_know_the_cluster_has_a_log_all_the_same(
    postgres_database: PostgresDatabase, recorder: Recorder
) -> None:
    role = f"guest_{sa.make_url(postgres_database.url).database}"
    functions = ("pg_control_system()", "pg_walfile_name(pg_lsn)")
    with postgres_database.engine.begin() as connection:
        for function in functions:
            connection.exec_driver_sql(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
        connection.exec_driver_sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    guest = sa.create_engine(sa.make_url(postgres_database.url).set(username=role))
    try:
        with Relay(guest):
            job = create(guest)
            recorder.wait(lambda types: len(types) == 1)
        assert heard(recorder) == queued(job)
    finally:
        guest.dispose()
        with postgres_database.engine.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_two_that_come_at_once_write_it_down_once(old: OwnServer, new: OwnServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    spend(old.url, numbered(new.url) + 1_000)
    with migrated(old) as source, closing(PostgresDatabase(new, None)) as target:
        with Relay(source.engine):
            jobs = [create(source.engine) for _ in range(20)]
        positions = numbers(source.engine)
        WAYS[0](source.url, old, target.url, new)
        engines = [target.connect() for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            for started in [pool.submit(Relay(engine).start) for engine in engines]:
                started.result(60).stop()
        shift = 1 << 48
        assert sorted(numbers(target.engine)) == sorted(xid - shift for xid in positions)
        assert len(jobs) == 20
