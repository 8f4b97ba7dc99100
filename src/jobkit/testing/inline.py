"""``inline`` and ``drain``: jobs run inside the transaction of a test, by the package's own steps."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from datetime import datetime
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

import sqlalchemy as sa

from jobkit import signals
from jobkit.assets import intents
from jobkit.assets.store import AssetStore
from jobkit.base.clock import Clock, utcnow
from jobkit.base.loops import LoopThread
from jobkit.base.text import error_message
from jobkit.db.dialects.base import EventRow, Position
from jobkit.db.host import connection_of
from jobkit.db.sqlite import require_configured
from jobkit.errors import AssetNotFound, RenderInterrupted
from jobkit.events.log import event_of
from jobkit.jobs import claims
from jobkit.jobs.claims import Claim
from jobkit.jobs.fairness import RoundRobin
from jobkit.jobs.store import JobStore
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.renderers import Renderers, registration_of
from jobkit.runner.leases import tell
from jobkit.runner.store_stage import StoreBatch
from jobkit.runner.turns import end, intents_of
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
# The last seq of each job that was told, by session: a second call goes on from there.
_told: WeakKeyDictionary[Any, dict[UUID, int]] = WeakKeyDictionary()


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
        self._connection = connection_of(session)
        require_configured(self._connection)
        self._home = _Home()

    def run(self) -> dict[UUID, Job]:
        with closing(LoopThread()) as loop:
            while (claim := self._claim()) is not None:
                if self._left == 0:
                    raise RuntimeError(f"jobs were still queued after {self._limit} runs")
                self._left -= 1
                self._ran[claim.job_id] = None
                self._tell(claim.job_id)
                self._end(self._attempt(claim, loop))
                self._tell(claim.job_id)
        jobs = JobStore(self._connection)
        return {job_id: job for job_id in self._ran if (job := jobs.get_by_id(job_id)) is not None}

    def next_time(self) -> datetime | None:
        """When the first of the waiting jobs is due."""
        waiting = sa.select(_c.run_at).where(_c.status == "queued", _c.run_at > self._clock())
        at: datetime | None = self._connection.execute(waiting.order_by(_c.run_at).limit(1)).scalar()
        return at

    def _claim(self) -> Claim | None:
        # A new rotation each time: what is due now may have come a moment ago.
        pick = partial(RoundRobin(self._connection.engine).claim, check_scheduled=True)
        with self._connection.begin_nested():
            taken, _ = claims.claim(
                self._connection, limit=1, worker_id="jobkit.testing", lease=LEASE, now=self._clock(), pick=pick
            )
        return taken[0] if taken else None

    def _attempt(self, claim: Claim, loop: LoopThread) -> _Attempt:
        attempt = _Attempt(
            claim,
            registration_of(self._renderers, claim.job_type),
            self._assets,
            services=self._renderers.services,
            open_asset=lambda asset_id: self._home.ask(partial(self._open_asset, claim.company_id, asset_id)),
            start_coroutine=lambda coroutine: self._home.serve(loop.start(coroutine), attempt),
            progressed=lambda: self._home.ask(partial(self._record, attempt)),
            lease=LEASE,
        )
        attempt.look = lambda: self._home.ask(partial(claims.check, self._connection, [claim]))
        return attempt

    def _record(self, attempt: _Attempt) -> None:
        assert attempt.reported is not None
        with self._connection.begin_nested():
            reports = [(attempt.claim, attempt.reported)]
            claims.update_progress(self._connection, reports, lease=LEASE, now=self._clock())
        self._tell(attempt.claim.job_id)

    def _end(self, attempt: _Attempt) -> None:
        """From the renderer to the commit of what came of it."""
        attempt.run()
        if attempt.failure is None and attempt.remaining <= 0:
            attempt.failure = attempt.give_up()
            attempt.discard()
        if attempt.failure is None:
            with self._connection.begin_nested():
                intents.record_intents(self._connection, intents_of(attempt))
            attempt.failure = StoreBatch([attempt]).publish().get(attempt)
        _raise_what_is_the_tests(attempt.failure)
        failure, now = attempt.failure, self._clock()
        completion = end(attempt, failure, now=now)
        try:
            with self._connection.begin_nested():
                claims.finish(self._connection, [completion], now=now)
        except sa.exc.DBAPIError:
            if failure is None:
                raise
            raise RuntimeError(
                f"the renderer of job {attempt.claim.job_id} left the session's transaction unusable: "
                f"{error_message(failure)}"
            ) from failure

    def _open_asset(self, company_id: str, asset_id: UUID | str) -> BinaryIO:
        asset = self._assets.get_by_id(self._session, asset_id, company_id=company_id)
        if asset is None:
            raise AssetNotFound(f"no asset {asset_id}")
        return self._assets.open(asset)

    def _tell(self, job_id: UUID) -> None:
        """Signals for the job's events that were not told yet."""
        told = _told.setdefault(self._session, {})
        log = sa.select(_e.id, sa.literal(0), _e.seq, _e.company_id, _e.type, _e.job_id, _e.created_at, _e.payload)
        log = log.where(_e.job_id == job_id, _e.seq > told.get(job_id, 0)).order_by(_e.seq)
        rows = [EventRow(*row) for row in self._connection.execute(log)]
        if rows:
            told[job_id] = rows[-1].seq
        # No position of the log is behind a transaction that is not committed: a replay from here is a replay of all.
        signals.deliver(event_of(row, Position(0, 0)) for row in rows)


class _Attempt(Attempt):
    """Asks the database at each ``ctx.check()``, where a runner's leases are looked at by a thread."""

    look: Callable[[], dict[UUID, bool] | None]

    def check(self) -> None:
        if not self.interrupted and (held := self.look()) is not None:
            tell(self, held)
        super().check()


class _Home:
    """The thread that the session belongs to. While it waits for a coroutine, it answers what the loop's thread asks:
    no connection is used by two threads.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._asked: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def ask(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the thread of the session."""
        if threading.get_ident() == self._thread:
            return work()
        answer: Future[T] = Future()
        self._asked.put(partial(_answer, answer, work))
        return answer.result()

    def serve(self, future: Future[Any], attempt: Attempt) -> Any:
        return _Served(future, self._asked, attempt)


class _Served:
    """A coroutine's future, for the thread of the session to wait for."""

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
