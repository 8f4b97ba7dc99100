"""What a renderer is given: its context, and the options it was registered with."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, SupportsFloat
from uuid import UUID

from jobkit.assets.spool import Spool, StagedFile
from jobkit.assets.store import AssetStore
from jobkit.base.loops import LoopThread
from jobkit.base.text import sanitise
from jobkit.jobs.claims import Claim, Report
from jobkit.types import Rendered

Output = Rendered | Iterable[Rendered] | None
Renderer = Callable[["RenderContext"], Output | Awaitable[Output] | AsyncIterator[Rendered]]
Around = Callable[["RenderContext"], AbstractContextManager[object]]
DescribeError = Callable[[BaseException], str | None]


@dataclasses.dataclass(frozen=True, slots=True)
class RenderEnvironment:
    """What surrounds every attempt of a runner.

    ``loop`` runs the coroutines of renderers; ``open_asset`` opens an asset of a company, given its id, or raises
    ``AssetNotFound``; ``progressed`` is called on the renderer's thread when it has reported something new. ``lease``:
    for how many seconds after its last renewal a claim holds. ``around`` and ``describe_error``: see ``Renderers``.
    """

    assets: AssetStore
    loop: LoopThread
    open_asset: Callable[[str, UUID | str], BinaryIO]
    services: Any = None
    progressed: Callable[[], None] = lambda: None
    lease: float = math.inf
    around: Around | None = None
    describe_error: DescribeError | None = None


class Control(Protocol):
    """What an attempt does for its context."""

    drafts: list[StagedFile]

    def check(self) -> None: ...
    def progress(self, fraction: SupportsFloat, message: str | None) -> None: ...


class RenderContext:
    """What a renderer is given for one attempt at one job. Valid until the renderer has returned its last output.

    ``input`` is the job's input, or what the renderer's ``input=`` model made of it; ``services`` is what the
    ``Renderers`` were given. Used by the thread that renders.
    """

    def __init__(self, claim: Claim, environment: RenderEnvironment, attempt: Control) -> None:
        self.job_id = claim.job_id
        self.company_id = claim.company_id
        self.job_type = claim.job_type
        self.input: Any = claim.input
        self.attempt = claim.attempt
        self.services = environment.services
        self._environment, self._control = environment, attempt
        self._workdir: Path | None = None

    @property
    def workdir(self) -> Path:
        """An empty private folder for this attempt, made on first use, removed when the outputs have been read."""
        if self._workdir is None:
            self._workdir = Path(tempfile.mkdtemp(prefix="work-", dir=self._environment.assets.spool_folder()))
        return self._workdir

    def check(self) -> None:
        """Raise ``LeaseLost``, ``JobCancelled`` or ``JobTimeout`` once the work is not wanted. Cheap: call it often."""
        self._control.check()

    def progress(self, fraction: SupportsFloat, message: str | None = None) -> None:
        """Tell how far the work is, from 0 to 1, and what is being done. Cheap: call it often, from any thread or
        coroutine.

        The job's ``progress`` and ``progress_message``, and ``content_job.progress``, follow within a second or so; of
        several reports in half a second, the last one counts. The fraction never goes back: one that is lower leaves it
        as it is. ``message`` is what the message is from now on. ``TypeError`` or ``ValueError`` for what is no number
        from 0 to 1. Raises what ``check`` raises.
        """
        self._control.progress(fraction, message)
        self._control.check()

    def open_asset(self, asset_id: UUID | str) -> BinaryIO:
        """Another asset of the same company, as a binary file to read and close; else ``AssetNotFound``."""
        return self._environment.open_asset(self.company_id, asset_id)

    @contextmanager
    def writer(self, filename: str, content_type: str) -> Iterator[Spool]:
        """An output as a seekable binary file to write into; one of the job's files when the ``with`` ends.

        Outputs keep the order in which they were begun. When the block raises, this output is dropped.
        """
        draft = self.add(filename, content_type)
        try:
            yield draft.spool
        except BaseException:
            # One that went over the limit stays, to fail the job even when this is swallowed.
            if not draft.spool.refused:
                self._control.drafts.remove(draft)
                draft.discard()
            raise
        finally:
            draft.spool.close()

    def add(self, filename: str, content_type: str) -> StagedFile:
        """Begin an output."""
        draft = self._environment.assets.draft(
            self.company_id, namespace="generated", filename=filename, content_type=content_type
        )
        self._control.drafts.append(draft)
        return draft

    def clean(self) -> None:
        """Remove the working folder."""
        if self._workdir is not None:
            shutil.rmtree(self._workdir, ignore_errors=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """A renderer with the options it was registered with."""

    renderer: Renderer
    input: Any = None
    max_attempts: int = 1
    timeout: float | None = None

    def parse(self, value: dict[str, Any]) -> Any:
        """``value`` as the renderer's input model has it. Whatever the model raises fails the job."""
        model: Any = self.input
        if model is None:
            return value
        if hasattr(model, "model_validate"):  # pydantic
            return model.model_validate(value)
        if hasattr(model, "__struct_fields__"):  # msgspec, imported by whoever made the struct
            return sys.modules["msgspec"].convert(value, model)
        return model(**value) if hasattr(model, "__dataclass_fields__") else model(value)


# How far above 1 a fraction may be: floating-point sums overshoot.
ROUNDING = 1e-9


def report(fraction: SupportsFloat, message: str | None, *, after: Report | None) -> Report:
    """The report that follows ``after``, never behind it; ``after`` itself when it says nothing new.

    ``TypeError`` or ``ValueError`` for what is no fraction or no text. Of a message, characters that a database or
    terminal would trip over are replaced, and 2,000 characters are kept.
    """
    if isinstance(fraction, bool | str | bytes) or not isinstance(fraction, SupportsFloat):
        raise TypeError(f"fraction must be a number from 0 to 1, not {type(fraction).__name__}")
    if message is not None and not isinstance(message, str):
        raise TypeError(f"message must be text, not {type(message).__name__}")
    try:
        number = float(fraction)
    except OverflowError:
        number = math.inf
    if not 0 <= number <= 1 + ROUNDING:
        raise ValueError(f"fraction must be a number from 0 to 1, not {number!r}")
    number = min(1.0, number) + 0.0  # -0.0 is 0
    text = sanitise(message or "") or None
    new = Report(number if after is None else max(number, after.fraction), text)
    return after if after == new else new
