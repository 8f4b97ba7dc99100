"""One runner's steps, one after the other on one thread, and what each costs its database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from jobkit import AssetStore, JobRequest, JobStore
from jobkit.base.clock import utcnow
from jobkit.base.loops import LoopThread
from jobkit.jobs.claims import Claim, Completion
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import RenderEnvironment
from jobkit.runner.in_flight import InFlight
from jobkit.runner.leases import LeaseKeeper
from jobkit.runner.store_stage import StoreBatch
from jobkit.runner.turns import Committer, Turn
from tests.support.databases import Database
from tests.support.runners import only, until
from tests.support.sent import Bill


class Story:
    """``costs``: what each named step cost so far."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.bill, self.costs = Bill(database), dict[str, str]()
        self.engine = self.bill.engine
        self._assets = AssetStore(folder, engine=self.engine)
        self._committer = Committer(self.engine, worker_id="w", lease=60.0, clock=utcnow, in_flight=InFlight())
        # What it costs to open a connection, and to look for jobs that wait for a time, is not what this is about.
        self.turn(limit=1, check_scheduled=True)
        self.engine.connect().close()

    @contextmanager
    def costs_of(self, name: str) -> Iterator[None]:
        self.bill.take()
        yield
        self.costs[name] = self.bill.take()

    def create(self, count: int) -> None:
        with self.engine.begin() as connection:
            JobStore(connection).create_many("acme", [JobRequest("note")] * count)

    def turn(self, *, ends: Sequence[Attempt] = (), **others: Any) -> list[Attempt]:
        """The attempts at what a turn claimed."""
        completions = [Completion(attempt.claim, files=attempt.stored) for attempt in ends]
        committed = self._committer.commit(Turn(completions, **others))
        assert [event.type for event in committed.events].count("content_job.done") == len(ends)
        return [self._attempt(claim) for claim in committed.claimed]

    def claim(self, count: int) -> list[Attempt]:
        attempts = self.turn(limit=count + 1)  # one more, or it would look whose turn is next
        assert len(attempts) == count
        return attempts

    def keeper(self, attempts: list[Attempt]) -> LeaseKeeper:
        in_flight = InFlight()
        for attempt in attempts:
            in_flight.add(attempt)
        return LeaseKeeper(self.engine, 60.0, in_flight, clock=utcnow, on_commit=nothing)

    def close(self) -> None:
        self._committer.link.close()

    def _attempt(self, claim: Claim) -> Attempt:
        environment = RenderEnvironment(self._assets, LoopThread(), lambda *_: pytest.fail("no asset"))
        return Attempt(claim, only().find("note"), environment)


def nothing(_: object) -> None:
    pass


def render(attempts: list[Attempt]) -> None:
    for attempt in attempts:
        attempt.run()
        assert attempt.failure is None


def publish(attempts: list[Attempt]) -> None:
    assert StoreBatch(attempts).publish() == {}


@contextmanager
def horizon_held(engine: sa.Engine) -> Iterator[None]:
    """Whatever else goes on at the server, such as a vacuum, no reader of the log has cause to look again."""
    if engine.dialect.name == "sqlite":
        yield
        return
    with engine.connect() as holder, engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
        mine = holder.scalar(sa.text("SELECT CAST(pg_current_xact_id() AS text)"))
        oldest = sa.text("SELECT CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text)")
        until(lambda: other.scalar(oldest) == mine, "that all older transactions end", 60)
        yield
        holder.rollback()
