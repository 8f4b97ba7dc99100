"""Every statement of the stores under asynchronous drivers: the shipped suite and the stores' own tests, each as it is,
on an engine whose driver is awaited underneath.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit.testing.conformance import JobStoreConformance
from tests.jobs import (
    test_cancel,
    test_claims,
    test_create_many,
    test_fairness,
    test_idempotency,
    test_retry,
    test_store,
)
from tests.jobs.test_store import clock, jobs  # noqa: F401
from tests.support.asynchronous import DRIVERS, Lane
from tests.support.databases import PostgresDatabase, SqliteDatabase
from tests.support.shared import empty

MODULES = (test_store, test_create_many, test_idempotency, test_retry, test_cancel, test_claims, test_fairness)
# What a test may need here. Those that start runners, threads or processes ask for more.
FIXTURES = {"engine", "session", "jobs", "clock", "create", "monkeypatch", "request"}
# Not about statements: how many processes, rows or bytes it takes.
LARGE = {
    "test_processes_make_one_job_of_each_key",
    "test_a_hundred_thousand_jobs_are_created_in_order",
    "test_a_hundred_thousand_scheduled_jobs_are_never_read_or_sorted_by_a_claim",
    "test_memory_is_that_of_the_jobs_and_one_chunk",
}
THREADED = {
    "test_a_read_before_a_write_waits_for_another_writer_and_does_not_fail",
    "test_many_jobs_run_once_each_and_tell_their_events_in_order",
    "test_a_failing_renderer_fails_its_job_with_a_message_that_can_be_stored",
    "test_two_runners_never_share_a_job",
}


@pytest.fixture(scope="module", params=DRIVERS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    database: Any
    if request.param == "aiosqlite":
        database = SqliteDatabase(tmp_path_factory.mktemp("shared") / "host.db")
    else:
        database = PostgresDatabase(request.getfixturevalue("postgres"), request.getfixturevalue("postgres_template"))
    lane = Lane(database, request.param)
    yield lane
    lane.close()
    database.close()


@pytest.fixture
def lane(shared: Lane) -> Iterator[Lane]:
    yield shared
    empty(shared.engine)


@pytest.fixture
def engine(lane: Lane) -> sa.Engine:
    return lane.async_engine.sync_engine


@pytest.fixture
def session(lane: Lane, engine: sa.Engine) -> Iterator[Session]:
    session = Session(engine)
    yield session
    lane.call(session.close)


def awaited(test: Callable[..., None]) -> Callable[..., None]:
    """The same test, with the loop of its lane underneath."""
    signature = inspect.signature(test)
    asked = list(signature.parameters.values())

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        lane = kwargs.pop("lane")
        lane.call(test, *args, **kwargs)

    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*asked, inspect.Parameter("lane", inspect.Parameter.KEYWORD_ONLY)]
    )
    return run


def cases_of(module: ModuleType) -> Iterator[tuple[str, Callable[..., None]]]:
    for name, test in vars(module).items():
        if not name.startswith("test_") or name in LARGE or hasattr(test, "hypothesis"):
            continue
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        given = {part.strip() for mark in marks for part in named(mark.args[0])}
        asked = set(inspect.signature(test).parameters) - given
        if "engine" in asked | ({"engine"} if asked & {"session", "jobs", "create"} else set()) and asked <= FIXTURES:
            yield name, awaited(test)


def named(argument: Any) -> list[str]:
    return argument.split(",") if isinstance(argument, str) else list(argument)


COLLECTED = {
    f"{name}__{module.__name__.rpartition('_')[2]}": test for module in MODULES for name, test in cases_of(module)
}
globals().update(COLLECTED)


class TestJobs(JobStoreConformance):
    @pytest.fixture
    def engine(self, lane: Lane) -> sa.Engine:
        return lane.async_engine.sync_engine


for _name, _test in inspect.getmembers(JobStoreConformance, inspect.isfunction):
    if _name.startswith("test_"):
        setattr(TestJobs, _name, None if _name in THREADED else awaited(_test))


def test_few_tests_are_left_out() -> None:
    assert len(COLLECTED) >= 60
    assert len([name for name in vars(TestJobs) if name.startswith("test_") and getattr(TestJobs, name)]) >= 9
