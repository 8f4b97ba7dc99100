"""The render stage: a runner's threads that call renderers. No transaction is open there."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

from jobkit.base.mailbox import Sender
from jobkit.base.threads import Pool
from jobkit.errors import JobTimeout
from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import RenderEnvironment
from jobkit.rendering.renderers import registration_of
from jobkit.runner.in_flight import InFlight
from jobkit.runner.settings import Settings

logger = logging.getLogger("jobkit")
# How many jobs are claimed ahead of the slots while renderers are quick: a slot could render several while a
# transaction commits.
AHEAD = 32
# Release jobs claimed ahead once every slot has been busy this long (s). Above QUICK, else they are claimed again at
# once; above the usual pause of a process.
STUCK = 1.0
# With so many threads left behind by renderers beyond their timeout, and so many for each slot, nothing is claimed.
LEFT_BEHIND, LEFT_BEHIND_PER_SLOT = 16, 4


class RenderStage:
    """Renders up to ``concurrency`` attempts on threads of ``pool``; they come back to ``mailbox``. For one thread."""

    def __init__(
        self,
        settings: Settings,
        environment: RenderEnvironment,
        pool: Pool,
        in_flight: InFlight,
        mailbox: Sender[Attempt],
    ) -> None:
        self._renderers, self._environment = settings.renderers, environment
        self._concurrency, self._may_wait = settings.concurrency, pool.waits
        self._pool, self._slots = pool, Slots(pool, self._concurrency, self._render)
        self._in_flight, self._mailbox = in_flight, mailbox
        #: The attempts that were submitted and are not finished, in that order.
        self.rendering: dict[Attempt, None] = {}
        self._times = RenderTimes(self.rendering)
        #: How many threads were replaced.
        self.replaced = 0
        #: Whether nothing more is to be claimed, for want of threads, since the last ``grow``.
        self.blocked = False

    def attempt(self, claim: Claim) -> Attempt:
        """An attempt at a claimed job."""
        return Attempt(claim, registration_of(self._renderers, claim.job_type), self._environment)

    def submit(self, attempts: Sequence[Attempt]) -> None:
        """Render these, in this order."""
        self.rendering.update(dict.fromkeys(attempts))
        self._slots.add(attempts)
        self.grow()

    def grow(self) -> None:
        """Use as many threads as the waiting attempts are worth. To be called again after ``next_deadline_in``."""
        self._slots.grow(self._times.threads(len(self._slots), self._slots.active_threads))
        blocked = self.left_behind >= max(LEFT_BEHIND, LEFT_BEHIND_PER_SLOT * self._concurrency) or self._pool.stuck
        if blocked != self.blocked:
            self.blocked = blocked
            message = "nothing more is claimed" if blocked else "jobs are claimed again"
            level = logging.ERROR if blocked else logging.WARNING
            logger.log(level, "%d renderers beyond their timeout keep their threads: %s", self.left_behind, message)

    @property
    def left_behind(self) -> int:
        """How many threads are kept by renderers that were given up."""
        return self._pool.left_behind

    def finished(self, attempt: Attempt) -> None:
        """The pipeline has got ``attempt`` from the mailbox."""
        if self.rendering.pop(attempt, 0) is None:
            self._times.add(attempt.took or 0.0)

    @property
    def ahead(self) -> int:
        """How many attempts may wait for a slot."""
        return AHEAD if self._may_wait and self._times.quick else 0

    def expected_results(self) -> int:
        """How many attempts are likely to end within milliseconds."""
        return len(self.rendering) if self.ahead else 0

    def next_deadline_in(self) -> float:
        """Seconds until an attempt may be overdue or stalled, or ``grow`` may start a thread; infinite if none can."""
        growing = self._times.unchanged_for if self._slots.can_grow else math.inf
        return min(growing, self._stalled_in(), *(attempt.remaining for attempt in self.rendering))

    def overdue(self) -> list[tuple[Attempt, JobTimeout]]:
        """Give up the attempts whose renderers take too long, and replace their threads."""
        given_up = []
        for attempt in [attempt for attempt in self.rendering if attempt.remaining <= 0]:
            if attempt.task.abandon():
                del self.rendering[attempt]
                given_up.append((attempt, attempt.give_up()))
                self._slots.replace()
                self.replaced += 1
        return given_up

    def stalled(self) -> list[Attempt]:
        """Take back the attempts that wait while slower ones keep every slot, or no thread will come."""
        if not self.blocked and self._stalled_in() > 0:
            return []
        cancelled = [attempt for attempt in self.rendering if attempt.task.cancel()]
        for attempt in cancelled:
            del self.rendering[attempt]
        return cancelled

    def close(self) -> None:
        """Let the threads end once what they render has ended. Waits for none."""
        self._slots.close()
        self._environment.loop.close()

    def _stalled_in(self) -> float:
        started = self._times.started
        if len(started) < self._concurrency or len(self.rendering) == len(started):
            return math.inf
        return max(started) + STUCK - time.monotonic()

    def _render(self, attempt: Attempt) -> bool:
        if not attempt.task.start():
            return False
        attempt.run()
        given_up = attempt.task.finish()
        if given_up or not self._in_flight.wants(attempt.claim):
            attempt.discard()
        if not given_up:
            self._mailbox.put(attempt)
        return given_up


# Renderers are quick while each of the last 16, and each that runs, took less than 20 ms.
LAST, QUICK = 16, 0.02
# One thread per 10 ms of queued work, estimated from the last renders: for shorter jobs, switching costs more than the
# job. One render beyond that, and all threads are used.
WORTH = 0.01


class RenderTimes:
    """How long the last renders took, and those in ``rendering`` have taken so far. Used by one thread."""

    def __init__(self, rendering: Collection[Attempt]) -> None:
        self._rendering = rendering
        self._took: deque[float] = deque(maxlen=LAST)

    def add(self, took: float) -> None:
        """A render took this many seconds."""
        self._took.append(took)

    @property
    def started(self) -> list[float]:
        """When each running renderer started."""
        return [attempt.started for attempt in self._rendering if attempt.started is not None and attempt.took is None]

    @property
    def longest(self) -> float:
        """For how many seconds the slowest running renderer has run; 0 when none runs."""
        return max(0.0, time.monotonic() - min(self.started, default=math.inf))

    @property
    def quick(self) -> bool:
        """Whether the next renders are likely to be quick."""
        return len(self._took) == LAST and max(*self._took, self.longest) < QUICK

    @property
    def unchanged_for(self) -> float:
        """For how many seconds no running renderer can change the result of ``threads``."""
        return WORTH - self.longest

    def threads(self, waiting: int, active_threads: int) -> float:
        """How many threads to use for ``waiting`` jobs. Times include waits for the GIL: hence the division."""
        if len(self._took) < LAST or self.longest >= WORTH:
            return math.inf
        return waiting * sum(self._took) / LAST / active_threads / WORTH


class Slots:
    """Renders waiting attempts in order, on up to ``size`` threads of ``pool``; ``grow`` decides on how many."""

    def __init__(self, pool: Pool, size: int, render: Callable[[Attempt], bool]) -> None:
        """``render`` renders one attempt; True when its thread was replaced meanwhile."""
        self._pool, self._size, self._render = pool, size, render
        self._lock = threading.Lock()
        self._waiting: deque[Attempt] = deque()
        # How many threads were started or are about to be, and how many of them are rendering.
        self._threads = self._rendering = 0
        #: How many threads there were after the last ``grow``; at least 1.
        self.active_threads = 1

    @property
    def can_grow(self) -> bool:
        """Whether one more thread would have something to render."""
        # Threads that were just started will take waiting jobs: count them.
        return bool(self._waiting) and self._threads < min(self._size, self._rendering + len(self._waiting))

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, attempts: Iterable[Attempt]) -> None:
        """Let these wait. Starts no thread."""
        with self._lock:
            self._waiting.extend(attempts)

    def grow(self, most: float) -> None:
        """Let up to ``most`` threads, and at least one, render what waits."""
        while self._one_more(most):
            self._pool.submit(self._serve)
        self.active_threads = max(1, self._threads)

    def replace(self) -> None:
        """Allow another thread in the place of one that goes on rendering."""
        self._pool.replace()
        self._less()

    def close(self) -> None:
        """Drop what waits, and let every thread end once its attempt has ended. Waits for none."""
        with self._lock:
            self._waiting.clear()
        self._pool.close()

    def _one_more(self, most: float) -> bool:
        with self._lock:
            wanted = min(self._size, max(1.0, most), self._rendering + len(self._waiting))
            more = bool(self._waiting) and self._threads < wanted
            self._threads += more
            return more

    def _less(self) -> None:
        with self._lock:
            self._threads -= 1
            self._rendering -= 1

    def _serve(self) -> bool:
        while (attempt := self._next()) is not None:
            try:
                replaced = self._render(attempt)
            except BaseException:
                self._less()
                raise
            if replaced:
                return True
            with self._lock:
                self._rendering -= 1
        return False

    def _next(self) -> Attempt | None:
        with self._lock:
            if not self._waiting:
                self._threads -= 1
                return None
            self._rendering += 1
            return self._waiting.popleft()
