"""Event streams and those who read them: slow, gone, many, silent; a database that restarts, a server that stops."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import Job, JobRequest, JobStore, signals, sse
from jobkit.events import hub
from jobkit.events import watch as watching
from jobkit.events.follow import Follower
from jobkit.sse import streams
from jobkit.tables import content_job_events
from tests.support.databases import Database, PostgresDatabase
from tests.support.garbage import collected
from tests.support.postgres import OwnServer, Server
from tests.support.runners import until
from tests.support.sent import hearing
from tests.support.sse import SERVERS, Client, Message, Parser, Site, parsed

Create = Callable[..., Job]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with collected():
        yield
    until(released, "the end of every stream", 60)
    assert not signals.any_receivers()


def released() -> bool:
    return not (streams._sessions or hub.subscribers._subscribers)


@pytest.fixture(params=SERVERS)
def site(request: pytest.FixtureRequest, engine: sa.Engine) -> Iterator[Site]:
    with SERVERS[request.param](Site(engine)) as site:
        yield site


def move(engine: sa.Engine, job: Job, *statuses: str) -> None:
    for status in statuses:
        with Session(engine) as session, session.begin():
            JobStore(session).transition(job.id, status=status)


def many(engine: sa.Engine, number: int, company: str = "acme") -> None:
    """Create jobs in one transaction."""
    with Session(engine) as session, session.begin():
        JobStore(session).create_many(company, [JobRequest("note")] * number)


def logged(engine: sa.Engine) -> dict[int, tuple[str, int]]:
    c = content_job_events.c
    with engine.connect() as connection:
        found = connection.execute(sa.select(c.id, c.job_id, c.seq).where(c.company_id == "acme"))
        return {row.id: (str(row.job_id), row.seq) for row in found}


def ids(messages: list[Message]) -> list[int]:
    return [message.data["id"] for message in messages]


def begun(client: Client) -> Client:
    until(lambda: client.parser.last_event_id, "a cursor", 60)
    return client


# --- slow


def test_a_reader_that_does_not_read_holds_up_nobody_and_misses_nothing(
    site: Site, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    hear = Follower.hear

    def counted(self: Follower, event: Any) -> None:
        hear(self, event)
        most.append(len(self._heard))

    monkeypatch.setattr(Follower, "hear", counted)
    slow, parser = sse.stream(engine, "acme"), Parser()
    list(parser.feed(next(slow)))
    many(engine, 1)
    told = ids(list(parser.feed(next(slow))))
    with site.get("acme") as quick:
        begun(quick.follow())
        before = len(most)
        for _ in range(40):
            many(engine, 250)
        quick.has(10_000)
        until(lambda: len(most) == before + 20_000, "everything heard", 60)
        assert engine.pool.checkedout() <= 1  # type: ignore[attr-defined]  # the relay's
    assert max(most) == hub.MOST_WAITING
    while len(told) < 10_001:
        told += ids(list(parser.feed(next(slow))))
    many(engine, 1)
    told += ids(list(parser.feed(next(slow))))
    slow.close()
    assert (len(told), set(told)) == (10_002, logged(engine).keys())
    assert len(set(ids(quick.messages))) == len(quick.messages) == 10_000


def test_a_slow_reader_of_one_job_misses_nothing(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "MOST_WAITING", 5)
    monkeypatch.setattr(hub, "PAGE", 7)
    job = create()
    stream = sse.stream(engine, "acme", job.id)
    messages = parsed(next(stream), next(stream))
    for _ in range(20):
        move(engine, job, "running", "queued")
    move(engine, job, "done")
    messages += parsed(*stream)
    assert [m.data.get("type", "end").removeprefix("content_job.") for m in messages] == [
        "queued", *["running", "queued"] * 20, "done", "end",
    ]  # fmt: skip


# --- gone


def test_a_client_that_went_away_in_silence_is_noticed(site: Site, create: Create) -> None:
    site.options = {"keep_alive": 0.05}
    job = create()
    clients = [site.get("acme", job.id), site.get("acme")]
    until(lambda: len(hub.subscribers._subscribers) == 2, "two streams", 60)
    for client in clients:
        client.close()
    until(lambda: site.closed == site.opened == 2, "their end", 60)
    until(released, "their end", 60)
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("jobkit-")], "the end of their relay", 60)


@pytest.mark.parametrize("how", ["closed", "closed elsewhere", "dropped", "never begun"])
def test_whichever_way_a_stream_ends_it_holds_nothing(how: str, engine: sa.Engine, create: Create) -> None:
    for which in (create().id, None):
        stream = sse.stream(engine, "acme", which, keep_alive=60)
        if how != "never begun":
            next(stream), sse.end_all
        if how == "closed":
            stream.close()
            assert list(stream) == []
        elif how == "closed elsewhere":
            reader = threading.Thread(target=lambda stream=stream: list(stream), daemon=True)
            reader.start()
            until(lambda: hub.subscribers._subscribers, "a reader", 60)
            stream.close()
            reader.join(60)
            assert not reader.is_alive()
        del stream
        gc.collect()
        until(released, how, 60)


@pytest.mark.parametrize("how", ["cancelled", "closed", "closed elsewhere", "dropped"])
def test_whichever_way_an_asynchronous_stream_ends_it_holds_nothing(
    how: str, engine: sa.Engine, create: Create
) -> None:
    async def read(stream: sse.AsyncStream) -> None:
        async for _ in stream:
            pass

    async def story(which: Any) -> None:
        stream = await sse.astream(engine, "acme", which, keep_alive=60)
        reader = asyncio.ensure_future(read(stream))
        while not hub.subscribers._subscribers:
            await asyncio.sleep(0.005)
        if how == "cancelled":
            reader.cancel()
        elif how == "closed elsewhere":
            await stream.aclose()
        if how in ("cancelled", "closed elsewhere"):
            await asyncio.wait({reader}, timeout=60)
            assert reader.done()
        else:
            reader.cancel()
            await asyncio.wait({reader}, timeout=60)
            stream = await sse.astream(engine, "acme", which, keep_alive=60)
            await anext(stream)
            if how == "closed":
                await stream.aclose()
                assert [piece async for piece in stream] == []
        del stream, reader
        gc.collect()
        while not released():
            await asyncio.sleep(0.005)

    for which in (create().id, None):
        asyncio.run(asyncio.wait_for(story(which), 60))


# --- silent


def test_a_silent_stream_says_now_and_then_that_it_is_there(site: Site, create: Create) -> None:
    site.options = {"keep_alive": 0.02}
    with site.get("acme", create().id) as job, site.get("acme") as company:
        for client in (job.follow(), company.follow()):
            until(lambda client=client: client.parser.comments >= 3, "comments", 60)  # type: ignore[misc]
    assert [m.event for m in job.messages + company.messages] == ["message"]


def test_a_hundred_silent_streams_ask_the_database_nothing(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, asked = create(), []
    monkeypatch.setattr(hub, "POLL", 3600.0)

    async def story() -> None:
        streams = [await sse.astream(engine, "acme", which, keep_alive=0.05) for which in (job.id, None) * 50]
        readers = [asyncio.ensure_future(comments(stream, 3)) for stream in streams]
        while len(hub.subscribers._subscribers) < 2 or sum(map(len, hub.subscribers._subscribers.values())) < 100:
            await asyncio.sleep(0.005)
        await asyncio.wait_for(asyncio.gather(*readers), 60)
        with hearing(engine, note):
            await asyncio.wait_for(asyncio.gather(*(comments(stream, 3) for stream in streams)), 60)
        for stream in streams:
            await stream.aclose()

    def note(_connection: Any, statement: str, _values: Any) -> None:
        if threading.current_thread().name != "jobkit-relay":
            asked.append(statement)

    asyncio.run(story())
    assert asked == []


async def comments(stream: sse.AsyncStream, number: int) -> None:
    parser = Parser()
    while parser.comments < number:
        list(parser.feed(await anext(stream)))


def test_one_look_finds_for_every_stream_of_a_job_what_no_signal_told(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "POLL", 0.05)
    monkeypatch.setattr(watching.Watcher, "hear", lambda *_: None)
    jobs = [create() for _ in range(3)]
    told: list[list[Message]] = []

    def read(job: Job) -> None:
        told.append(parsed(*sse.stream(engine, "acme", job.id)))

    readers = [threading.Thread(target=read, args=(job,), daemon=True) for job in jobs * 2]
    for reader in readers:
        reader.start()
    until(lambda: sum(map(len, hub.subscribers._subscribers.values())) == 6, "six streams", 60)
    for job in jobs:
        move(engine, job, "running", "done")
    for reader in readers:
        reader.join(60)
    assert [[m.data.get("type", "end") for m in messages][-3:] for messages in told] == [
        ["content_job.running", "content_job.done", "end"]
    ] * 6


# --- everybody at once


def test_who_comes_and_goes_while_others_write_misses_nothing_and_keeps_each_jobs_order(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "PAGE", 7)
    monkeypatch.setattr(hub, "MOST_WAITING", 5)
    engine, chance = database.engine, random.Random(1)
    first = sse.stream(engine, "acme")
    parser = Parser()
    list(parser.feed(next(first)))
    first.close()
    last, told, lives = parser.last_event_id, {}, 0
    writers = [threading.Thread(target=write, args=(database, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    complete = False
    while not complete or lives < 5:
        lives += 1
        parser, mine, enough = Parser(last), [], chance.randrange(1, 30)
        stream = sse.stream(engine, "acme", last_event_id=last, keep_alive=0.05)
        for piece in stream:
            mine += [(m.data["id"], m.data["payload"]["jobId"]) for m in parser.feed(piece)]
            told.update(mine)
            complete = not any(writer.is_alive() for writer in writers) and told.keys() == logged(engine).keys()
            if len(mine) >= enough or complete:
                break
        stream.close()
        last = parser.last_event_id
        assert len(mine) == len(set(mine)), "an event came twice"
        wanted = logged(engine)
        seqs: dict[str, list[int]] = {}
        for number, job in mine:
            seqs.setdefault(job, []).append(wanted[number][1])
        assert all(found == sorted(found) for found in seqs.values()), "out of order"
    for writer in writers:
        writer.join(60)
    assert len(told) == 3 * 25 * 3


def write(database: Database, seed: int) -> None:
    """Jobs from beginning to end; on PostgreSQL some transactions are numbered long before they write."""
    engine, chance = database.connect(), random.Random(seed)
    for _ in range(25):
        with Session(engine) as early:
            if engine.dialect.name == "postgresql" and chance.random() < 0.5:
                early.execute(sa.text("SELECT pg_current_xact_id()"))
            with Session(engine) as session, session.begin():
                job = JobStore(session).create("acme", job_type="note")
            move(engine, job, "running")
            many(engine, 1, "other")
            JobStore(early).transition(job.id, status="done")
            early.commit()


def test_a_transaction_left_open_takes_nothing_from_a_company_that_comes_back(postgres_database: Database) -> None:
    engine = postgres_database.engine
    with Session(postgres_database.connect()) as idle, jobkit.Relay(engine):
        idle.execute(sa.text("SELECT pg_current_xact_id()"))
        stream = sse.stream(engine, "acme")
        messages, parser = [], Parser()
        list(parser.feed(next(stream)))
        many(engine, 3)
        for _ in range(2):  # told from the log at once, and again to who comes back
            while len(messages) < 3:
                messages += parser.feed(next(stream))
            stream.close()
            assert set(ids(messages)) == logged(engine).keys()
            messages, stream = [], sse.stream(engine, "acme", last_event_id=parser.last_event_id)
        JobStore(idle).create("acme", job_type="late")
        idle.commit()
        while len(messages) < 4:
            messages += parser.feed(next(stream))
        stream.close()
        assert set(ids(messages)) == logged(engine).keys()


# --- a database that restarts, a process that forks, a server that stops


@pytest.fixture
def own(postgres: Server, postgres_template: str) -> Iterator[tuple[OwnServer, Database]]:
    if not isinstance(postgres, OwnServer):
        pytest.skip("the server was given, and is not to be restarted")
    database = PostgresDatabase(postgres, postgres_template)
    yield postgres, database
    database.close()


def test_streams_survive_a_restart_of_the_database(
    own: tuple[OwnServer, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, database = own
    monkeypatch.setattr(hub, "POLL", 0.2)
    engine = database.engine
    with Session(engine) as session, session.begin():
        job = JobStore(session).create("acme", job_type="note")
    with SERVERS["wsgi"](Site(engine)) as site, site.get("acme", job.id) as one, site.get("acme") as company:
        one.follow().has(1)
        begun(company.follow())
        until(lambda: len(hub.subscribers._subscribers) == 2, "two streams", 60)
        server.restart()
        engine.dispose()
        move(engine, job, "running", "done")
        assert [m.data.get("type", "end").removeprefix("content_job.") for m in one.all()] == [
            "queued", "running", "done", "end",
        ]  # fmt: skip
        assert [m.type for m in company.has(2).messages] == ["running", "done"]


FORKED = """
import os, sys, threading
import sqlalchemy as sa
from sqlalchemy.orm import Session
import jobkit
from jobkit import sse
engine = sa.create_engine(sys.argv[1])
jobkit.migrations.upgrade(engine)
with Session(engine) as session, session.begin():
    job = jobkit.JobStore(session).create("acme", job_type="note")
streams = [sse.stream(engine, "acme", which) for which in (job.id, None)]
for stream in streams:
    next(stream)
next(streams[0])
child = os.fork()
if child == 0:
    engine.dispose(close=False)
    assert [list(stream) for stream in streams] == [[], []]
    new = sse.stream(engine, "acme", job.id)
    assert b"queued" in next(new) + next(new)
    new.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
with Session(engine) as session, session.begin():
    jobkit.JobStore(session).cancel(job.id)
assert b"cancelled" in b"".join(streams[0])
assert b"cancelled" in next(streams[1])
streams[1].close()
engine.dispose()
"""


def test_a_forked_child_ends_its_parents_streams_and_has_its_own(postgres_database: Database) -> None:
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORKED, postgres_database.url]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_every_stream_can_be_ended_at_once_and_each_client_goes_on_elsewhere(
    site: Site, engine: sa.Engine, create: Create
) -> None:
    job = create()
    with site.get("acme", job.id) as one, site.get("acme") as company:
        one.follow().has(1)
        begun(company.follow())
        sse.end_all()
        assert [m.event for m in one.all() + company.all()] == ["message"]
    move(engine, job, "running")
    for path, client in ((("acme", job.id), one), (("acme",), company)):
        with site.get(*path, last_event_id=client.parser.last_event_id) as again:
            assert [m.type for m in again.take(1)] == ["running"]


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=["one process", "two workers"])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_server_with_open_streams_stops_at_once(
    end: signal.Signals, options: list[str], sqlite_database: Database, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "tests.support.streaming:app", f"--port={port}", *options]
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "DATABASE_URL": sqlite_database.url}, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            until(lambda: answers(port), "uvicorn", 60)
            with Client(port, "/") as client:
                begun(client.follow())
                server.send_signal(end)
                assert client.all() == []
                assert server.wait(60) in (0, -end)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait(60)
    assert "Traceback" not in (tmp_path / "log").read_text()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_the_former_handler_of_a_signal_still_has_its_say(engine: sa.Engine) -> None:
    heard: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        sse.end_on_signals(signal.SIGUSR1)
        sse.end_on_signals(signal.SIGUSR1)
        stream = sse.stream(engine, "acme")
        next(stream)
        signal.raise_signal(signal.SIGUSR1)
        assert list(stream) == []
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert heard == [signal.SIGUSR1]


def test_signals_are_left_alone_on_a_thread_that_cannot_set_them() -> None:
    # The lifespan of an app under Starlette's test client.
    before = signal.getsignal(signal.SIGUSR1)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(sse.end_on_signals, signal.SIGUSR1).result(60)
    assert signal.getsignal(signal.SIGUSR1) is before
