"""Runner: renders queued jobs on its threads, and stores their files."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Self

import sqlalchemy as sa

from jobkit import signals
from jobkit.assets.store import AssetStore
from jobkit.base.clock import Backoff, Clock, seconds, utcnow
from jobkit.base.forks import reset_in_children
from jobkit.base.ids import CompanyId
from jobkit.base.text import error_message
from jobkit.base.threads import InlinePool
from jobkit.db.connections import DedicatedConnection, SharedConnection
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow, Start
from jobkit.db.dialects.position import Position
from jobkit.db.failures import is_outage
from jobkit.db.host import leave_connections, refuse_inherited, require_pool, require_schema, sync_engine
from jobkit.db.sqlite import is_memory, refuse_deadlock
from jobkit.errors import ConfigurationError, SchemaOutOfDate
from jobkit.events import relay
from jobkit.events.feed import Feed
from jobkit.jobs import outbox
from jobkit.jobs.store import JobStore
from jobkit.maintenance.rescue import RescueLimits, RescueReport, rescue
from jobkit.rendering.renderers import Renderers
from jobkit.runner.in_flight import InFlight
from jobkit.runner.leases import LeaseKeeper
from jobkit.runner.pipeline import Pipeline
from jobkit.runner.settings import Settings
from jobkit.runner.supervisor import Supervisor
from jobkit.types import Job, JobRequest, RunnerMetrics

# How long a caller waits for the receivers of events it caused, in seconds.
DELIVERY_WAIT = 10.0

logger = logging.getLogger("jobkit")


class Runner:
    """Renders the queued jobs of ``engine``'s database, up to ``concurrency`` at a time.

    ``lease``: for how long a claim is its runner's, in seconds or as timedelta. ``poll_interval``: how often an idle
    runner looks for jobs of other processes. ``db_timeout``: how long a call to the database may take; then its
    connection is cut, and the work goes on with another.

    At most four connections of ``engine`` are used, at any concurrency. Every method may be called from any thread; all
    threads are daemons, and no signal handler is installed. In a forked child it is as if never started; with SQLite it
    then refuses to work there. A started runner also rescues the jobs of lost workers every second, and every hour
    removes from its storage what got no row within a day, or whose row was deleted.
    """

    def __init__(
        self,
        engine: sa.Engine,
        assets: AssetStore,
        renderers: Renderers,
        *,
        concurrency: int = 4,
        lease: timedelta | float = 60.0,
        poll_interval: timedelta | float = 1.0,
        db_timeout: timedelta | float = 30.0,
        clock: Clock = utcnow,
    ) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency must be a count above zero, not {concurrency!r}")
        self.engine = sync_engine(engine)
        statements_for(engine)
        if not isinstance(renderers, Renderers):
            raise TypeError(f"renderers must be a jobkit.Renderers, not {type(renderers).__name__}")
        if assets.engine is None:
            assets.engine = self.engine
        self.assets, self.renderers = assets, renderers
        self._settings = Settings(
            self.engine,
            assets,
            renderers,
            concurrency,
            lease=seconds(lease, "lease"),
            poll_interval=seconds(poll_interval, "poll_interval"),
            db_timeout=seconds(db_timeout, "db_timeout"),
            clock=clock,
        )
        # ``_starting`` is held while ``start`` waits for the database; ``_lock`` never.
        self._starting, self._lock = threading.RLock(), threading.RLock()
        # Set by the next ``stop``.
        self._halted = threading.Event()
        self._running: Supervisor | None = None
        self._ending: Supervisor | None = None
        self._past = RunnerMetrics()
        self._inherited = self._warned = False
        reset_in_children(self)

    # --- creating

    def submit(
        self,
        company_id: CompanyId,
        *,
        job_type: str,
        input: dict[str, Any] | None = None,
        source_task_id: str | None = None,
        run_at: datetime | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
    ) -> Job:
        """Create a job in a transaction of its own, commit, signal ``content_job.queued``, dispatch; return the job as
        created.

        Blocks on the database. Raises what ``JobStore.create`` raises, and ``ConfigurationError`` within an SQLite
        transaction of this thread that has written: it would wait for itself; use ``JobStore.create`` there.
        """
        refuse_inherited(self.engine, self._inherited)
        refuse_deadlock(self.engine, "submit", "use JobStore(session).create in it, then dispatch after the commit")
        request = JobRequest(job_type, input, source_task_id, run_at, priority, idempotency_key)
        position = Position(0, 0)
        feed = relay.running_feed(self.engine)
        with self.engine.begin() as connection:
            if feed is not None:
                position = feed.cursor
            elif signals.any_receivers():
                position = statements_for(connection).start(connection).position
            store = JobStore(connection, clock=self._settings.clock)
            job, event_id = store.insert(company_id, request)
        if event_id is not None:
            self._deliver_queued(job, event_id, position)
        self.dispatch(job)
        return job

    def _deliver_queued(self, job: Job, event_id: int, position: Position) -> None:
        kind, payload = outbox.type_of(job), outbox.payload_of(job)
        row = EventRow(event_id, 0, 1, job.company_id, kind, job.id, job.created_at, payload)
        feed = relay.running_feed(self.engine)  # it may have read the event from the log already
        if feed is not None and feed.publish([row]):
            feed.flush(DELIVERY_WAIT)
        else:
            relay.deliver_here(self.engine, [row], position)

    def dispatch(self, job: Job) -> None:
        """Ask for ``job`` to be rendered soon. Returns at once, never raises, no I/O in this thread.

        A started runner looks for queued jobs now; one that was never started will when it is. Harmless for a job whose
        transaction is not committed, for one that is dispatched twice, and for one that another runner has claimed.
        """
        running = self._running
        if running is not None:
            running.wake()
        elif self._inherited and not self._warned:
            self._warned = True
            logger.warning(
                "this runner was started before its process was forked, and does not run in the child: call start() in "
                "each worker process that shall render"
            )

    # --- running

    def start(self, *, wait: bool = False) -> Self:
        """Render jobs on threads of this process until ``stop``. Signals follow from now on. Started already: nothing
        happens.

        What is wrong is raised: ``ConfigurationError`` for an SQLite database in memory, a pool of one connection, or a
        folder for unfinished files that cannot be made; ``SchemaOutOfDate`` without the tables; what the driver raises
        when the database is away. With ``wait`` the last two are waited for instead, and logged once; a ``stop`` from
        another thread ends that, and nothing is started.
        """
        refuse_inherited(self.engine, self._inherited)
        halted = self._halted
        with self._starting:
            feed = None if self._running else self._prepare(halted, wait=wait)
            if feed is not None:
                self._start(feed, halted)
        return self

    def _prepare(self, halted: threading.Event, *, wait: bool) -> Feed | None:
        """The feed, when all is as it must be; None when a ``stop`` came before."""
        require_pool(self.engine)
        try:
            self.assets.spool_folder()
        except OSError as error:
            raise ConfigurationError(f"the folder for unfinished files cannot be made: {error}") from error
        waiting = Backoff()
        while not halted.wait(waiting.pause):
            try:
                feed = relay.acquire(self.engine)
                if waiting.succeeded():
                    logger.info("the database and its tables are there")
                return feed
            except Exception as error:
                if not (wait and (isinstance(error, SchemaOutOfDate) or is_outage(error))):
                    raise
                if waiting.failed():
                    logger.warning("the runner starts as soon as the database is ready: %s", error_message(error))
        return None

    def _start(self, feed: Feed, halted: threading.Event) -> None:
        started = False
        try:
            with self._lock:
                if not halted.is_set():
                    running = Supervisor(self._settings, feed)
                    running.start()
                    self._running, started = running, True
        finally:
            if not started:
                relay.release(feed, DELIVERY_WAIT)

    def stop(self, timeout: timedelta | float = 30.0) -> bool:
        """Claim nothing more, let the jobs in flight end, deliver their events. Not started: nothing happens.

        What has not ended after ``timeout`` goes back to the queue at once, the attempt not charged; a renderer that
        goes on nevertheless changes nothing. Returns within ``timeout`` and a few seconds, whatever renderers and
        database do: True when every job in flight ended, False when some went back, or could not be given back and wait
        for the end of their leases. A second call, from another thread, with a shorter ``timeout`` cuts the first one
        short.
        """
        limit = seconds(timeout, "timeout", positive=False)
        with self._lock:
            self._halted.set()
            self._halted = threading.Event()
            running, self._running = self._running, None
            ending = self._ending
            if running is not None:
                self._ending = running
        if running is None:
            return ending is None or ending.stop(limit)
        try:
            return running.stop(limit)
        finally:
            with self._lock:
                self._ending = None
                self._past += running.metrics()
            relay.release(running.feed, DELIVERY_WAIT)

    @property
    def failure(self) -> str | None:
        """Why a started runner has stopped by itself, as when its SQLite file was replaced or deleted; else None."""
        running = self._running
        return None if running is None else running.failure

    def metrics(self) -> RunnerMetrics:
        """What this runner counted since it was made, through every start and stop."""
        with self._lock:
            present = self._running or self._ending
            return self._past if present is None else self._past + present.metrics()

    def _after_fork(self) -> None:
        """Be as if never started. Called in a forked child."""
        leave_connections(self.engine)
        self._inherited = self._inherited or self._running is not None
        self._starting, self._lock = threading.RLock(), threading.RLock()
        self._halted = threading.Event()
        self._running = self._ending = None
        self._past = RunnerMetrics()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run_until_idle(self, timeout: timedelta | float | None = None) -> int:
        """Render what is queued, and what that creates, until nothing is left; return how many jobs ended.

        Needs no ``start``: for scripts and tests. The events were delivered when this returns. ``TimeoutError`` when
        jobs are still in flight after ``timeout``; unless the runner is started, they go back to the queue.
        """
        refuse_inherited(self.engine, self._inherited)
        limit = None if timeout is None else seconds(timeout, "timeout", positive=False)
        with self._lock:
            started, feed = self._running, relay.running_feed(self.engine)
        if started is not None and feed is not None:
            return _until_idle(started, feed, limit, before=started.metrics().ended)
        if is_memory(self.engine):
            return self._run_here()
        feed = relay.acquire(self.engine)
        try:
            with feed.catching_up():
                self._rescue(feed)
                mine = Supervisor(self._settings, feed)
                mine.start()
                try:
                    return _until_idle(mine, feed, limit, before=0)
                finally:
                    mine.stop(0.0)
                    with self._lock:
                        self._past += mine.metrics()
        finally:
            relay.release(feed, DELIVERY_WAIT)

    def rescue(self) -> RescueReport:
        """Take the jobs of lost workers, whose leases are over, back into the queue; blocks on the database.

        A started runner does so every second by itself. The attempt is not charged; a job that lost its worker six
        times in a row has failed instead, and one that was asked to stop is cancelled.
        """
        refuse_inherited(self.engine, self._inherited)
        feed = relay.acquire(self.engine)
        try:
            report = self._rescue(feed)
        finally:
            relay.release(feed, DELIVERY_WAIT)
        running = self._running
        if report.queued and running is not None:
            running.wake()
        return report

    def _rescue(self, feed: Feed) -> RescueReport:
        running = self._running
        mine = [] if running is None else running.held()
        with closing(DedicatedConnection(self.engine)) as link:
            return rescue(link, clock=self._settings.clock, on_commit=feed.publish, limits=RescueLimits(mine=mine))

    def _run_here(self) -> int:
        """Everything in this thread, one job at a time: a database in memory has one connection, for one thread."""
        require_schema(self.engine)
        settings = replace(self._settings, concurrency=1, lease=math.inf)
        in_flight = InFlight()
        keeper = LeaseKeeper(self.engine, math.inf, in_flight, clock=settings.clock, on_commit=self._deliver_here)
        pipeline = Pipeline(
            settings,
            settings.environment(SharedConnection(self.engine, 0.0), keeper.record),
            in_flight,
            render_pool=InlinePool(),
            store_pool=InlinePool(),
            on_commit=self._deliver_here,
        )
        pipeline.request_idle()
        pipeline.run(until_idle=True)
        self._past += pipeline.metrics()
        return pipeline.ended

    def _deliver_here(self, rows: Sequence[EventRow]) -> None:
        with self.engine.connect() as connection:
            statements = statements_for(connection)
            start: Start = statements.start(connection)
            jobs = [{"job": row.job_id.hex, "seq": row.seq, "queued": True} for row in rows]
            earlier = statements.earlier(connection, start.position, start, jobs)
        queued = [row for row in earlier if row.type.endswith("queued")]
        relay.deliver_here(self.engine, [*queued, *rows], start.position)


def _until_idle(supervisor: Supervisor, feed: Feed, timeout: float | None, *, before: int) -> int:
    """Wait until no job is left and no event was delivered meanwhile: receivers may create jobs, or run them
    themselves. How many jobs ended, beyond ``before``.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        ended, delivered = supervisor.metrics().ended, feed.delivered_count
        if not supervisor.wait_idle(None if deadline is None else max(0.0, deadline - time.monotonic())):
            ended = supervisor.metrics().ended - before
            raise TimeoutError(f"jobs are still in flight after {timeout} s; {ended} ended")
        feed.flush(DELIVERY_WAIT)
        if (supervisor.metrics().ended, feed.delivered_count) == (ended, delivered):
            return supervisor.metrics().ended - before
