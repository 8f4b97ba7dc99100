"""The supervisor: a runner's threads. A database call that lasts too long is cut; a thread not freed by it replaced."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from jobkit.assets.intents import INTENT_GRACE, GarbageCollector
from jobkit.base.text import error_message
from jobkit.base.threads import DaemonPool, Periodic
from jobkit.db.connections import GIVE_UP, SharedConnection, abort_overdue
from jobkit.db.dialects import statements_for
from jobkit.db.sqlite import FileWatch
from jobkit.events.feed import Feed
from jobkit.jobs.claims import Claim
from jobkit.maintenance.rescue import Rescuer
from jobkit.runner.in_flight import InFlight
from jobkit.runner.leases import LeaseKeeper
from jobkit.runner.pipeline import Pipeline
from jobkit.runner.settings import Settings
from jobkit.types import RunnerMetrics

logger = logging.getLogger("jobkit")
# Threads that store files.
STORE_THREADS = 4
# Seconds between two sweeps of the storage.
SWEEP_INTERVAL = 3600.0
# Seconds between two checks for calls that last too long, and for the file of an SQLite database.
LOOK = 0.5
# How long a stopping runner waits for its last statement, and then for its other threads, in seconds.
RELEASE_WAIT = 2.0


class Supervisor:
    """A pipeline with its lease keeper, rescuer and sweeper. ``start`` and ``stop`` once; the rest from any thread."""

    def __init__(self, settings: Settings, feed: Feed) -> None:
        """``feed`` delivers what is committed here."""
        engine, lease, self._db_timeout = settings.engine, settings.lease, settings.db_timeout
        self._settings, self.feed = settings, feed
        feed.hurry(self._db_timeout)
        self._past = RunnerMetrics()
        self._stopping = False
        self._dead: Pipeline | None = None
        self._unsubscribe: Callable[[], None] | None = None
        # Where there is one writer at a time, a renewal may wait for longer than a short lease, and then succeed.
        waits_for_writers = statements_for(engine).claim_locks
        self._renewal_timeout = self._db_timeout if waits_for_writers else min(self._db_timeout, lease / 3)
        # What rescuer, sweeper and renderers use in turns.
        self._shared = SharedConnection(engine, self._db_timeout / 2)
        in_flight = InFlight()
        self._keeper = self._new_keeper(in_flight)
        self.pipeline = self._new_pipeline(in_flight)
        self._rescuer = self._new_rescuer()
        collector = GarbageCollector(engine, settings.assets.storage, older_than=INTENT_GRACE, connect=self._shared.use)
        self._sweeper = Periodic("jobkit-sweep", SWEEP_INTERVAL, collector.run)
        self._watchdog = Periodic("jobkit-watch", min(LOOK, self._db_timeout / 4), self._check)
        self._file = FileWatch.of(engine)
        #: Why it has stopped by itself.
        self.failure: str | None = None

    def start(self) -> None:
        """Start every thread."""
        self._spawn(self.pipeline)
        self._unsubscribe = self.feed.on_jobs(self.wake)
        for timer in self._timers:
            timer.start()

    def stop(self, timeout: float) -> bool:
        """Let jobs in flight end; queue again those left after ``timeout`` seconds (the shortest of all calls'). True
        when none was left; False also when it has stopped by itself.
        """
        self._stopping = True
        if self._unsubscribe is not None:
            self._unsubscribe()
        pipeline = self.pipeline
        pipeline.stop()
        ended = False
        try:
            ended = pipeline.wait_ended(timeout)
        finally:  # also when Ctrl-C ends the wait: what is in flight goes back to the queue
            if not ended:
                pipeline.abandon()
                ended = pipeline.wait_ended(RELEASE_WAIT)
            self._end()
        if not ended:
            logger.error("the runner's thread does not answer; its jobs stay claimed until their lease runs out")
        return ended and self.failure is None and not pipeline.unfinished

    def wake(self) -> None:
        """Look for jobs now rather than at the next poll. Also in a signal handler."""
        self.pipeline.wake()

    def wait_idle(self, timeout: float | None) -> bool:
        """Wait until a claim begun after this call finds nothing and no job is in flight; False at the timeout."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            pipeline = self.pipeline
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not pipeline.wait_idle(pipeline.request_idle(), remaining):
                return False
            if pipeline is self.pipeline:
                return True

    def metrics(self) -> RunnerMetrics:
        """Counts since ``start``."""
        return self._past + self.pipeline.metrics()

    def held(self) -> list[Claim]:
        """The claims of this runner's jobs that are alive."""
        return [attempt.claim for attempt in self.pipeline.in_flight.living()]

    def _new_pipeline(self, in_flight: InFlight) -> Pipeline:
        return Pipeline(
            self._settings,
            self._settings.environment(self._shared, in_flight.progressed),
            in_flight,
            render_pool=DaemonPool(self._settings.concurrency, "jobkit-render"),
            store_pool=DaemonPool(STORE_THREADS, "jobkit-store"),
            on_commit=self.feed.publish,
        )

    def _new_keeper(self, in_flight: InFlight) -> LeaseKeeper:
        engine, lease, clock = self._settings.engine, self._settings.lease, self._settings.clock
        return LeaseKeeper(engine, lease, in_flight, clock=clock, on_commit=self.feed.publish)

    def _new_rescuer(self) -> Rescuer:
        lease, clock = self._settings.lease, self._settings.clock
        return Rescuer(
            self._shared, lease=lease, clock=clock, on_commit=self.feed.publish, wake=self.wake, mine=self.held
        )

    @property
    def _timers(self) -> list[Periodic]:
        return [self._keeper.timer, self._rescuer.timer, self._sweeper, self._watchdog]

    def _check_file(self) -> None:
        """Stop, without a word to the database, when its file is no longer the one that is open."""
        if (reason := self._file.lost()) is not None and not self._stopping:
            self.failure, self._stopping = reason, True
            logger.error("the runner has stopped: %s", reason)
            for timer in self._timers:
                timer.stop()
            self.pipeline.leave_to_leases()

    def _end(self) -> None:
        """Stop the threads; wait a moment until they have given their connections back."""
        deadline, timers = time.monotonic() + RELEASE_WAIT, self._timers
        for timer in timers:
            timer.stop()
        for timer in timers:
            timer.join(deadline - time.monotonic())

    def _spawn(self, pipeline: Pipeline) -> None:
        threading.Thread(target=self._work, args=(pipeline,), name="jobkit-runner", daemon=True).start()

    def _work(self, pipeline: Pipeline) -> None:
        try:
            pipeline.run()
        except Exception as error:
            self._dead = pipeline
            logger.error("the runner's thread failed, and is replaced: %s", error_message(error), exc_info=error)

    def _check(self) -> None:
        pipeline, keeper, rescuer = self.pipeline, self._keeper, self._rescuer
        stuck = abort_overdue(pipeline.link, self._db_timeout)
        unrenewed = abort_overdue(keeper.link, self._renewal_timeout)
        abort_overdue(self._shared, self._db_timeout)
        self._check_file()
        if self._stopping:
            return
        if stuck or pipeline is self._dead:
            in_flight = InFlight(pipeline.in_flight.reported)
            self.pipeline, self._past = self._new_pipeline(in_flight), self._past + pipeline.metrics()
            keeper.in_flight = in_flight
            pipeline.leave_to_leases()
            self._replaced("runner")
            self._spawn(self.pipeline)
        if unrenewed:
            keeper.timer.stop()
            self._keeper = self._new_keeper(self.pipeline.in_flight)
            self._replaced("lease")
            self._keeper.timer.start()
        if rescuer.timer.busy > GIVE_UP * self._db_timeout:
            rescuer.timer.stop()
            self._rescuer = self._new_rescuer()
            self._replaced("rescue")
            self._rescuer.timer.start()

    def _replaced(self, name: str) -> None:
        self._past += RunnerMetrics(replaced=1)
        logger.error("the database does not answer the %s thread; another takes its place", name)
