"""The supervisor: a runner's threads from start to stop. A call to the database that never answers is cut, and when
even that does not end it, its thread is replaced.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from jobkit.base.text import error_message
from jobkit.base.threads import Periodic
from jobkit.db.connections import GIVE_UP, SharedConnection, abort_overdue
from jobkit.maintenance.rescue import Rescuer
from jobkit.rendering.attempt import Attempt
from jobkit.runner.leases import LeaseKeeper
from jobkit.runner.pipeline import Pipeline
from jobkit.types import RunnerMetrics

logger = logging.getLogger("jobkit")

# How often the calls under way are looked at, in seconds.
LOOK = 1.0
# How long a stopping runner waits for its last statement, and then for its other threads, in seconds.
RELEASE_WAIT = 2.0


class Supervisor:
    """A pipeline with its lease keeper, rescuer and sweeper. ``start`` and ``stop`` once; the rest from any thread."""

    def __init__(
        self,
        *,
        pipeline: Callable[[Callable[[], None]], Pipeline],
        keeper: Callable[[Callable[[], list[Attempt]]], LeaseKeeper],
        rescuer: Callable[[Callable[[], None]], Rescuer],
        sweeper: Periodic,
        listen: Callable[[Callable[[], None]], Callable[[], None]],
        shared: SharedConnection,
        db_timeout: float,
        renewal_timeout: float,
    ) -> None:
        """``pipeline``, ``keeper`` and ``rescuer`` make one; ``listen`` lets hints at new jobs call a function, until
        what it returns is called; ``shared`` is the connection they use in turns. ``db_timeout``: how long any use of a
        connection may last, in seconds; ``renewal_timeout``: the keeper's.
        """
        self._make_pipeline, self._listen = pipeline, listen
        self._unsubscribe: Callable[[], None] = lambda: None
        self._make_keeper, self._make_rescuer = keeper, rescuer
        self._sweeper, self._shared = sweeper, shared
        self._db_timeout, self._renewal_timeout = db_timeout, renewal_timeout
        self.pipeline = pipeline(self._hear)
        self._keeper, self._rescuer = keeper(self._attempts), rescuer(self._wake)
        self._past = RunnerMetrics()
        self._stopping = False
        self._dead: Pipeline | None = None
        self._watch = Periodic("jobkit-watch", min(LOOK, db_timeout / 4), self._look)

    def start(self) -> None:
        """Start every thread."""
        self._spawn(self.pipeline)
        self._unsubscribe = self._listen(self._wake)
        for timer in (self._keeper.timer, self._rescuer.timer, self._sweeper, self._watch):
            timer.start()

    def stop(self, timeout: float) -> None:
        """Let the jobs in flight end; those that have not after ``timeout`` seconds go back into the queue. Called
        again from another thread, a shorter ``timeout`` counts.
        """
        self._stopping = True
        self._unsubscribe()
        pipeline = self.pipeline
        pipeline.stop()
        over = False
        try:
            over = pipeline.wait_over(timeout)
        finally:  # also when Ctrl-C ends the wait: what is in flight goes back to the queue
            if not over:
                pipeline.abandon()
                over = pipeline.wait_over(RELEASE_WAIT)
            self._end(self._keeper.timer, self._rescuer.timer, self._sweeper, self._watch)
        if not over:
            logger.error("the runner's thread does not answer; its jobs stay claimed until their lease runs out")

    def wait_idle(self, timeout: float | None) -> bool:
        """Wait until a look that began after this call found nothing to do and nothing is in flight, or until stopped;
        False at the timeout.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            pipeline = self.pipeline
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not pipeline.wait_idle(pipeline.ask(), remaining):
                return False
            if pipeline is self.pipeline:
                return True

    def metrics(self) -> RunnerMetrics:
        """Counts since ``start``."""
        return self._past + self.pipeline.metrics()

    def _end(self, *timers: Periodic) -> None:
        """End their threads, and give them a moment to give their connections back."""
        deadline = time.monotonic() + RELEASE_WAIT
        for timer in timers:
            timer.stop()
        for timer in timers:
            timer.join(deadline - time.monotonic())

    def _attempts(self) -> list[Attempt]:
        return self.pipeline.attempts()

    def _wake(self) -> None:
        self.pipeline.wake()

    def _hear(self) -> None:
        self._keeper.hear()

    def _spawn(self, pipeline: Pipeline) -> None:
        threading.Thread(target=self._work, args=(pipeline,), name="jobkit-runner", daemon=True).start()

    def _work(self, pipeline: Pipeline) -> None:
        try:
            pipeline.run()
        except Exception as error:
            self._dead = pipeline
            logger.error("the runner's thread failed, and is replaced: %s", error_message(error), exc_info=error)

    def _look(self) -> None:
        pipeline, keeper, rescuer = self.pipeline, self._keeper, self._rescuer
        stuck = abort_overdue(pipeline.link, self._db_timeout)
        unrenewed = abort_overdue(keeper.link, self._renewal_timeout)
        abort_overdue(self._shared, self._db_timeout)
        if self._stopping:
            return
        if stuck or pipeline is self._dead:
            self.pipeline, self._past = self._make_pipeline(self._hear), self._past + pipeline.metrics()
            pipeline.leave_to_leases()
            self._replaced("runner")
            self._spawn(self.pipeline)
        if unrenewed:
            keeper.timer.stop()
            self._keeper = self._make_keeper(self._attempts)
            self._replaced("lease")
            self._keeper.timer.start()
        if rescuer.timer.busy > GIVE_UP * self._db_timeout:
            rescuer.timer.stop()
            self._rescuer = self._make_rescuer(self._wake)
            self._replaced("rescue")
            self._rescuer.timer.start()

    def _replaced(self, name: str) -> None:
        self._past += RunnerMetrics(replaced=1)
        logger.error("the database does not answer the %s thread; another takes its place", name)
