"""What jobs cost a database: every statement and every commit, the same for one job and for many."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import sqlalchemy as sa

from jobkit import JobRequest, JobStore
from jobkit.base.clock import utcnow
from jobkit.db.connections import SharedConnection
from jobkit.events import feed as feed_module
from jobkit.events.feed import Feed
from jobkit.events.log import DeliveredEvents
from jobkit.jobs import fairness as rotation
from jobkit.jobs.claims import RELEASED, Claim, Completion
from jobkit.maintenance.rescue import rescue
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import Registration
from jobkit.runner.in_flight import InFlight
from jobkit.runner.turns import Committer, Turn
from jobkit.tables import content_jobs
from tests.support.databases import Database
from tests.support.recorder import Recorder
from tests.support.runners import until
from tests.support.sent import hearing
from tests.support.story import Story, horizon_held, nothing, publish, render

# Statements, commits: which. One statement writes what has a plus between.
COSTS = {
    "sqlite": {
        "a host creates one": "2, 1: insert jobs; insert events",
        "a host creates them": "2, 1: insert jobs; insert events",
        "a runner finds nothing": "1, 0: read jobs",
        "it claims them": "3, 1: read jobs; update jobs; insert events",
        "it records their keys": "1, 1: insert intents",
        "it ends them": "4, 1: update jobs; insert events; insert assets; delete intents",
        "a turn of everything": (
            "7, 1: update jobs; insert events; insert assets; delete intents; insert intents; "
            "update jobs; insert events"
        ),
        "it looks after its claims": "1, 0: read jobs",
        "it renews them": "1, 1: update jobs",
        "it records how far they are": "2, 1: update jobs; insert events",
        "it looks for lost workers": "1, 0: read jobs",
        "a relay looks in silence": "1, 0: read",
        "it scans the log": "2, 0: read; read events",
    },
    "postgresql": {
        "a host creates one": "1, 1: insert jobs + insert events",
        "a host creates them": "1, 1: insert jobs + insert events",
        "a runner finds nothing": "1, 1: update jobs + insert events",
        "it claims them": "1, 1: update jobs + insert events",
        "it records their keys": "1, 1: insert intents",
        "it ends them": "1, 1: update jobs + insert events + insert assets + delete intents",
        "a turn of everything": (
            "3, 1: update jobs + insert events + insert assets + delete intents; insert intents; "
            "update jobs + insert events"
        ),
        "it looks after its claims": "1, 1: read jobs",
        "it renews them": "1, 1: update jobs",
        "it records how far they are": "1, 1: update jobs + insert events",
        "it looks for lost workers": "1, 1: update jobs + insert events",
        "a relay looks in silence": "1, 0: read",
        "it scans the log": "2, 0: read; read events",
    },
}


def check(story: Story) -> None:
    expected = COSTS[story.engine.dialect.name]
    assert story.costs == {name: expected[name] for name in story.costs}


@pytest.fixture
def story(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    monkeypatch.setattr(rotation, "DUE_REFRESH", math.inf)  # or it would look again after half a second
    story = Story(database, tmp_path / "assets")
    yield story
    story.close()


@pytest.mark.parametrize("count", [1, 20])
def test_a_step_of_jobs_costs_the_same_for_one_and_for_many(story: Story, count: int) -> None:
    with story.costs_of("a runner finds nothing"):
        story.turn(limit=1)
    with story.costs_of("a host creates one"), story.engine.begin() as connection:
        JobStore(connection).create("acme", job_type="note")
    story.turn(limit=2)
    with story.costs_of("a host creates them"):
        story.create(count)
    with story.costs_of("it claims them"):
        first = story.claim(count)
    render(first)
    with story.costs_of("it records their keys"):
        story.turn(rendered=first)
    publish(first)
    with story.costs_of("it ends them"):
        story.turn(ends=first)
    check(story)


@pytest.mark.parametrize("count", [1, 20])
def test_a_turn_that_does_everything_is_one_commit_however_many_jobs_take_part(story: Story, count: int) -> None:
    story.create(count)
    ending = story.claim(count)
    render(ending)
    story.turn(rendered=ending)
    publish(ending)
    story.create(count)
    rendered = story.claim(count)
    render(rendered)
    story.create(count)
    with story.costs_of("a turn of everything"):
        claimed = story.turn(ends=ending, rendered=rendered, limit=count + 1)
    assert len(claimed) == count
    check(story)
    for attempt in rendered:
        attempt.discard()


@pytest.mark.parametrize("count", [1, 100])
def test_looking_after_claims_costs_the_same_for_one_and_for_many(story: Story, count: int) -> None:
    story.create(count)
    attempts = story.claim(count)
    keeper = story.keeper(attempts)
    keeper._renew_at = math.inf
    with story.costs_of("it looks after its claims"):
        keeper._tick()
    for attempt in attempts:
        attempt.renewed = -math.inf
    keeper._renew_at = 0.0
    with story.costs_of("it renews them"):
        keeper._tick()
    assert min(attempt.renewed for attempt in attempts) > 0
    for attempt in attempts:
        attempt.progress(0.5, "half")
    with story.costs_of("it records how far they are"):
        keeper.record()
    assert all(attempt.recorded is attempt.reported for attempt in attempts)
    keeper.link.close()
    check(story)


def test_silence_costs_a_look_each(
    story: Story, database: Database, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "STALE", math.inf)
    shared = SharedConnection(story.engine, 60.0)
    with story.costs_of("it looks for lost workers"):
        rescue(shared, clock=utcnow, on_commit=nothing)
    feed = Feed(story.engine, DeliveredEvents(), "log")
    with horizon_held(database.engine):
        feed._scan()
        with story.costs_of("a relay looks in silence"):
            feed._scan()
        with story.costs_of("it scans the log"):
            feed._scan(forced=True)
    feed._link.close()
    check(story)


def test_a_claim_alone_has_no_transaction_around_it_and_whatever_is_more_has(postgres_database: Database) -> None:
    engine = postgres_database.engine
    with engine.begin() as connection:
        JobStore(connection).create_many("acme", [JobRequest("note") for _ in range(9)])
    sent: list[bool] = []

    def hear(connection: sa.Connection, *_: object) -> None:
        driver: Any = connection.connection.dbapi_connection
        sent.append(driver.autocommit)

    def committing(committer: Committer, turn: Turn) -> list[bool]:
        """Which of the statements committed by themselves; none does afterwards."""
        sent.clear()
        with hearing(engine, hear):
            claimed = committer.commit(turn).claimed
        held.extend(claimed)
        for claim in claimed:
            in_flight.add(Attempt(claim, Registration(never), never))
        with committer.link.use() as connection:
            hear(connection)
        assert sent.pop() is False
        return sent

    def committer() -> Committer:
        return Committer(engine, worker_id="worker", lease=60, clock=utcnow, in_flight=in_flight)

    in_flight = InFlight()
    in_flight.holds = lambda _: True  # type: ignore[method-assign]
    held: list[Claim] = []
    in_flight, never = InFlight(), cast("Any", None)
    one, other = committer(), committer()
    one._rotation.find_due = other._rotation.find_due = lambda *_, **__: None  # type: ignore[method-assign]
    assert committing(one, Turn(limit=2)) == [True]
    assert one.more_waiting  # so whose turn it is counts: a list, and a claim of theirs
    assert committing(one, Turn(limit=2)) == [False, False]
    other._unsure_until = math.inf  # what may have been claimed before is given back first
    assert set(committing(other, Turn(limit=2))) == {False}
    assert committing(other, Turn([Completion(claim, outcome=RELEASED) for claim in held])) == [False]
    assert len(held) == 6
    for done in (one, other):
        done.link.close()


def test_a_claim_that_goes_on_after_it_was_cut_is_given_back(postgres_database: Database) -> None:
    engine = postgres_database.engine
    with engine.begin() as connection:
        JobStore(connection).create_many("acme", [JobRequest("note") for _ in range(3)])
    in_flight = InFlight()
    committer = Committer(engine, worker_id="worker", lease=60, clock=utcnow, in_flight=in_flight)
    never: Any = None
    outcomes: list[Any] = []

    def claim() -> None:
        try:
            taken = committer.commit(Turn(limit=3)).claimed
        except sa.exc.DBAPIError as error:
            outcomes.append(error)
        else:
            outcomes.append(len(taken))
            for one in taken:
                in_flight.add(Attempt(one, Registration(never), never))

    def waiting() -> int:
        with engine.connect() as connection:
            found: int = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            ).scalar_one()
            return found

    with engine.begin() as other:  # as CREATE INDEX does
        other.exec_driver_sql("LOCK TABLE content_jobs IN SHARE MODE")
        for number in (1, 2):  # the first is cut, and goes on waiting on the server; the second begins beside it
            thread = threading.Thread(target=claim)
            thread.start()
            until(lambda number=number: waiting() == number)  # type: ignore[misc]
            if number == 1:
                committer.link.abort()
                thread.join(60)
    thread.join(60)
    claim()
    assert isinstance(outcomes[0], sa.exc.DBAPIError)
    assert sum(outcomes[1:]) == 3  # whether the second came before the first or after it
    with engine.connect() as connection:
        jobs = connection.execute(sa.select(content_jobs.c.id, content_jobs.c.fence, content_jobs.c.status)).all()
    assert {(job.id, job.fence) for job in jobs} == {
        (attempt.claim.job_id, attempt.claim.fence) for attempt in in_flight.attempts()
    }
    assert {job.status for job in jobs} == {"running"}
    committer.link.close()


def test_a_hook_for_begin_is_asked_for_what_it_sets_locally(postgres_database: Database) -> None:
    engine = postgres_database.engine
    with engine.begin() as connection:
        JobStore(connection).create("acme", job_type="note")
    found: list[str] = []
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("SET LOCAL application_name = 'us'"))

    def look(connection: sa.Connection, statement: str, _: object) -> None:
        if "UPDATE" in statement:
            driver: Any = connection.connection.dbapi_connection
            found.append(driver.execute("SHOW application_name").fetchone()[0])

    committer = Committer(engine, worker_id="worker", lease=60, clock=utcnow, in_flight=InFlight())
    with hearing(engine, look):
        assert len(committer.commit(Turn(limit=1)).claimed) == 1
    assert found == ["us"]
    committer.link.close()
