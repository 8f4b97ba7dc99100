"""``inline`` and ``drain``: jobs run inside the transaction of a test, by the package's own steps."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import closing
from datetime import datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, SupportsFloat, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from jobkit import signals
from jobkit.assets.store import AssetStore
from jobkit.base.clock import Clock, utcnow
from jobkit.base.loops import LoopThread
from jobkit.base.text import error_message
from jobkit.db.dialects.base import EventRow, Held
from jobkit.db.dialects.position import Position
from jobkit.db.host import writable
from jobkit.errors import AssetNotFound, RenderInterrupted
from jobkit.events.log import event_of
from jobkit.jobs import claims
from jobkit.jobs.claims import Claim
from jobkit.jobs.store import JobStore
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import Registration, RenderEnvironment
from jobkit.rendering.renderers import Renderers, registration_of
from jobkit.runner.in_flight import InFlight
from jobkit.runner.leases import interrupt_if_lost
from jobkit.runner.store_stage import StoreBatch
from jobkit.runner.turns import Committer, Turn, completion_of
from jobkit.tables import content_job_events, content_jobs
from jobkit.testing.clock import FrozenClock
from jobkit.types import Job

if TYPE_CHECKING:
    from jobkit.db.host import Host

T = TypeVar("T")
# Longer than any test; what runs here holds its claim as long as the transaction is open.
LEASE = 24 * 3600.0
LIMIT = 1_000
_e, _c = content_job_events.c, content_jobs.c
# The last seq delivered of each job, by session: a second call goes on from there.
_delivered: WeakKeyDictionary[Any, dict[UUID, int]] = WeakKeyDictionary()


def inline(
    session: Host, assets: AssetStore, renderers: Renderers, *, clock: Clock = utcnow, limit: int = LIMIT
) -> list[Job]:
    """Run the jobs that are due, and those they create, in this thread and inside the transaction of ``session``; the
    jobs that ran, each once, in the order in which they began, as they are then.

    Nothing is committed: a rollback takes jobs, assets and events with it, and leaves the objects to whoever keeps the
    storage, such as ``temporary_assets``. The steps are a runner's, with a savepoint where that commits. After each,
    signals are sent here for every event of these jobs that was not told yet, ``queued`` first; a receiver that opens a
    connection of its own sees nothing of them, because nothing is committed.

    A job that waits for a later time by ``clock`` stays queued. ``RuntimeError`` after ``limit`` runs, for renderers
    whose jobs never end.
    """
    return list(_Inline(session, assets, renderers, clock, limit).run().values())


def drain(
    session: Host, assets: AssetStore, renderers: Renderers, clock: FrozenClock, *, limit: int = LIMIT
) -> list[Job]:
    """As ``inline``, until nothing is queued: for a job that waits for a later time, ``clock`` is moved there."""
    runs = _Inline(session, assets, renderers, clock, limit)
    ran = runs.run()
    while (at := runs.next_time()) is not None:
        clock.move_to(at)
        ran |= runs.run()
    return list(ran.values())


class _Inline:
    def __init__(self, session: Host, assets: AssetStore, renderers: Renderers, clock: Clock, limit: int) -> None:
        self._session, self._assets, self._renderers, self._clock = session, assets, renderers, clock
        self._limit = self._left = limit
        self._ran: dict[UUID, None] = {}
        if hasattr(session, "flush"):
            session.flush()  # what the host has added is there when its renderers look
        self._connection = writable(session)
        self.home = _Home()
        open_asset = partial(_open_asset, self.home, session, assets)
        self._environment = RenderEnvironment(
            assets, LoopThread(), open_asset, renderers.services,
            lease=LEASE, around=renderers.around, describe_error=renderers.describe_error,
        )  # fmt: skip

    def run(self) -> dict[UUID, Job]:
        with closing(self._environment.loop):
            while (claim := self._claim()) is not None:
                if self._left == 0:
                    raise RuntimeError(f"jobs were still queued after {self._limit} runs")
                self._left -= 1
                self._ran[claim.job_id] = None
                self._deliver(claim.job_id)
                self._end(self._attempt(claim))
                self._deliver(claim.job_id)
        jobs = JobStore(self._connection)
        return {job_id: job for job_id in self._ran if (job := jobs.get_by_id(job_id)) is not None}

    def next_time(self) -> datetime | None:
        """When the first of the waiting jobs is due."""
        waiting = sa.select(_c.run_at).where(_c.status == "queued", _c.run_at > self._clock())
        at: datetime | None = self._connection.execute(waiting.order_by(_c.run_at).limit(1)).scalar()
        return at

    def _commit(self, turn: Turn) -> list[Claim]:
        """A runner's transaction, as a savepoint; what it claimed."""
        # A committer of its own, which looks for all that is due now: some of it may have come a moment ago.
        committer = Committer(
            self._connection.engine,
            worker_id="jobkit.testing",
            lease=LEASE,
            clock=self._clock,
            in_flight=InFlight(),
        )
        with self._connection.begin_nested():
            return committer.apply(self._connection, turn, self._clock()).claimed

    def _claim(self) -> Claim | None:
        claimed = self._commit(Turn(limit=1, check_scheduled=True))
        return claimed[0] if claimed else None

    def _attempt(self, claim: Claim) -> _Attempt:
        return _Attempt(claim, registration_of(self._renderers, claim.job_type), self._environment, self)

    def held(self, claim: Claim) -> Held | None:
        """The claim, if it holds. From any thread."""
        return next(iter(self.home.ask(partial(claims.check, self._connection, [claim]))), None)

    def record(self, attempt: Attempt) -> None:
        """Record the attempt's progress. From any thread."""
        self.home.ask(partial(self._record, attempt))

    def _record(self, attempt: Attempt) -> None:
        assert attempt.reported is not None
        with self._connection.begin_nested():
            reports = [(attempt.claim, attempt.reported)]
            claims.update_progress(self._connection, reports, lease=LEASE, now=self._clock())
        self._deliver(attempt.claim.job_id)

    def _end(self, attempt: Attempt) -> None:
        """Everything from the renderer to the end of the job."""
        attempt.run()
        if attempt.failure is None and attempt.remaining <= 0:
            attempt.failure = attempt.give_up()
            attempt.discard()
        if attempt.failure is None:
            self._commit(Turn(rendered=[attempt]))
            attempt.failure = StoreBatch([attempt]).publish().get(attempt)
        if attempt.failure is not None:
            attempt.discard()
        _raise_what_is_the_tests(attempt.failure)
        failure = attempt.failure
        try:
            self._commit(Turn([completion_of(attempt, failure, now=self._clock())]))
        except sa.exc.DBAPIError:
            if failure is None:
                raise
            raise RuntimeError(
                f"the renderer of job {attempt.claim.job_id} left the session's transaction unusable: "
                f"{error_message(failure)}"
            ) from failure

    def _deliver(self, job_id: UUID) -> None:
        """Send signals for the job's events that were not delivered yet."""
        delivered = _delivered.setdefault(self._session, {})
        log = sa.select(_e.id, sa.literal(0), _e.seq, _e.company_id, _e.type, _e.job_id, _e.created_at, _e.payload)
        log = log.where(_e.job_id == job_id, _e.seq > delivered.get(job_id, 0)).order_by(_e.seq)
        rows = [EventRow(*row) for row in self._connection.execute(log)]
        if rows:
            delivered[job_id] = rows[-1].seq
        # Uncommitted events have no position in the log: a replay from this one replays everything.
        signals.deliver(event_of(row, Position(0, 0)) for row in rows)


class _Attempt(Attempt):
    """Asks the session's transaction at each ``ctx.check()``, and records progress there at once, as a runner's lease
    keeper does now and then.
    """

    def __init__(
        self, claim: Claim, registration: Registration, environment: RenderEnvironment, inline: _Inline
    ) -> None:
        super().__init__(claim, registration, environment)
        self._inline = inline

    def check(self) -> None:
        if not self.interrupted:
            interrupt_if_lost(self, self._inline.held(self.claim))
        super().check()

    def progress(self, fraction: SupportsFloat, message: str | None) -> None:
        before = self.reported
        super().progress(fraction, message)
        if self.reported is not before:
            self._inline.record(self)

    def start_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self._inline.home.serve(super().start_coroutine(coroutine), self)


class _Home:
    """The thread that the session belongs to. While it waits for a coroutine, it answers what the loop's thread asks:
    no connection is used by two threads.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._asked: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def ask(self, work: Callable[[], T]) -> T:
        """The result of ``work`` on the session's thread."""
        if threading.get_ident() == self._thread:
            return work()
        answer: Future[T] = Future()
        self._asked.put(partial(_answer, answer, work))
        return answer.result()

    def serve(self, future: Future[Any], attempt: Attempt) -> _Served:
        return _Served(future, self._asked, attempt)


class _Served:
    """The future of a coroutine: whoever waits for it, on the session's thread, does meanwhile what is asked."""

    def __init__(self, future: Future[Any], asked: SimpleQueue[Callable[[], object]], attempt: Attempt) -> None:
        self._future, self._asked, self._attempt = future, asked, attempt
        self.cancel = future.cancel
        future.add_done_callback(lambda _: asked.put(lambda: None))

    def result(self) -> Any:
        while not self._future.done():
            remaining = self._attempt.remaining
            try:
                self._asked.get(timeout=None if remaining == math.inf else max(0.0, remaining))()
            except Empty:
                self._attempt.give_up()
        return self._future.result()


def _open_asset(home: _Home, session: Host, assets: AssetStore, company_id: str, asset_id: UUID | str) -> BinaryIO:
    asset = home.ask(partial(assets.get_by_id, session, asset_id, company_id=company_id))
    if asset is None:
        raise AssetNotFound(f"no asset {asset_id}")
    return assets.open(asset)


def _answer(answer: Future[T], work: Callable[[], T]) -> None:
    try:
        answer.set_result(work())
    except BaseException as error:
        answer.set_exception(error)


def _raise_what_is_the_tests(failure: BaseException | None) -> None:
    """Ctrl-C, the outcome of a pytest test, or its timeout are no failure of a job, as everything else is."""
    a_jobs = Exception | RenderInterrupted | SystemExit | GeneratorExit | asyncio.CancelledError
    if failure is not None and not isinstance(failure, a_jobs):
        raise failure
