"""Event streams: what a client of a real server reads, whatever it comes back with; and no tenant reads another's."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Job, JobNotFound, JobStore, Runner, prune, signals, sse
from jobkit.base.clock import utcnow
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import Position
from jobkit.events import hub
from jobkit.events.follow import Follower
from jobkit.events.watch import Watcher
from jobkit.sse import streams
from jobkit.tables import content_job_events, content_jobs
from tests.support.databases import Database
from tests.support.garbage import collected
from tests.support.runners import Gate, only, until
from tests.support.sse import SERVERS, Message, Parser, Site, parsed

Create = Callable[..., Job]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with collected():
        yield
    until(lambda: not streams._sessions and not hub.subscribers._subscribers, "the end of every stream", 60)
    assert not signals.any_receivers()


@pytest.fixture(autouse=True)
def by_signals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are looked at only when a stream knows that it missed something."""
    monkeypatch.setattr(hub, "POLL", 600.0)
    monkeypatch.setattr(hub.Hub, "poll", lambda *_: None)


@pytest.fixture(params=SERVERS)
def site(request: pytest.FixtureRequest, engine: sa.Engine) -> Iterator[Site]:
    """Streams over HTTP, from a WSGI and an ASGI server."""
    with SERVERS[request.param](Site(engine)) as site:
        yield site


def move(engine: sa.Engine, job: Job, *statuses: str, **patch: Any) -> None:
    """Change a job as a host would by hand, each change in a transaction of its own."""
    for status in statuses:
        with Session(engine) as session, session.begin():
            JobStore(session).transition(job.id, status=status, **patch)


def types(messages: list[Message]) -> list[str]:
    return [message.type for message in messages]


def read(stream: sse.Stream, until: Callable[[list[Message]], bool] = lambda _: False) -> list[Message]:
    """What a stream gives until that holds, or to its end; closed then."""
    parser, messages = Parser(), []
    for piece in stream:
        messages += parser.feed(piece)
        if until(messages):
            break
    stream.close()
    return messages


def count(number: int) -> Callable[[list[Message]], bool]:
    return lambda messages: len(messages) >= number


# --- a job


def test_the_state_then_each_event_then_an_end(site: Site, engine: sa.Engine, disk: AssetStore) -> None:
    gate = Gate()
    with Runner(engine, disk, only(gate)) as runner:
        job = runner.submit("acme", job_type="note")
        gate.entered()
        with site.get("acme", job.id) as client:
            [state] = client.take(1)
            gate.open()
            last, end = client.all()[1:]
    headers = {name.lower(): value for name, value in client.headers.items()}
    assert (client.status, client.parser.retry) == (200, 3000)
    assert {name: headers[name] for name in ("content-type", "cache-control", "x-accel-buffering")} == {
        "content-type": "text/event-stream",
        "cache-control": "no-store",
        "x-accel-buffering": "no",
    }
    assert (state.type, state.data["payload"], state.id) == ("running", {"jobId": str(job.id)}, f"{job.id}.2")
    with Session(engine) as session:
        found = JobStore(session).get_by_id(job.id)
    assert found is not None
    assert (last.type, last.data["payload"]["assetId"], last.id) == ("done", str(found.result_asset_id), f"{job.id}.3")
    assert last.data.keys() == {"id", "companyId", "type", "createdAt", "payload"}
    assert (end.event, end.data) == ("end", {"jobId": str(job.id), "reason": "over"})


def test_the_first_message_has_what_a_page_shows(engine: sa.Engine, create: Create) -> None:
    job = create(input={"secret": 1})
    with engine.begin() as connection:
        connection.execute(content_jobs.update().values(status="running", progress=0.25, progress_message="page 1"))
    [message] = read(sse.stream(engine, "acme", job.id), count(1))
    assert message.data["job"] == {
        "jobType": "note", "status": "running", "progress": 0.25, "progressMessage": "page 1",
        "errorMessage": None, "assetId": None,
    }  # fmt: skip
    asset = uuid4()
    move(engine, job, "done", result_asset_id=asset)
    assert read(sse.stream(engine, "acme", job.id))[0].data["job"]["assetId"] == str(asset)


def test_a_client_that_comes_back_gets_what_it_missed_and_after_the_end_nothing(
    site: Site, engine: sa.Engine, create: Create
) -> None:
    job = create()
    moves = ["running", "queued", "running", "failed"]
    with site.get("acme", job.id) as client:
        client.take(1)
    seen = [client.parser.last_event_id]
    for number, status in enumerate(moves, 2):
        move(engine, job, status)
        with site.get("acme", job.id, last_event_id=seen[-1]) as client:
            [message] = client.take(1)
        assert (message.type, message.id) == (status, f"{job.id}.{number}")
        seen.append(message.id)
    for number, last in enumerate(seen[:-1]):
        with site.get("acme", job.id, last_event_id=last) as client:
            assert types(client.all()) == [*moves[number:], "end"]
    with site.get("acme", job.id, last_event_id=seen[-1]) as client:
        assert (client.status, client.all()) == (204, [])
    with Session(engine) as session, session.begin():
        JobStore(session).retry(job.id)
    with site.get("acme", job.id, last_event_id=seen[-1]) as client:
        assert (client.status, types(client.take(1))) == (200, ["queued"])


def test_a_job_that_is_unknown_or_anothers_is_404_and_holds_nothing(site: Site, create: Create) -> None:
    job = create()
    for path in (("other", job.id), ("acme", uuid4()), ("acme", "nonsense"), ("ACME", job.id)):
        for last in (None, f"{job.id}.1"):
            with site.get(*path, last_event_id=last) as client:
                assert client.status == 404, path
    assert site.opened == 0
    assert not hub.subscribers._subscribers


HOSTILE = [
    "x\ndata: evil\n\n", "1", "-1", "0-", "0x1-1", "1-1-1", "9" * 500, "9999999999999999999-9999999999999999999",
    "<script>", "\0", "\ud800", "٣-٣", "0190163d-8694-739b-aea5-966c26f8ad90.1", "content_job.done", " 0-0", "0-0 ",
    "0-0",
]  # fmt: skip


@pytest.mark.parametrize("last", [*HOSTILE, b"0-0", 7], ids=ascii)
def test_whatever_a_client_comes_back_with_raises_nothing_and_is_not_repeated(
    last: Any, engine: sa.Engine, create: Create
) -> None:
    job = create()
    pieces = []
    for which in (job.id, None):
        stream = sse.stream(engine, "acme", which, last_event_id=last)
        pieces += [next(stream), next(stream)] if which else [next(stream)]
        stream.close()
    first, state, company = parsed(*pieces)
    assert (first.event, state.type, company.event) == ("resync", "queued", "resync")
    assert first.data["reason"] == "unknown"
    assert company.data["reason"] in ("unknown", "pruned")
    assert b"evil" not in b"".join(pieces)
    assert b"script" not in b"".join(pieces)


@pytest.mark.parametrize("seq", [2, 99, 10**10 - 1])
def test_a_place_that_the_job_has_not_reached_is_not_its(seq: int, engine: sa.Engine, create: Create) -> None:
    job = create()
    messages = read(sse.stream(engine, "acme", job.id, last_event_id=f"{job.id}.{seq}"), count(2))
    assert types(messages) == ["resync", "queued"]


def test_texts_of_users_stay_inside_their_message(site: Site, engine: sa.Engine, create: Create) -> None:
    text = "one\ntwo\r\nthree\rfour\u2028five\x85\n\nevent: end\ndata: {}\n\n: ü€😀"
    job = create()
    with site.get("acme", job.id) as client:
        client.take(1)
        move(engine, job, "failed", error_message=text)
        _, failed, _ = client.all()
    assert failed.data["payload"]["errorMessage"] == found(engine, job).error_message
    assert failed.data["payload"]["errorMessage"].startswith("one\ntwo")


def found(engine: sa.Engine, job: Job) -> Any:
    with engine.connect() as connection:
        return JobStore(connection).get_by_id(job.id)


@pytest.mark.parametrize("status", ["done", "failed", "cancelled"])
def test_a_job_that_has_ended_is_its_state_and_an_end(status: str, engine: sa.Engine, create: Create) -> None:
    job = create()
    move(engine, job, "running", status)
    assert types(read(sse.stream(engine, "acme", job.id))) == [status, "end"]


def test_a_job_that_is_deleted_ends_its_stream(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()
    stream = sse.stream(engine, "acme", job.id)
    next(stream), next(stream)
    with engine.begin() as connection:
        connection.execute(content_job_events.delete())
        connection.execute(content_jobs.delete())
    for watcher in hub.subscribers._subscribers[job.id]:
        watcher.compare(None)  # type: ignore[attr-defined]
    [end] = read(stream)
    assert (end.event, end.data["reason"]) == ("end", "deleted")
    with pytest.raises(JobNotFound):
        sse.stream(engine, "acme", job.id, last_event_id=f"{job.id}.1")


# --- a company


def test_a_company_hears_of_its_jobs_from_now_on_and_of_no_others(
    site: Site, engine: sa.Engine, create: Create
) -> None:
    create()
    with site.get("acme") as client, site.get("other") as others:
        client.follow(), others.follow()
        until(lambda: client.parser.last_event_id and others.parser.last_event_id, "cursors", 60)
        jobs = {company: create(company_id=company) for company in ("acme", "other", "ACME")}
        for job in jobs.values():
            move(engine, job, "running", "done")
        client.has(3), others.has(3)
        move(engine, jobs["other"], "failed", expect="done")
        others.has(4)
        create()
        client.has(4)
    assert types(client.messages) == ["queued", "running", "done", "queued"]
    assert types(others.messages) == ["queued", "running", "done", "failed"]
    assert {message.data["companyId"] for message in client.messages} == {"acme"}
    assert {message.data["payload"]["jobId"] for message in others.messages} == {str(jobs["other"].id)}


def test_companies_of_one_name_in_two_databases_are_two(sqlite_database: Database, postgres_database: Database) -> None:
    engines = [sqlite_database.engine, postgres_database.engine]
    streams = [sse.stream(engine, "acme") for engine in engines]
    for stream in streams:
        next(stream)
    heard: list[list[Message]] = [[], []]
    threads = [
        threading.Thread(target=lambda n: heard[n].extend(read(streams[n], count(2))), args=(n,), daemon=True)
        for n in (0, 1)
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(hub.subscribers._subscribers) == 2, "two streams", 60)
    for company in ("acme", "acme"):
        for engine in engines:
            with Session(engine) as session, session.begin():
                JobStore(session).create(company, job_type=engine.dialect.name)
    for thread in threads:
        thread.join(60)
    for engine, messages in zip(engines, heard, strict=True):
        with Session(engine) as session:
            own = {str(job.id) for job in JobStore(session).list_by_company("acme")}
        assert {message.data["payload"]["jobId"] for message in messages} == own


def test_a_company_that_comes_back_gets_what_it_missed(site: Site, engine: sa.Engine, create: Create) -> None:
    with site.get("acme") as client:
        client.follow()
        until(lambda: client.parser.last_event_id, "a cursor", 60)
    last = client.parser.last_event_id  # of a stream that has told nothing
    missed = []
    for round in range(3):
        jobs = [create() for _ in range(3)]
        for job in jobs:
            move(engine, job, "running", "done")
        create(company_id="other")
        with site.get("acme", last_event_id=last) as client:
            known = set(missed)
            while len(set(missed)) < 9 * (round + 1):
                [message] = client.take(1)
                missed.append(message.data["id"])
            assert known & {m.data["id"] for m in client.messages} == set()
        last = client.parser.last_event_id
    assert set(missed) == logged(engine, "acme")


def logged(engine: sa.Engine, company: str) -> set[int]:
    with engine.connect() as connection:
        c = content_job_events.c
        return set(connection.execute(sa.select(c.id).where(c.company_id == company)).scalars())


def old(engine: sa.Engine) -> None:
    """Let every job have ended long ago."""
    with engine.begin() as connection:
        connection.execute(content_jobs.update().values(finished_at=utcnow() - timedelta(days=9)))


def test_a_place_that_was_pruned_is_told_and_the_stream_goes_on(engine: sa.Engine, create: Create) -> None:
    stream = sse.stream(engine, "acme")
    [*_] = parsed(greeting := next(stream))
    stream.close()
    job = create()
    move(engine, job, "running", "done")
    old(engine)
    assert prune(engine, older_than=timedelta(days=1), dry_run=False).jobs == 1
    parser = Parser()
    list(parser.feed(greeting))
    stream = sse.stream(engine, "acme", last_event_id=parser.last_event_id)
    [resync] = parser.feed(next(stream))
    assert (resync.event, resync.data) == ("resync", {"reason": "pruned"})
    assert resync.id == parser.last_event_id
    create()
    assert types(read(stream, count(1))) == ["queued"]
    again = sse.stream(engine, "acme", last_event_id=parser.last_event_id)
    assert b"resync" not in next(again)
    again.close()


def test_a_silent_company_keeps_up_with_the_log(engine: sa.Engine, create: Create) -> None:
    parser = Parser()
    stream = sse.stream(engine, "acme", keep_alive=0.02)
    list(parser.feed(next(stream)))
    first = parser.last_event_id
    list(parser.feed(next(stream)))
    job = create(company_id="other")
    move(engine, job, "running", "done")
    with engine.connect() as connection:
        end = statements_for(connection).start(connection).position
    while Position.parse(parser.last_event_id) < end:
        assert list(parser.feed(next(stream))) == []
    stream.close()
    old(engine)
    assert prune(engine, older_than=timedelta(days=1), dry_run=False).jobs == 1
    assert (resyncs(engine, first), resyncs(engine, parser.last_event_id)) == (True, False)


def resyncs(engine: sa.Engine, last: str) -> bool:
    stream = sse.stream(engine, "acme", last_event_id=last)
    greeting = next(stream)
    stream.close()
    return b"resync" in greeting


# --- nothing is missed between what is read and what is heard

POINTS = {
    "before the first step": (streams._Session, "open", True),
    "before it hears of a company": (Follower, "subscribe", True),
    "after it hears of a company": (Follower, "subscribe", False),
    "before it reads of a company": (Follower, "_page", True),
    "after it read of a company": (Follower, "_page", False),
    "before it opens a job": (Watcher, "open", True),
    "after it opened a job": (Watcher, "open", False),
    "before it reads what it missed of a job": (Watcher, "_from_log", True),
    "after it read what it missed of a job": (Watcher, "_from_log", False),
}
CASES = [(point, back) for point in POINTS for back in (False, True) if back or POINTS[point][1] != "_from_log"]


@pytest.mark.parametrize(("point", "back"), CASES)
def test_what_is_committed_while_a_stream_begins_comes_once(
    point: str, back: bool, engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create()
    owner, name, before = POINTS[point]
    which = None if owner is Follower else job.id
    last = None
    if back:
        parser = Parser()
        for piece in (first := sse.stream(engine, "acme", which)):
            list(parser.feed(piece))
            if last := parser.last_event_id:
                break
        first.close()
        move(engine, job, "running", "queued")
    original, once, moved = getattr(owner, name), [1], threading.Event()

    def interrupted(self: Any, *args: Any) -> Any:
        first = bool(once) and bool(once.pop())
        found = None if before else original(self, *args)
        if first:
            move(engine, job, "running")
            moved.set()
        return original(self, *args) if before else found

    stream = sse.stream(engine, "acme", which, last_event_id=last)
    monkeypatch.setattr(owner, name, interrupted)
    messages: list[Message] = []
    ends = ["done"] if which is None else ["end"]

    def read_all() -> None:
        messages.extend(read(stream, lambda m: types(m[-1:]) == ends))

    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    assert moved.wait(60)
    move(engine, job, "done")
    reader.join(60)
    assert not reader.is_alive()
    told = [m.data["id"] for m in messages if m.event == "message"]
    assert len(told) == len(set(told))
    wanted = [*(["running", "queued"] if back else []), "running", "done"]
    if which is not None and not back:  # the state takes the place of what it tells of
        wanted = wanted[-len(messages) + 1 :] if before else ["queued", *wanted]
    assert [t for t in types(messages) if t != "end"] == wanted


def test_a_feed_that_finds_nobody_skips_nothing_that_is_owed_to_who_comes_meanwhile(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jobkit.Relay(engine):
        feed = jobkit.events.relay.running_feed(engine)  # type: ignore[attr-defined]
        original, came = feed._statements.start, threading.Event()
        heard: list[Any] = []

        def receive(_company_id: str, *, event: Any) -> None:
            heard.append(event.type)

        def start(connection: sa.Connection) -> Any:
            if not came.is_set() and threading.current_thread() is feed._thread:
                signals.content_job_queued.connect(receive)
                create()
                came.set()
            return original(connection)

        monkeypatch.setattr(feed._statements, "start", start)
        create()  # something to skip
        until(lambda: heard, "the event", 60)
        signals.content_job_queued.disconnect(receive)


# --- arguments


def test_arguments_are_checked_by_the_call(engine: sa.Engine, create: Create) -> None:
    job = create()
    wrong: list[dict[str, Any]] = [
        {"keep_alive": 0}, {"keep_alive": -1}, {"keep_alive": float("inf")}, {"retry": -1}, {"company_id": None},
        {"company_id": " "},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            sse.stream(engine, **{"company_id": "acme", "job_id": job.id, **options})
    with pytest.raises(TypeError, match="retry"):
        sse.stream(engine, "acme", retry="3")  # type: ignore[arg-type]
    pieces = sse.stream(engine, "acme", retry=timedelta(seconds=0.5), keep_alive=timedelta(minutes=1))
    assert next(pieces).startswith(b"retry: 500\n\n")
    pieces.close()


def test_a_stream_is_the_same_awaited(engine: sa.Engine, create: Create) -> None:
    job = create()
    move(engine, job, "running", "done")

    async def story() -> list[bytes]:
        with pytest.raises(JobNotFound):
            await sse.astream(engine, "other", job.id)
        assert (await sse.astream(engine, "acme", job.id, last_event_id=f"{job.id}.3")).status == 204
        async with await sse.astream(engine, "acme", str(job.id)) as stream:
            return [piece async for piece in stream]

    assert asyncio.run(story()) == list(sse.stream(engine, "acme", job.id))
    assert json.loads(json.dumps(dict(sse.HEADERS)))["Content-Type"] == "text/event-stream"
