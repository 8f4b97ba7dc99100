"""One attempt at a job: call its renderer, read every output into a sealed draft, and tell what came of it."""

from __future__ import annotations

import inspect
import logging
import math
import tempfile
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Generator, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import closing, suppress
from typing import Any, BinaryIO, SupportsFloat
from uuid import UUID

from jobkit.assets.spool import StagedFile
from jobkit.assets.store import AssetStore
from jobkit.base.ids import new_id
from jobkit.base.text import error_message
from jobkit.base.threads import TaskState
from jobkit.errors import (
    AssetNotFound,
    Discard,
    JobTimeout,
    LeaseLost,
    RenderInterrupted,
    Retry,
    Snooze,
    UnknownJobType,
)
from jobkit.jobs.claims import Claim, Report
from jobkit.jobs.creation import canonical
from jobkit.rendering.context import Registration, RenderContext, report
from jobkit.types import Rendered, StoredObject

StartCoroutine = Callable[[Coroutine[Any, Any, Any]], "Future[Any]"]

logger = logging.getLogger("jobkit")


class Attempt:
    """One run of a claimed job's renderer. Afterwards ``failure`` says why it failed, or ``stored`` has its files."""

    def __init__(
        self,
        claim: Claim,
        registration: Registration,
        assets: AssetStore,
        *,
        services: Any,
        open_asset: Callable[[UUID | str], BinaryIO],
        start_coroutine: StartCoroutine,
        progressed: Callable[[], None] = lambda: None,
        lease: float = math.inf,
    ) -> None:
        """``progressed`` is called when ``reported`` has changed, on whatever thread the renderer does that. ``lease``:
        for how many seconds after its last renewal the claim holds.
        """
        self.claim = claim
        self.failure: BaseException | None = None
        self.max_attempts = registration.max_attempts
        # When the claim's lease was last known to have begun, on this machine's monotonic clock.
        self.renewed = time.monotonic()
        self.stored: tuple[StoredObject, ...] = ()
        #: What the renderer said last of how far it is, and what of that the job's row says.
        self.reported: Report | None = None
        self.recorded: Report | None = None
        self._progressed = progressed
        #: When its renderer began, on this machine's monotonic clock.
        self.started: float | None = None
        #: How many seconds its thread was busy with it, once that has ended.
        self.took: float | None = None
        #: Between the thread that renders and the one that may give the attempt up.
        self.handover = TaskState()
        self._interruption: RenderInterrupted | None = None
        self._awaited: Future[Any] | None = None
        self._registration = registration
        self._assets = assets
        self._start_coroutine = start_coroutine
        self._lease = lease
        # Given up once it was rendered: the context knows the attempt as well, and two objects that know each other
        # stay until the garbage collector comes, which has to look at all others to find them.
        self._context: RenderContext | None = RenderContext(
            job_id=claim.job_id,
            company_id=claim.company_id,
            job_type=claim.job_type,
            input=claim.input,
            attempt=claim.attempt,
            services=services,
            open_asset=open_asset,
            new_draft=self._draft,
            workspace=assets.spool_folder,
            check=self.check,
            progress=self._progress,
        )
        self.drafts: list[StagedFile] = self._context.drafts

    def run(self) -> None:
        """Render in this thread. Raises nothing: whatever the renderer raises, ``SystemExit`` too, is this attempt's
        ``failure``.
        """
        began = time.monotonic()
        try:
            self.render()
        except BaseException as error:  # the thread belongs to the runner: not even SystemExit may end it
            self.failure = error
            with suppress(Exception):  # a host's log handler that raises must not keep the failure from being recorded
                self._log(error)
        finally:  # with what a log handler takes, which may send mail: the thread is not free before
            self.took = time.monotonic() - began

    def render(self) -> None:
        """As ``run``, and raises what fails the attempt. Nothing of a failed attempt is left on disk."""
        context, self._context = self._context, None
        assert context is not None, "an attempt is rendered once"
        self.started = time.monotonic()
        try:
            self.check()  # it may have waited for its thread
            context.input = self._registration.parse(self.claim.input)
            self._read(self._registration.renderer(context), context)
            if not self.drafts:
                raise ValueError(f"the renderer for {self.claim.job_type!r} gave no file")
            self.stored = tuple(draft.seal(recorded=True) for draft in self.drafts)
        except BaseException:
            self.discard()
            raise
        finally:
            context.clean()

    # --- asked to stop: from other threads

    @property
    def remaining(self) -> float:
        """For how many seconds its renderer may still run."""
        timeout = self._registration.timeout
        if timeout is None:
            return math.inf
        return timeout if self.started is None else self.started + timeout - time.monotonic()

    def interrupt(self, reason: RenderInterrupted) -> None:
        """Let ``ctx.check()`` raise ``reason`` from now on, and end the coroutine that the renderer waits for."""
        self._interruption = reason
        if (awaited := self._awaited) is not None:
            awaited.cancel()

    def give_up(self) -> JobTimeout:
        """Stop a renderer that has taken too long, as far as it lets itself be stopped; the reason."""
        reason = self._overdue()
        self.interrupt(reason)
        return reason

    def check(self) -> None:
        """Raise the reason why the work is not wanted any more, if there is one."""
        if self._interruption is None:
            if self.remaining <= 0:
                self._interruption = self._overdue()
            elif time.monotonic() > self.renewed + self._lease:
                self._interruption = LeaseLost(f"the lease of job {self.claim.job_id} could not be renewed")
        if self._interruption is not None:
            raise self._interruption

    @property
    def interrupted(self) -> bool:
        """Whether the renderer was asked to stop."""
        return self._interruption is not None

    def _progress(self, fraction: SupportsFloat, message: str | None) -> None:
        latest = report(fraction, message, after=self.reported)
        if latest is not self.reported:
            self.reported = latest
            self._progressed()

    def _overdue(self) -> JobTimeout:
        return JobTimeout(
            f"the renderer for {self.claim.job_type!r} did not end within {self._registration.timeout:g} seconds"
        )

    # --- afterwards

    def discard(self) -> None:
        """Remove the spool files."""
        for draft in self.drafts:
            draft.discard()

    def _log(self, error: BaseException) -> None:
        asked = isinstance(error, RenderInterrupted | Snooze | Retry | Discard)
        # Of a job type that nobody registered, the traceback would show only jobkit.
        traceback = None if asked or isinstance(error, UnknownJobType) else error
        message = "job %s (%r) ended without files: %s" if asked else "job %s (%r) failed: %s"
        level = logging.INFO if asked else logging.WARNING
        logger.log(level, message, self.claim.job_id, self.claim.job_type, error_message(error), exc_info=traceback)

    def _draft(self, filename: str, content_type: str) -> StagedFile:
        return self._assets.draft(
            self.claim.company_id, namespace="generated", filename=filename, content_type=content_type
        )

    def _read(self, result: Any, context: RenderContext) -> None:
        if inspect.isawaitable(result):
            result = self._wait(result)
        if result is None:
            return
        if isinstance(result, Rendered):
            _spool(result, context)
            return
        outputs = self._iterate(result)
        with closing(outputs):
            for rendered in outputs:
                if not isinstance(rendered, Rendered):
                    raise TypeError(
                        f"the renderer for {self.claim.job_type!r} yielded {type(rendered).__name__}, not Rendered"
                    )
                _spool(rendered, context)

    def _iterate(self, result: Any) -> Generator[Any]:
        if isinstance(result, AsyncIterable):
            yield from self._iterate_async(aiter(result))
        elif isinstance(result, Iterable) and not isinstance(result, str | bytes | dict):
            yield from result
        else:
            raise TypeError(
                f"the renderer for {self.claim.job_type!r} returned {type(result).__name__}, "
                "not Rendered or an iterable of them"
            )

    def _iterate_async(self, iterator: Any) -> Generator[Any]:
        try:
            while True:
                try:
                    rendered = self._wait(anext(iterator))
                except StopAsyncIteration:
                    return
                yield rendered
        except CancelledError:  # the loop has ended, and has closed its generators
            raise
        except BaseException as error:
            if hasattr(iterator, "aclose"):
                closing = self._start_coroutine(_awaited(iterator.aclose()))
                if not isinstance(error, RenderInterrupted):  # which does not wait: the generator may still be running
                    closing.result()
            raise

    def _wait(self, awaitable: Any) -> Any:
        """What ``awaitable`` gives on the runner's loop; the reason instead, as soon as the attempt is interrupted."""
        self._awaited = future = self._start_coroutine(_awaited(awaitable))
        if self._interruption is not None:
            future.cancel()
        try:
            return future.result()
        except CancelledError:
            if self._interruption is not None:
                raise self._interruption from None
            raise
        finally:
            self._awaited = None


def _spool(rendered: Rendered, context: RenderContext) -> None:
    # Closed at once: a job of many files would run out of descriptors.
    with closing(context.add(rendered.filename, rendered.content_type).spool) as spool:
        spool.fill(rendered.body)


def render_alone(
    registration: Registration, services: Any, job_type: str, input: dict[str, Any] | None, start: StartCoroutine
) -> list[Rendered]:
    """The files of one job type and input, each with its body as bytes, without a database."""
    claim = Claim(new_id(), "render", job_type, canonical({} if input is None else input)[1], None, 1, 1)
    with tempfile.TemporaryDirectory(prefix="jobkit-render-") as folder:
        attempt = Attempt(
            claim, registration, AssetStore(folder), services=services, open_asset=_nothing, start_coroutine=start
        )
        attempt.render()
        return [Rendered(d.filename or "file", d.content_type, d.spool.path.read_bytes()) for d in attempt.drafts]


def _nothing(asset_id: UUID | str) -> BinaryIO:
    raise AssetNotFound(f"no asset {asset_id}: there is no database behind Renderers.render")


async def _awaited(result: Any) -> Any:
    return await result
