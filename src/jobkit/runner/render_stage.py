"""The workshop: the threads on which a runner's jobs are rendered and stored. No transaction is open there."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import BinaryIO
from uuid import UUID

from jobkit.assets.store import AssetStore
from jobkit.base.loops import LoopThread
from jobkit.base.threads import Pool
from jobkit.db.connections import SharedConnection
from jobkit.errors import AssetNotFound, JobTimeout
from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.renderers import Renderers, registration_of
from jobkit.runner.store_stage import StoreBatch, store_batches

logger = logging.getLogger("jobkit")

# How long storing one job's files may take, in seconds, before another thread takes the place of the one that waits for
# the storage. Nothing is given up: the files may still arrive.
STALLED = 60.0
# While a transaction commits, a slot could render several jobs that take next to no time: so many are claimed ahead of
# the slots as long as renderers are quick.
AHEAD = 32
# What was claimed ahead goes back into the queue once every slot has been busy with one job for so many seconds. Not
# less than what is quick: what has just gone back would be claimed again. Longer than a process usually stands still.
STUCK = 1.0


class Workshop:
    """Renders and stores. ``rendered`` and ``stored`` are called on its threads; the rest belongs to one thread."""

    def __init__(
        self,
        assets: AssetStore,
        renderers: Renderers,
        *,
        concurrency: int,
        slots: Pool,
        publishers: Pool,
        lease: float,
        shared: SharedConnection,
        progressed: Callable[[], None],
        wanted: Callable[[Attempt], bool],
        rendered: Callable[[Attempt], None],
        stored: Callable[[StoreBatch], None],
    ) -> None:
        self._assets, self._renderers, self._lease = assets, renderers, lease
        self._concurrency, self._publishers = concurrency, publishers
        self._slots, self._may_wait = Slots(slots, concurrency, self._render), slots.waits
        self._shared, self._progressed = shared, progressed
        self._wanted, self._rendered, self._stored = wanted, rendered, stored
        self._loop = LoopThread()
        #: The attempts whose renderers run, in the order in which they began.
        self.rendering: dict[Attempt, None] = {}
        # What is being stored, but for what takes long, and when each batch is late.
        self._storing: dict[StoreBatch, float] = {}
        self._pace = RenderTimes(self.rendering)
        #: How many threads were replaced because what they called went on for too long.
        self.replaced = 0

    def attempt(self, claim: Claim) -> Attempt:
        """An attempt at a claimed job, to be rendered here."""
        return Attempt(
            claim,
            registration_of(self._renderers, claim.job_type),
            self._assets,
            services=self._renderers.services,
            open_asset=lambda asset_id: self._open_asset(claim.company_id, asset_id),
            start_coroutine=self._loop.start,
            progressed=self._progressed,
            lease=self._lease,
        )

    def render(self, attempts: Sequence[Attempt]) -> None:
        """Begin, in this order; ``rendered`` gets each when its renderer has ended."""
        self.rendering.update(dict.fromkeys(attempts))
        self._slots.add(attempts)
        self.engage()

    def store(self, attempts: Sequence[Attempt]) -> None:
        """Store the files of rendered jobs, whose keys are recorded; ``stored`` gets each batch when it is over."""
        for batch in store_batches(attempts, self._assets.together):
            self._storing[batch] = time.monotonic() + STALLED
            self._publishers.submit(partial(self._store, batch))

    def engage(self) -> None:
        """Put as many slots to work as what waits is worth. To be called again when ``patience`` is over."""
        self._slots.engage(self._pace.threads(len(self._slots), self._slots.crew))

    def ended(self, attempt: Attempt) -> None:
        """Its renderer is over: what ``rendered`` gets comes back here."""
        if self.rendering.pop(attempt, 0) is None:
            self._pace.add(attempt.took or 0.0)

    def settled(self, batch: StoreBatch) -> None:
        """Its files are stored, or were not: what ``stored`` gets comes back here."""
        self._storing.pop(batch, None)

    @property
    def ahead(self) -> int:
        """How many jobs may wait for a slot."""
        return AHEAD if self._may_wait and self._pace.quick else 0

    @property
    def soon(self) -> int:
        """How many calls of ``rendered`` and ``stored`` are likely in a moment."""
        # One upload to a storage far away says nothing about the next.
        storing = len(self._storing) if self._assets.together else 0
        return storing + (len(self.rendering) if self.ahead else 0)

    def stuck(self) -> list[Attempt]:
        """Withdraw the attempts that wait for slots that are all taken by slower ones."""
        if self._stuck_in() > 0:
            return []
        withdrawn = [attempt for attempt in self.rendering if attempt.handover.withdraw()]
        for attempt in withdrawn:
            del self.rendering[attempt]
        return withdrawn

    def _stuck_in(self) -> float:
        """For how many seconds nothing can be stuck."""
        began = self._pace.began
        if len(began) < self._concurrency or len(self.rendering) == len(began):
            return math.inf
        return max(began) + STUCK - time.monotonic()

    @property
    def patience(self) -> float:
        """For how many seconds nothing can be overdue."""
        now = time.monotonic()
        renderers = [attempt.remaining for attempt in self.rendering]
        storing = (late - now for late in self._storing.values())
        engaging = self._pace.steady if self._slots.idle else math.inf
        return max(0.0, min(3600.0, engaging, self._stuck_in(), *renderers, *storing))

    def overdue(self) -> list[tuple[Attempt, JobTimeout]]:
        """Give up the attempts whose renderers took too long, and replace the threads that wait for the storage."""
        given_up = []
        for attempt in [attempt for attempt in self.rendering if attempt.remaining <= 0]:
            if attempt.handover.leave():
                del self.rendering[attempt]
                given_up.append((attempt, attempt.give_up()))
                self._replace(self._slots)
        now = time.monotonic()
        for batch in [batch for batch, late in self._storing.items() if late <= now]:
            self._storing[batch] = now + STALLED
            if batch.handover.leave():
                del self._storing[batch]  # no turn waits for it, and it is never late again
                self._replace(self._publishers)
                first, *others = batch.attempts
                whose = f"{first.claim.job_id} and {len(others)} more" if others else str(first.claim.job_id)
                logger.warning("job %s: the files take long to be stored", whose)
        return given_up

    def close(self) -> None:
        """Let the threads end when they are through with what they have begun. Waits for none."""
        self._slots.close()
        self._publishers.close()
        self._loop.close()

    def _replace(self, pool: Pool | Slots) -> None:
        pool.replace()
        self.replaced += 1

    def _render(self, attempt: Attempt) -> bool:
        if not attempt.handover.begin():
            return False
        attempt.run()
        late = attempt.handover.over()
        if late or not self._wanted(attempt):
            attempt.discard()
        if not late:
            self._rendered(attempt)
        return late

    def _store(self, batch: StoreBatch) -> bool:
        batch.handover.begin()
        failures = batch.publish()
        late = batch.handover.over()
        self._stored(batch)
        for attempt, failure in failures.items():
            with suppress(Exception):  # a host's log handler may raise
                logger.warning("job %s: its files could not be stored", attempt.claim.job_id, exc_info=failure)
        return late

    def _open_asset(self, company_id: str, asset_id: UUID | str) -> BinaryIO:
        with self._shared.use() as connection:
            asset = self._assets.get_by_id(connection, asset_id, company_id=company_id)
        if asset is None:
            raise AssetNotFound(f"no asset {asset_id}")
        return self._assets.open(asset)


# Renderers are quick as long as each of so many took less than so many seconds, and none at work has taken longer.
LAST = 16
QUICK = 0.02
# A thread is worth its while for each so many seconds of work that are to be expected of what waits: threads that take
# turns at work of a millisecond cost more than the work. What has taken longer than that by now is worth all threads.
WORTH = 0.01


class RenderTimes:
    """Of the attempts that are in ``rendering``, and were. Used by one thread."""

    def __init__(self, rendering: Collection[Attempt]) -> None:
        self._rendering = rendering
        self._took: deque[float] = deque(maxlen=LAST)

    def add(self, took: float) -> None:
        """One has ended after so many seconds."""
        self._took.append(took)

    @property
    def began(self) -> list[float]:
        """When each of those that are at work began."""
        return [attempt.started for attempt in self._rendering if attempt.started is not None and attempt.took is None]

    @property
    def longest(self) -> float:
        """How long the one that has been at work for longest has taken so far; 0 when none is at work."""
        return max(0.0, time.monotonic() - min(self.began, default=math.inf))

    @property
    def quick(self) -> bool:
        """Whether the next ones are likely to take next to no time."""
        return len(self._took) == LAST and max(*self._took, self.longest) < QUICK

    @property
    def steady(self) -> float:
        """For how many seconds those at work cannot change what ``threads`` says."""
        return WORTH - self.longest

    def threads(self, waiting: int, crew: int) -> float:
        """How many threads so many that wait are worth. ``crew``: how many have shared the interpreter lately, because
        at work as short as this most of the time is spent waiting for the others.
        """
        if len(self._took) < LAST or self.longest >= WORTH:
            return math.inf
        return waiting * sum(self._took) / LAST / crew / WORTH


class Slots:
    """Up to ``size`` attempts rendered at a time, in the order in which they were added.

    How many threads take them is decided at each ``engage``: threads that take turns at work of a millisecond cost more
    than the work. Belongs to one thread, but for what it does on those of ``pool``.
    """

    def __init__(self, pool: Pool, size: int, render: Callable[[Attempt], bool]) -> None:
        """``render``: renders one, and tells whether another thread has taken the place of this one meanwhile."""
        self._pool, self._size, self._render = pool, size, render
        self._lock = threading.Lock()
        self._waiting: deque[Attempt] = deque()
        # How many threads take what waits, and how many of them are rendering.
        self._engaged = self._rendering = 0
        #: How many threads took what waited when they were last engaged.
        self.crew = 1

    @property
    def idle(self) -> bool:
        """Whether something waits that a thread could be engaged for."""
        # Those that are engaged and have not begun yet will take what waits.
        return bool(self._waiting) and self._engaged < min(self._size, self._rendering + len(self._waiting))

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(self, attempts: Iterable[Attempt]) -> None:
        """Let these wait. No thread is engaged for them yet."""
        with self._lock:
            self._waiting.extend(attempts)

    def engage(self, most: float) -> None:
        """Let up to ``most`` threads, and at least one, take what waits."""
        while self._one_more(most):
            self._pool.submit(self._serve)
        self.crew = max(1, self._engaged)

    def replace(self) -> None:
        """Let another thread take the place of one that goes on rendering."""
        self._pool.replace()
        self._less()

    def close(self) -> None:
        """Drop what waits, and let every thread end when it is through with what it renders. Waits for none."""
        with self._lock:
            self._waiting.clear()
        self._pool.close()

    def _one_more(self, most: float) -> bool:
        """Whether another thread shall be engaged; it is counted then."""
        with self._lock:
            wanted = min(self._size, max(1.0, most), self._rendering + len(self._waiting))
            more = bool(self._waiting) and self._engaged < wanted
            self._engaged += more
            return more

    def _less(self) -> None:
        with self._lock:
            self._engaged -= 1
            self._rendering -= 1

    def _serve(self) -> bool:
        while (attempt := self._take()) is not None:
            try:
                late = self._render(attempt)
            except BaseException:
                self._less()
                raise
            if late:
                return True
            with self._lock:
                self._rendering -= 1
        return False

    def _take(self) -> Attempt | None:
        with self._lock:
            if not self._waiting:
                self._engaged -= 1
                return None
            self._rendering += 1
            return self._waiting.popleft()
