"""One attempt at a job: call its renderer, read every output into a sealed draft, and tell what came of it."""

from __future__ import annotations

import inspect
import logging
import tempfile
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Generator, Iterable
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from typing import Any, BinaryIO
from uuid import UUID

from jobkit.assets import AssetStore
from jobkit.claims import Claim
from jobkit.context import Registration, RenderContext
from jobkit.drafts import Draft
from jobkit.errors import AssetNotFound, Discard, RenderInterrupted, Retry, Snooze, UnknownJobType
from jobkit.ids import new_id
from jobkit.payload import canonical
from jobkit.text import describe
from jobkit.types import Rendered, StoredObject

Find = Callable[[str], Registration]
RunCoroutine = Callable[[Coroutine[Any, Any, Any]], Any]

logger = logging.getLogger("jobkit")


class Attempt:
    """One run of a claimed job's renderer. Afterwards ``failure`` says why it failed, or ``stored`` has its files."""

    def __init__(
        self,
        claim: Claim,
        find: Find,
        assets: AssetStore,
        *,
        services: Any,
        open_asset: Callable[[UUID | str], BinaryIO],
        run_coroutine: RunCoroutine,
    ) -> None:
        self.claim = claim
        self.failure: BaseException | None = None
        self.max_attempts = 1
        # When the claim's lease was last known to have begun, on this machine's monotonic clock.
        self.renewed = time.monotonic()
        self.stored: tuple[StoredObject, ...] = ()
        self._find = find
        self._assets = assets
        self._run_coroutine = run_coroutine
        self._context = RenderContext(
            job_id=claim.job_id,
            company_id=claim.company_id,
            job_type=claim.job_type,
            input=claim.input,
            attempt=claim.attempt,
            services=services,
            open_asset=open_asset,
            new_draft=self._draft,
            workspace=assets.spool_folder,
        )

    @property
    def drafts(self) -> list[Draft]:
        return self._context.drafts

    def run(self) -> None:
        """Render in this thread. Raises nothing: whatever the renderer raises, ``SystemExit`` too, is this attempt's
        ``failure``.
        """
        try:
            self.render()
        except BaseException as error:  # the thread belongs to the runner: not even SystemExit may end it
            self.failure = error
            with suppress(Exception):  # a host's log handler that raises must not keep the failure from being recorded
                self._log(error)

    def render(self) -> None:
        """As ``run``, and raises what fails the attempt. Nothing of a failed attempt is left on disk."""
        try:
            registration = self._find(self.claim.job_type)
            self.max_attempts = registration.max_attempts
            self._context.input = registration.parse(self.claim.input)
            self._read(registration.renderer(self._context))
            if not self.drafts:
                raise ValueError(f"the renderer for {self.claim.job_type!r} gave no file")
            self.stored = tuple(draft.seal(recorded=True) for draft in self.drafts)
        except BaseException:
            self.discard()
            raise
        finally:
            self._context.clean()

    def interrupt(self, reason: RenderInterrupted) -> None:
        """Let ``ctx.check()`` raise ``reason`` from now on. Called from other threads."""
        self._context.interruption = reason

    @property
    def interrupted(self) -> bool:
        """Whether the renderer was asked to stop."""
        return self._context.interruption is not None

    def publish(self) -> None:
        """Store every file under its key; the spool files are gone afterwards, whatever happened."""
        try:
            for draft in self.drafts:
                draft.publish()
        finally:
            self.discard()

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
        logger.log(level, message, self.claim.job_id, self.claim.job_type, describe(error), exc_info=traceback)

    def _draft(self, filename: str, content_type: str) -> Draft:
        return self._assets.draft(
            self.claim.company_id, namespace="generated", filename=filename, content_type=content_type
        )

    def _read(self, result: Any) -> None:
        if inspect.isawaitable(result):
            result = self._run_coroutine(_awaited(result))
        if result is None:
            return
        if isinstance(result, Rendered):
            self._spool(result)
            return
        outputs = self._iterate(result)
        with closing(outputs):
            for rendered in outputs:
                if not isinstance(rendered, Rendered):
                    raise TypeError(
                        f"the renderer for {self.claim.job_type!r} yielded {type(rendered).__name__}, not Rendered"
                    )
                self._spool(rendered)

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
                    rendered = self._run_coroutine(_awaited(anext(iterator)))
                except StopAsyncIteration:
                    return
                yield rendered
        except CancelledError:  # the loop has ended, and has closed its generators
            raise
        except BaseException:
            if hasattr(iterator, "aclose"):
                self._run_coroutine(_awaited(iterator.aclose()))
            raise

    def _spool(self, rendered: Rendered) -> None:
        # Closed at once: a job of many files would run out of descriptors.
        with closing(self._context.add(rendered.filename, rendered.content_type).spool) as spool:
            spool.fill(rendered.body)


def render_alone(
    find: Find, services: Any, job_type: str, input: dict[str, Any] | None, *, run_coroutine: RunCoroutine
) -> list[Rendered]:
    """The files of one job type and input, each with its body as bytes, without a database."""
    claim = Claim(new_id(), "render", job_type, canonical({} if input is None else input)[1], None, 1, 1)
    with tempfile.TemporaryDirectory(prefix="jobkit-render-") as folder:
        attempt = Attempt(
            claim, find, AssetStore(folder), services=services, open_asset=_nothing, run_coroutine=run_coroutine
        )
        attempt.render()
        return [Rendered(d.filename or "file", d.content_type, d.spool.path.read_bytes()) for d in attempt.drafts]


def _nothing(asset_id: UUID | str) -> BinaryIO:
    raise AssetNotFound(f"no asset {asset_id}: there is no database behind Renderers.render")


async def _awaited(result: Any) -> Any:
    return await result
