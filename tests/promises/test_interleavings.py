"""Two or three transactions on one job, each split at its commit, in every order that there is.

As PostgreSQL's isolation tester does it: a step that waits for a lock stays behind, and its commit follows when it gets
on. Whatever the order: one winner, one event, and no file without an end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetNotFound, InvalidTransition
from jobkit.assets import intents
from jobkit.assets.intents import INTENT_GRACE, Intent
from jobkit.base.clock import utcnow
from jobkit.db.dialects import statements_for
from jobkit.jobs import claims
from jobkit.jobs.claims import Claim, Completion
from jobkit.jobs.outcomes import Outcome
from jobkit.tables import content_jobs, metadata
from jobkit.types import JobStatus, StoredObject
from tests.support.model import Found, broken_laws, read

DEADLINE = 60.0
Act = Callable[[sa.Connection], Any]


class Stage:
    """A job that was claimed once, by ``claim``, with a file stored for it and recorded."""

    def __init__(self, engine: sa.Engine, *, queued: bool) -> None:
        self.engine = engine
        with engine.begin() as connection:
            empty = "DELETE FROM" if engine.dialect.name == "sqlite" else "TRUNCATE"
            for table in metadata.tables:
                connection.exec_driver_sql(f"{empty} {table}")
        with engine.begin() as connection:
            job = jobkit.JobStore(connection).create("acme", job_type="note")
        self.claim: Claim = self.take()[0]
        key = f"acme/generated/{job.id}.txt"
        self.file = StoredObject("memory", key, "text/plain", 4, "0" * 64, "a.txt")
        with engine.begin() as connection:
            intents.record_intents(connection, [Intent("acme", "memory", key)])
            over = datetime(2001, 1, 1, tzinfo=UTC)
            connection.execute(content_jobs.update().values(lease_until=over))
            if queued:
                assert claims.rescue(connection, limit=1, now=utcnow())
        with engine.connect() as connection:
            self.before = len(read(connection).events)

    def take(self) -> list[Claim]:
        with self.engine.begin() as connection:
            return self.acts()["claim"](connection)[0]  # type: ignore[no-any-return]

    def acts(self) -> dict[str, Act]:
        """What each kind of transaction does, by its name; what it returns is what it was told."""
        claim, now = getattr(self, "claim", None), utcnow()

        def finish(connection: sa.Connection) -> Any:
            return claims.finish(connection, [Completion(claim, (self.file,))], now=now).events

        def put_off(connection: sa.Connection) -> Any:
            outcome = Outcome(JobStatus.QUEUED, run_at=now + timedelta(hours=1), charged=False)
            return claims.finish(connection, [Completion(claim, outcome=outcome)], now=now).events

        def sweep(connection: sa.Connection) -> Any:
            keys = [self.file.object_key]
            terms = {"provider": "memory", "state": "pending", "early": INTENT_GRACE, "hold": 3600.0}
            return statements_for(connection).claim_intents(connection, keys, **terms)

        return {
            "claim": lambda c: claims.claim(c, limit=1, worker_id="w", lease=3600.0, now=now),
            "finish": finish,
            "put off": put_off,
            "rescue": lambda c: claims.rescue(c, limit=1, now=now),
            "cancel": lambda c: jobkit.JobStore(c).cancel(claim.job_id),
            "renew": lambda c: claims.renew(c, [claim], lease=3600.0),
            "sweep": sweep,
        }


class Actor:
    """One transaction on a connection and thread of its own: it acts, and later it commits."""

    def __init__(self, engine: sa.Engine, name: str, act: Act, thread: ThreadPoolExecutor) -> None:
        self.name, self._act, self._thread = name, act, thread
        self.connection = engine.connect()
        self.future: Future[Any] | None = None
        self.over = self.waited = self.begun = False
        self._sqlite = engine.dialect.name == "sqlite"
        driver = self.connection.connection.driver_connection
        if self._sqlite:
            driver.set_trace_callback(self._trace)
        self._driver, self.pid = driver, None if self._sqlite else driver.info.backend_pid

    def _trace(self, statement: str) -> None:
        self.begun = self.begun or statement == "BEGIN IMMEDIATE"

    def start(self) -> None:
        self.future = self._thread.submit(self._act, self.connection)

    @property
    def acted(self) -> bool:
        return self.future is not None and self.future.done()

    @property
    def holds_the_file(self) -> bool:
        """Whether it has SQLite's one write lock."""
        return self.acted and not self.over and bool(self._driver.in_transaction)

    def waits(self, others: list[Actor], observer: sa.Connection) -> bool:
        """Whether it cannot act before another one commits."""
        if self._sqlite:
            return self.begun and any(other.holds_the_file for other in others)
        # Not wait_event, which stays for a moment when the lock was let go.
        query = sa.text("SELECT pg_blocking_pids(:pid) && CAST(:others AS int[])")
        return bool(observer.execute(query, {"pid": self.pid, "others": [other.pid for other in others]}).scalar())

    def settle(self, others: list[Actor], observer: sa.Connection) -> bool:
        """Return once it has acted, or waits for another; whether it has acted."""
        assert self.future is not None
        deadline = time.monotonic() + DEADLINE
        while not self.acted and not self.waits(others, observer):
            assert time.monotonic() < deadline, f"{self.name} neither acts nor waits"
            try:
                self.future.exception(timeout=0.001)
            except TimeoutError:
                continue
        self.waited = self.waited or not self.acted
        return self.acted

    def commit(self) -> None:
        assert self.future is not None
        end = self.connection.rollback if self.future.exception() else self.connection.commit
        self._thread.submit(end).result(DEADLINE)
        self.over = True

    @property
    def told(self) -> Any:
        """What it was told, None when it was refused."""
        assert self.future is not None
        if isinstance(self.future.exception(), AssetNotFound | InvalidTransition):
            return None
        return self.future.result()


@contextmanager
def actors(stage: Stage, names: tuple[str, ...], threads: list[ThreadPoolExecutor]) -> Iterator[list[Actor]]:
    acts = stage.acts()
    found = [Actor(stage.engine, n, acts[n], thread) for n, thread in zip(names, threads, strict=False)]
    try:
        yield found
    finally:
        for actor in found:
            if actor.pid is None:
                actor._driver.set_trace_callback(None)
            actor.connection.close()


def play(found: list[Actor], order: tuple[int, ...], observer: sa.Connection) -> None:
    """Let each act at its first place in ``order`` and commit at its second, or as soon after that as it can."""
    late: list[Actor] = []

    def settled(actor: Actor) -> bool:
        return actor.settle([other for other in found if other is not actor], observer)

    for place in order:
        actor = found[place]
        if actor.future is None:
            actor.start()
            settled(actor)
        elif settled(actor):
            actor.commit()
        else:
            late.append(actor)
        while ready := [actor for actor in late if settled(actor)]:
            ready[0].commit()
            late.remove(ready[0])
    assert not late


def orders(count: int) -> list[tuple[int, ...]]:
    return sorted(set(permutations([number for number in range(count) for _ in range(2)])))


OVER = {  # the lease of the claim is over; and how the job may be in the end
    ("finish", "rescue"): {"done", "queued"},
    ("finish", "finish"): {"done"},
    ("finish", "cancel"): {"done"},
    ("finish", "renew"): {"done"},
    ("finish", "sweep"): {"done", "running"},
    ("finish", "put off"): {"done", "queued"},
    ("put off", "cancel"): {"cancelled"},
    ("put off", "rescue"): {"queued"},
    ("rescue", "rescue"): {"queued"},
    ("rescue", "cancel"): {"cancelled"},
    ("rescue", "renew"): {"queued", "running"},
    ("rescue", "sweep"): {"queued"},
    ("rescue", "claim"): {"queued", "running"},
    ("renew", "cancel"): {"running"},
    ("cancel", "cancel"): {"running"},
    ("sweep", "sweep"): {"running"},
    ("finish", "rescue", "renew"): {"done", "queued"},
    ("finish", "rescue", "cancel"): {"done", "cancelled"},
    ("finish", "rescue", "claim"): {"done", "queued", "running"},
    ("finish", "rescue", "sweep"): {"done", "queued"},
}
QUEUED = {  # the job is in the queue again, and the claim is a zombie's
    ("claim", "claim"): {"running"},
    ("claim", "cancel"): {"running", "cancelled"},
    ("claim", "finish"): {"running"},
    ("claim", "renew"): {"running"},
}
# On PostgreSQL all but a host's cancel step over a row that is locked, and come back later.
STEPPING_OVER = (
    *(("rescue", "cancel"), ("finish", "cancel"), ("put off", "cancel"), ("finish", "renew")),
    *(("finish", "rescue", "sweep"), ("finish", "rescue", "renew"), ("finish", "rescue", "cancel")),
)
SKIPPED = {names: {"running"} for names in STEPPING_OVER}
CASES = [*((names, False) for names in OVER), *((names, True) for names in QUEUED)]


@pytest.mark.parametrize(("names", "queued"), CASES, ids=[", ".join(names) for names, _ in CASES])
def test_whatever_the_order_of_commits_there_is_one_winner(
    engine: sa.Engine, names: tuple[str, ...], queued: bool
) -> None:
    ends: set[str] = set()
    waited = 0
    with ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in names]
        observer = stack.enter_context(engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
        for order in orders(len(names)):
            stage = Stage(engine, queued=queued)
            with actors(stage, names, threads) as found:
                play(found, order, observer)
                after = read(observer)
                assert complaints(stage, found, after) == [], f"in the order {order}"
                waited += sum(actor.waited for actor in found)
            ends |= {job.status for job in after.jobs.values()}
    expected = (QUEUED if queued else OVER)[names]
    assert ends == (expected if engine.dialect.name == "sqlite" else expected | SKIPPED.get(names, set()))
    assert waited or engine.dialect.name == "postgresql"  # there some step over what is locked


def complaints(stage: Stage, found: list[Actor], after: Found) -> list[str]:
    """What is wrong in the end, by the rows and by what each was told."""
    wrong = broken_laws(after, {stage.file.object_key: b"file"})
    told: dict[str, list[Any]] = {}
    for actor in found:
        told.setdefault(actor.name, []).append(actor.told)
    (job,) = after.jobs.values()
    finished = [events for name in ("finish", "put off") for events in told.get(name, []) if events]
    rescued = [events for events in told.get("rescue", []) if events]
    taken = [one for given in told.get("claim", []) for one in given[0]]
    swept = [keys for keys in told.get("sweep", []) if keys]
    if len(finished) + len(rescued) > 1:
        wrong.append("the claim was ended twice")
    if job.fence != 1 + len(taken):
        wrong.append(f"the fence is {job.fence} after {len(taken)} more claims")
    if len(taken) > 1:
        wrong.append("it was claimed twice")
    if any(not held.locked for given in told.get("renew", []) for held in given) and rescued:
        wrong.append("it was renewed and rescued")
    if len(swept) + len(after.assets) > 1:
        wrong.append("the file has a row, and a sweep has it")
    if bool(after.assets) != (job.status == "done"):
        wrong.append(f"the job is {job.status} and has {len(after.assets)} files")
    known = {event.id for events in finished + rescued for event in events}
    known |= {event.id for given in told.get("claim", []) for event in given[1]}
    others = [event.type for event in after.events[stage.before :] if event.id not in known]
    if others not in ([], ["content_job.cancelled"] if "cancel" in told else []):
        wrong.append(f"events that nobody was told of: {others}")
    return wrong
