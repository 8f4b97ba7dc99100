"""Renderers: functions that turn a job's input into files, kept by job type."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any, BinaryIO, TypeVar
from uuid import UUID

from jobkit.assets.store import AssetStore
from jobkit.base.clock import seconds
from jobkit.base.ids import new_id
from jobkit.base.loops import LoopThread
from jobkit.base.text import storable
from jobkit.errors import AssetNotFound, UnknownJobType
from jobkit.jobs.claims import Claim
from jobkit.jobs.creation import canonical
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import (
    Around,
    DescribeError,
    Registration,
    RenderContext,
    RenderEnvironment,
    Renderer,
)
from jobkit.types import Rendered

__all__ = ["RenderContext", "Renderer", "Renderers"]

R = TypeVar("R", bound=Callable[..., Any])


class Renderers:
    """Renderers by job type. Register all of them before the runner starts.

    ``default`` renders job types that nobody registered; without one such a job fails with a message that names its
    type. ``services`` is handed to every renderer as ``ctx.services``.

    ``around(ctx)`` gives a context manager in which each attempt is made, on the renderer's thread: for an app context,
    a session to be removed, a trace. ``ctx`` tells the job, its company and the attempt (``ctx.input`` is the job's, as
    yet unchecked). The manager sees the outcome as its ``with`` block ends: nothing when the files are complete,
    otherwise the exception, which it cannot swallow; what it raises itself fails the attempt. A plain context manager
    serves ``async`` renderers too.

    ``describe_error(error)`` decides what users are told of a failed attempt; None leaves that to jobkit, which tells
    the text of ``UserError``, of checks of the input and of its own errors, and of any other error a reference. It is
    called on a runner's threads, and must be quick.
    """

    def __init__(
        self,
        *,
        default: Renderer | None = None,
        services: Any = None,
        around: Around | None = None,
        describe_error: DescribeError | None = None,
    ) -> None:
        for name, function in (("around", around), ("describe_error", describe_error)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, not {type(function).__name__}")
        self.services, self.around, self.describe_error = services, around, describe_error
        self._default = None if default is None else Registration(_checked(default))
        self._by_type: dict[str, Registration] = {}

    def register(
        self, job_type: str, *, max_attempts: int = 1, timeout: timedelta | float | None = None, input: Any = None
    ) -> Callable[[R], R]:
        """A decorator that makes a function, plain or ``async``, the renderer of ``job_type``; the function stays as it
        is.

        ``max_attempts``: how often it may run before its error fails the job; the pauses between grow exponentially
        from five seconds to an hour. A worker that is lost does not count. ``timeout``: how long a run may take, in
        seconds or as timedelta; then the attempt fails with ``JobTimeout``. A thread cannot be killed: what a renderer
        does that goes on, neither a coroutine nor calling ``ctx.check()``, changes nothing, and keeps its thread until
        it ends, while another takes its place. ``input``: a pydantic model, msgspec struct,
        dataclass or callable that turns the job's input into ``ctx.input``. ``ValueError`` when the type is blank or
        taken.
        """
        storable(job_type, "job_type", limit=255)
        if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or max_attempts < 1:
            raise ValueError(f"max_attempts must be a count above zero, not {max_attempts!r}")
        limit = None if timeout is None else seconds(timeout, "timeout")

        def keep(renderer: R) -> R:
            if job_type in self._by_type:
                raise ValueError(f"job_type {job_type!r} has a renderer already")
            self._by_type[job_type] = Registration(_checked(renderer), input, max_attempts, limit)
            return renderer

        return keep

    def find(self, job_type: str) -> Registration:
        """The registration for ``job_type``, or the default's; ``UnknownJobType``."""
        found = self._by_type.get(job_type, self._default)
        if found is None:
            raise UnknownJobType(job_type)
        return found

    def render(self, job_type: str, input: dict[str, Any] | None = None) -> list[Rendered]:
        """Render in this thread, without a database: the files, each with its body as ``bytes``. For tests and scripts.

        Raises what the renderer raises, and what would fail the job. ``ctx.open_asset`` finds nothing.
        """
        registration = self.find(job_type)
        claim = Claim(new_id(), "render", job_type, canonical({} if input is None else input)[1], None, 1, 1)
        with closing(LoopThread()) as loop, tempfile.TemporaryDirectory(prefix="jobkit-render-") as folder:
            environment = RenderEnvironment(AssetStore(folder), loop, _no_asset, self.services, around=self.around)
            attempt = Attempt(claim, registration, environment)
            attempt.render()
            return [Rendered(d.filename or "file", d.content_type, d.spool.path.read_bytes()) for d in attempt.drafts]


def _no_asset(_company_id: str, asset_id: UUID | str) -> BinaryIO:
    raise AssetNotFound(f"no asset {asset_id}: there is no database behind Renderers.render")


def _checked(renderer: R) -> R:
    if not callable(renderer):
        raise TypeError(f"a renderer must be callable, {type(renderer).__name__} is not")
    return renderer


def registration_of(renderers: Renderers, job_type: str) -> Registration:
    """As ``Renderers.find``; for an unknown type, a renderer that raises ``UnknownJobType``."""
    try:
        return renderers.find(job_type)
    except UnknownJobType:

        def refuse(context: RenderContext) -> None:
            raise UnknownJobType(context.job_type)

        return Registration(refuse)
