"""The workshop: the threads on which a runner's jobs are rendered and stored. No transaction is open there."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import BinaryIO
from uuid import UUID

from jobkit.assets import AssetStore
from jobkit.attempt import Attempt
from jobkit.batches import Batch, batches
from jobkit.claims import Claim
from jobkit.context import Registration, RenderContext, Renderer
from jobkit.errors import AssetNotFound, JobTimeout, UnknownJobType
from jobkit.link import SharedLink
from jobkit.pace import Pace
from jobkit.pools import LoopThread
from jobkit.renderers import Renderers
from jobkit.slots import Pool, Slots

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
        shared: SharedLink,
        progressed: Callable[[], None],
        wanted: Callable[[Attempt], bool],
        rendered: Callable[[Attempt], None],
        stored: Callable[[Batch], None],
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
        self._storing: dict[Batch, float] = {}
        self._pace = Pace(self.rendering)
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
        for batch in batches(attempts, self._assets.together):
            self._storing[batch] = time.monotonic() + STALLED
            self._publishers.submit(partial(self._store, batch))

    def engage(self) -> None:
        """Put as many slots to work as what waits is worth. To be called again when ``patience`` is over."""
        self._slots.engage(self._pace.threads(len(self._slots), self._slots.crew))

    def ended(self, attempt: Attempt) -> None:
        """Its renderer is over: what ``rendered`` gets comes back here."""
        if self.rendering.pop(attempt, 0) is None:
            self._pace.add(attempt.took or 0.0)

    def settled(self, batch: Batch) -> None:
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

    def _store(self, batch: Batch) -> bool:
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
