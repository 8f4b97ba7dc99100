"""One attempt at a job: its renderer is called, and every output read into a sealed file."""

from __future__ import annotations

import contextvars
import inspect
import logging
import math
import time
from collections.abc import AsyncIterable, Coroutine, Generator, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import closing, suppress
from typing import Any, SupportsFloat

from jobkit import errors
from jobkit.assets.spool import StagedFile
from jobkit.base.logs import exc_info_of
from jobkit.base.text import error_message
from jobkit.base.threads import TaskState
from jobkit.jobs.claims import Claim, Report
from jobkit.rendering.context import Registration, RenderContext, RenderEnvironment, report
from jobkit.rendering.failures import Told, fields_of, tell
from jobkit.types import Rendered, StoredObject

logger = logging.getLogger("jobkit")


class Attempt:
    """One run of a claimed job's renderer. Afterwards ``stored`` has its files, or ``failure`` what it raised."""

    def __init__(self, claim: Claim, registration: Registration, environment: RenderEnvironment) -> None:
        self.claim = claim
        self.failure: BaseException | None = None
        self.max_attempts = registration.max_attempts
        #: When the job was claimed, and when its lease was last known to begin, on the monotonic clock.
        self.claimed = self.renewed = time.monotonic()
        self.drafts: list[StagedFile] = []
        self.stored: tuple[StoredObject, ...] = ()
        #: The renderer's last progress report, and the one that the job's row has.
        self.reported: Report | None = None
        self.recorded: Report | None = None
        #: When its renderer started, on the monotonic clock.
        self.started: float | None = None
        #: How many seconds it kept its thread, once that is free again.
        self.took: float | None = None
        #: Shared by the thread that renders and the one that may give the attempt up.
        self.task = TaskState()
        self._registration, self._environment = registration, environment
        self._checking_input = False
        self._told: tuple[BaseException, Told] | None = None
        self._interruption: errors.RenderInterrupted | None = None
        self._awaited: Future[Any] | None = None

    def run(self) -> None:
        """Render in this thread. Raises nothing: what the renderer raises, ``SystemExit`` too, becomes ``failure``."""
        began = time.monotonic()
        try:
            self.render()
        except BaseException as error:  # not even SystemExit may end the runner's thread
            self.failure = error
            self.tell(error)
            with suppress(Exception):  # a host's log handler may raise; the failure must be recorded
                self._log(error)
        finally:  # after logging: a handler that sends mail keeps the thread busy too
            self.took = time.monotonic() - began

    def render(self) -> None:
        """As ``run``, and raises what fails the attempt. Nothing of a failed attempt is left on disk.

        In an empty context of its own: what a renderer sets in a ``ContextVar`` no other attempt sees, and what it
        starts on the runner's loop has a copy of that context.
        """
        contextvars.Context().run(self._render)

    def tell(self, failure: BaseException) -> Told:
        """What users and operators are told of this failure; decided once, on the thread that asks first."""
        known = self._told  # another thread may tell of another failure
        if known is None or known[0] is not failure:
            describe = self._environment.describe_error
            known = self._told = failure, tell(failure, self.claim, describe, of_input=self._checking_input)
        return known[1]

    def _render(self) -> None:
        # Not an attribute: the context knows the attempt, and a cycle would wait for the garbage collector.
        context = RenderContext(self.claim, self._environment, self)
        self.started = time.monotonic()
        try:
            self.check()  # the claim may have been lost while the attempt waited for a thread
            self._surrounded(context)
        except BaseException:
            self.discard()
            raise
        finally:
            context.clean()

    def _surrounded(self, context: RenderContext) -> None:
        """Work within the host's context manager. What that swallows fails the attempt all the same."""
        if self._environment.around is None:
            self._work(context)
            return
        failure: BaseException | None = None
        try:
            with self._environment.around(context):
                try:
                    self._work(context)
                except BaseException as error:
                    failure = error
                    raise
            if failure is not None:
                raise failure
        finally:
            del failure  # its traceback has this frame

    def _work(self, context: RenderContext) -> None:
        self._checking_input = True
        context.input = self._registration.parse(self.claim.input)
        self._checking_input = False
        self._read(self._registration.renderer(context), context)
        if not self.drafts:
            raise ValueError(f"{self._renderer} gave no file")
        self.stored = tuple(draft.seal(recorded=True) for draft in self.drafts)

    # --- asked to stop: from other threads

    @property
    def remaining(self) -> float:
        """For how many seconds its renderer may still run."""
        timeout = self._registration.timeout
        if timeout is None:
            return math.inf
        return timeout if self.started is None else self.started + timeout - time.monotonic()

    def interrupt(self, reason: errors.RenderInterrupted) -> None:
        """Make ``ctx.check()`` raise ``reason`` from now on, and cancel the coroutine that the renderer waits for."""
        self._interruption = reason
        if (awaited := self._awaited) is not None:
            awaited.cancel()

    def give_up(self) -> errors.JobTimeout:
        """Ask a renderer that has taken too long to stop; return the reason."""
        reason = self._overdue()
        self.interrupt(reason)
        return reason

    def check(self) -> None:
        """Raise why the work is no longer wanted, if it is not."""
        if self._interruption is None:
            if self.remaining <= 0:
                self._interruption = self._overdue()
            elif time.monotonic() > self.renewed + self._environment.lease:
                self._interruption = errors.LeaseLost(f"the lease of job {self.claim.job_id} could not be renewed")
        if self._interruption is not None:
            raise self._interruption

    @property
    def interruption(self) -> errors.RenderInterrupted | None:
        """Why the renderer was asked to stop, if it was."""
        return self._interruption

    @property
    def interrupted(self) -> bool:
        """Whether the renderer was asked to stop."""
        return self._interruption is not None

    def progress(self, fraction: SupportsFloat, message: str | None) -> None:
        """Keep a progress report for the lease keeper to record. From any thread."""
        latest = report(fraction, message, after=self.reported)
        if latest is not self.reported:
            self.reported = latest
            self._environment.progressed()

    def start_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run ``coroutine`` on the runner's event loop."""
        return self._environment.loop.start(coroutine)

    @property
    def _renderer(self) -> str:
        return f"the renderer for {self.claim.job_type!r}"

    def _overdue(self) -> errors.JobTimeout:
        return errors.JobTimeout(f"{self._renderer} did not end within {self._registration.timeout:g} seconds")

    # --- afterwards

    def discard(self) -> None:
        """Remove the spool files."""
        for draft in self.drafts:
            draft.discard()

    def _log(self, error: BaseException) -> None:
        asked = isinstance(error, errors.RenderInterrupted | errors.Snooze | errors.Retry | errors.Discard)
        # The traceback of an unknown job type would show only jobkit.
        traceback = None if asked or isinstance(error, errors.UnknownJobType) else exc_info_of(error)
        message = "job %s (%r) ended without files: %s" if asked else "job %s (%r) failed: %s"
        level = logging.INFO if asked else logging.WARNING
        fields, text = fields_of(self.claim), error_message(error)
        if self.tell(error).detail is not None:
            text += f" (reference {fields['reference']})"
        logger.log(level, message, self.claim.job_id, self.claim.job_type, text, exc_info=traceback, extra=fields)

    def _read(self, result: Any, context: RenderContext) -> None:
        if inspect.isawaitable(result):
            result = self._wait(result)
        with closing(self._iterate(result)) as outputs:
            for rendered in outputs:
                if not isinstance(rendered, Rendered):
                    raise TypeError(f"{self._renderer} yielded {type(rendered).__name__}, not Rendered")
                # Closed at once: a job of many files would run out of descriptors.
                with closing(context.add(rendered.filename, rendered.content_type).spool) as spool:
                    spool.fill(rendered.body)

    def _iterate(self, result: Any) -> Generator[Any]:
        if isinstance(result, Rendered):
            yield result
        elif isinstance(result, AsyncIterable):
            yield from self._iterate_async(aiter(result))
        elif isinstance(result, Iterable) and not isinstance(result, str | bytes | dict):
            yield from result
        elif result is not None:
            kind = type(result).__name__
            raise TypeError(f"{self._renderer} returned {kind}, not Rendered or an iterable of them")

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
                closing = self.start_coroutine(_awaited(iterator.aclose()))
                if not isinstance(error, errors.RenderInterrupted):  # then the generator may still be running
                    closing.result()
            raise

    def _wait(self, awaitable: Any) -> Any:
        """The result of ``awaitable`` on the runner's loop. Raises as soon as the attempt is interrupted."""
        self._awaited = future = self.start_coroutine(_awaited(awaitable))
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


async def _awaited(result: Any) -> Any:
    return await result
