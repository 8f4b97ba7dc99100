"""The jobs of a run: what each kind of them renders, and what must come of it."""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import AsyncIterator, Iterator

from jobkit.errors import Discard, Retry, Snooze
from jobkit.rendering.context import RenderContext
from jobkit.rendering.renderers import Renderers
from jobkit.testing.chaos.plan import FILES
from jobkit.testing.chaos.workers.points import Points
from jobkit.testing.chaos.workers.process import Witness, now
from jobkit.types import Rendered

PREFIX = "chaos-"
# In the name of each file: under which claim it was made.
CLAIM = re.compile(r" of claim (\d+)\.bin$")
# How often a job of each kind may run before its error fails it.
ATTEMPTS = {"note": 1, "album": 3, "slow": 2, "flaky": 3, "snooze": 2, "async": 2, "fail": 1, "discard": 5}
# The words with which jobs fail on purpose.
PLANNED = "chaos: this job fails on purpose"


def content(job_id: object, position: int, size: int) -> bytes:
    """The bytes of one file of a job, which nobody else's file has."""
    block = hashlib.sha256(f"{job_id}/{position}".encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def register(renderers: Renderers, points: Points, witness: Witness) -> None:
    """Make ``renderers`` render the jobs of a run; each passes ``points``. ``witness`` tells them the claim they work
    under, which no renderer is told.
    """
    work = _Work(points, witness)
    for kind, attempts in ATTEMPTS.items():
        timeout = 30.0 if kind == "slow" else None
        renderers.register(PREFIX + kind, max_attempts=attempts, timeout=timeout)(getattr(work, f"{kind}_"))


class _Work:
    """The renderers. Each takes as long as its job says, so that there is something to interrupt."""

    def __init__(self, points: Points, witness: Witness) -> None:
        self._points, self._witness = points, witness

    def note_(self, ctx: RenderContext) -> Rendered:
        self._points.reach("renderer.start")
        _pause(ctx)
        claim = self._claim(ctx)
        self._points.reach("renderer.end")
        return Rendered(f"note{claim}.bin", "application/octet-stream", self._halves(ctx, 0))

    def album_(self, ctx: RenderContext) -> Iterator[Rendered]:
        self._points.reach("renderer.start")
        claim = self._claim(ctx)
        for position in range(FILES["album"]):
            _pause(ctx)
            if position == 1:
                with ctx.writer(f"picture 1{claim}.bin", "image/x-chaos") as out:
                    for part in self._halves(ctx, position):
                        out.write(part)
                continue
            yield Rendered(f"picture {position}{claim}.bin", "image/x-chaos", self._halves(ctx, position))
        self._points.reach("renderer.end")

    def slow_(self, ctx: RenderContext) -> Rendered:
        self._points.reach("renderer.start")
        claim = self._claim(ctx)
        for step in range(5):
            _pause(ctx, share=5)
            ctx.progress((step + 1) / 5, f"step {step + 1}")
        self._points.reach("renderer.end")
        return Rendered(f"slow{claim}.bin", "application/octet-stream", self._halves(ctx, 0))

    def flaky_(self, ctx: RenderContext) -> Rendered:
        if ctx.attempt < ATTEMPTS["flaky"]:
            raise Retry(0.1)
        return self.note_(ctx)

    def snooze_(self, ctx: RenderContext) -> Rendered:
        if (left := ctx.input["after"] - now()) > 0:
            raise Snooze(left)
        return self.note_(ctx)

    async def async_(self, ctx: RenderContext) -> AsyncIterator[Rendered]:
        self._points.reach("renderer.start")
        claim = self._claim(ctx)
        for position in range(FILES["async"]):
            await asyncio.sleep(ctx.input["milliseconds"] / 1000)
            ctx.progress(position / FILES["async"])
            yield Rendered(f"part {position}{claim}.bin", "text/plain", self._halves(ctx, position))
        self._points.reach("renderer.end")

    def fail_(self, ctx: RenderContext) -> Iterator[Rendered]:
        self._points.reach("renderer.start")
        yield Rendered("never seen.bin", "text/plain", self._halves(ctx, 0))
        raise RuntimeError(PLANNED)

    def discard_(self, ctx: RenderContext) -> Rendered:
        _pause(ctx)
        raise Discard(PLANNED)

    def _claim(self, ctx: RenderContext) -> str:
        """For the name of a file: by its end, the claim of whoever made it can be told from the one that finished."""
        fence = self._witness.fence(ctx.job_id)
        return "" if fence is None else f" of claim {fence}"

    def _halves(self, ctx: RenderContext, position: int) -> Iterator[bytes]:
        body = content(ctx.job_id, position, ctx.input["size"])
        yield body[: len(body) // 2]
        self._points.reach("renderer.half")
        yield body[len(body) // 2 :]


def _pause(ctx: RenderContext, share: int = 1) -> None:
    threading.Event().wait(ctx.input["milliseconds"] / 1000 / share)
