"""The workshop: the threads on which a runner's jobs are rendered and stored. No transaction is open there."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, Protocol
from uuid import UUID

from jobkit.assets import AssetStore
from jobkit.attempt import Attempt
from jobkit.claims import Claim
from jobkit.context import Registration, RenderContext, Renderer
from jobkit.errors import AssetNotFound, JobTimeout, UnknownJobType
from jobkit.link import SharedLink
from jobkit.pools import LoopThread, Task
from jobkit.renderers import Renderers

logger = logging.getLogger("jobkit")

# How long storing one job's files may take, in seconds, before another thread takes the place of the one that waits for
# the storage. Nothing is given up: the files may still arrive.
STALLED = 60.0
# While a transaction commits, a slot could render several jobs that take next to no time. So many are claimed ahead of
# the slots as long as each of the last ones took less than so many seconds, and none at work has taken longer.
AHEAD = 16
QUICK = 0.02
# What was claimed ahead goes back into the queue once every slot has been busy with one job for so many seconds. Not
# less than QUICK: what has just gone back would be claimed again. Longer than a process usually stands still.
STUCK = 1.0


class Pool(Protocol):
    #: Whether what is submitted may wait for a thread.
    waits: bool

    def submit(self, task: Task) -> None: ...
    def replace(self) -> None: ...
    def close(self) -> None: ...


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
        shared: SharedLink,
        progressed: Callable[[], None],
        wanted: Callable[[Attempt], bool],
        rendered: Callable[[Attempt], None],
        stored: Callable[[Attempt, BaseException | None], None],
    ) -> None:
        self._assets, self._renderers, self._lease = assets, renderers, lease
        self._concurrency, self._slots, self._publishers = concurrency, slots, publishers
        self._shared, self._progressed = shared, progressed
        self._wanted, self._rendered, self._stored = wanted, rendered, stored
        self._loop = LoopThread()
        #: The attempts whose renderers run, in the order in which they began.
        self.rendering: dict[Attempt, None] = {}
        self._storing: dict[Attempt, float] = {}
        # How long the last renderers took.
        self._paces: deque[float] = deque(maxlen=AHEAD)
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

    def render(self, attempt: Attempt) -> None:
        """Begin; ``rendered`` gets it when its renderer has ended."""
        self.rendering[attempt] = None
        self._slots.submit(lambda: self._render(attempt))

    def store(self, attempt: Attempt) -> None:
        """Store the files of a rendered job, whose keys are recorded; ``stored`` gets what came of it."""
        self._storing[attempt] = time.monotonic() + STALLED
        self._publishers.submit(lambda: self._store(attempt))

    def ended(self, attempt: Attempt) -> None:
        """Its renderer, or storing its files, is over: what ``rendered`` and ``stored`` tell comes back here."""
        if self.rendering.pop(attempt, 0) is None:
            self._paces.append(attempt.took or 0.0)
        self._storing.pop(attempt, None)

    @property
    def ahead(self) -> int:
        """How many jobs may wait for a slot."""
        now = time.monotonic()
        at_work = (now - began for began in self._began())
        quick = self._slots.waits and len(self._paces) == AHEAD and max(*self._paces, *at_work) < QUICK
        return AHEAD if quick else 0

    def stuck(self) -> list[Attempt]:
        """Withdraw the attempts that wait for slots that are all taken by slower ones."""
        if self._stuck_in() > 0:
            return []
        withdrawn = [attempt for attempt in self.rendering if attempt.withdraw()]
        for attempt in withdrawn:
            del self.rendering[attempt]
        return withdrawn

    def _stuck_in(self) -> float:
        """For how many seconds nothing can be stuck."""
        began = self._began()
        if len(began) < self._concurrency or len(self.rendering) == len(began):
            return math.inf
        return max(began) + STUCK - time.monotonic()

    def _began(self) -> list[float]:
        """When each of the renderers that are at work now began."""
        return [attempt.started for attempt in self.rendering if attempt.started is not None and attempt.took is None]

    @property
    def patience(self) -> float:
        """For how many seconds nothing can be overdue."""
        now = time.monotonic()
        renderers = [attempt.remaining for attempt in self.rendering]
        storing = (late - now for late in self._storing.values())
        return max(0.0, min(3600.0, self._stuck_in(), *renderers, *storing))

    def overdue(self) -> list[tuple[Attempt, JobTimeout]]:
        """Give up the attempts whose renderers took too long, and replace the threads that wait for the storage."""
        given_up = []
        for attempt in [attempt for attempt in self.rendering if attempt.remaining <= 0]:
            if attempt.leave():
                del self.rendering[attempt]
                given_up.append((attempt, attempt.give_up()))
                self._replace(self._slots)
        now = time.monotonic()
        for attempt in [attempt for attempt, late in self._storing.items() if late <= now]:
            self._storing[attempt] = now + STALLED
            if attempt.leave():
                self._storing[attempt] = math.inf
                self._replace(self._publishers)
                logger.warning("job %s: its files take long to be stored", attempt.claim.job_id)
        return given_up

    def close(self) -> None:
        """Let the threads end when they are through. Waits for none."""
        self._slots.close()
        self._publishers.close()
        self._loop.close()

    def _replace(self, pool: Pool) -> None:
        pool.replace()
        self.replaced += 1

    def _render(self, attempt: Attempt) -> bool:
        if not attempt.begin():
            return False
        attempt.run()
        late = attempt.over()
        if late or not self._wanted(attempt):
            attempt.discard()
        if not late:
            self._rendered(attempt)
        return late

    def _store(self, attempt: Attempt) -> bool:
        failure: BaseException | None = None
        try:
            attempt.publish()
        except BaseException as error:  # storages run event loops, whose CancelledError is no Exception
            failure = error
        late = attempt.over()
        self._stored(attempt, failure)
        if failure is not None:
            with suppress(Exception):  # a host's log handler may raise
                logger.warning("job %s: its files could not be stored", attempt.claim.job_id, exc_info=failure)
        return late

    def _open_asset(self, company_id: str, asset_id: UUID | str) -> BinaryIO:
        with self._shared.use() as connection:
            asset = self._assets.get_by_id(connection, asset_id, company_id=company_id)
        if asset is None:
            raise AssetNotFound(f"no asset {asset_id}")
        return self._assets.open(asset)


def registration_of(renderers: Renderers, job_type: str) -> Registration:
    """How a job of this type is rendered; of an unknown type, by a renderer that says so."""
    try:
        return renderers.find(job_type)
    except UnknownJobType as error:
        return Registration(_raising(error))


def _raising(error: UnknownJobType) -> Renderer:
    def render(_: RenderContext) -> None:
        raise error

    return render
