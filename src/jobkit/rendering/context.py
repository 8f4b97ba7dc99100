"""What a renderer is given: its context, and the options it was registered with."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, SupportsFloat
from uuid import UUID

from jobkit.assets.spool import Spool, StagedFile
from jobkit.base.text import sanitise
from jobkit.jobs.claims import Report
from jobkit.types import Rendered

Output = Rendered | Iterable[Rendered] | None
Renderer = Callable[["RenderContext"], Output | Awaitable[Output] | AsyncIterator[Rendered]]


class RenderContext:
    """What a renderer is told and given for one attempt at one job. Valid until the renderer has returned its last
    output.

    ``input`` is the job's input, or what the renderer's ``input=`` model made of it; ``services`` is what the
    ``Renderers`` were given. Used by the thread that renders.
    """

    def __init__(
        self,
        *,
        job_id: UUID,
        company_id: str,
        job_type: str,
        input: Any,
        attempt: int,
        services: Any,
        open_asset: Callable[[UUID | str], BinaryIO],
        new_draft: Callable[[str, str], StagedFile],
        workspace: Callable[[], Path],
        check: Callable[[], None] = lambda: None,
        progress: Callable[[SupportsFloat, str | None], None] = lambda fraction, message: None,
    ) -> None:
        self.job_id = job_id
        self.company_id = company_id
        self.job_type = job_type
        self.input = input
        self.attempt = attempt
        self.services = services
        self.drafts: list[StagedFile] = []
        self._open_asset = open_asset
        self._new_draft = new_draft
        self._workspace = workspace
        self._check, self._progress = check, progress
        self._workdir: Path | None = None

    @property
    def workdir(self) -> Path:
        """An empty private folder for this attempt, made on first use, removed when the outputs have been read."""
        if self._workdir is None:
            self._workdir = Path(tempfile.mkdtemp(prefix="work-", dir=self._workspace()))
        return self._workdir

    def check(self) -> None:
        """Return when the work is still wanted; else raise ``LeaseLost``, ``JobCancelled`` or ``JobTimeout``. Cheap:
        call it often.
        """
        self._check()

    def progress(self, fraction: SupportsFloat, message: str | None = None) -> None:
        """Tell how far the work is, from 0 to 1, and what is being done. Cheap: call it often, from any thread or
        coroutine.

        The job's ``progress`` and ``progress_message``, and ``content_job.progress``, follow within a second or so; of
        several reports in half a second, the last one counts. The fraction never goes back: one that is lower leaves it
        as it is. ``message`` is what the message is from now on. ``TypeError`` or ``ValueError`` for what is no number
        from 0 to 1. Raises what ``check`` raises.
        """
        self._progress(fraction, message)
        self._check()

    def open_asset(self, asset_id: UUID | str) -> BinaryIO:
        """Another asset of the same company, as a binary file to read and close; else ``AssetNotFound``."""
        return self._open_asset(asset_id)

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
                self.drafts.remove(draft)
                draft.discard()
            raise
        finally:
            draft.spool.close()

    def add(self, filename: str, content_type: str) -> StagedFile:
        """Begin an output."""
        draft = self._new_draft(filename, content_type)
        self.drafts.append(draft)
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


# A sum of fractions may come out a little above 1.
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
