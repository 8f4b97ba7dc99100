"""What follows a failed attempt: the job ends, or is queued again for a later time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from jobkit.errors import Discard, JobCancelled, LeaseLost, Retry, Snooze
from jobkit.types import JobStatus

# Seconds before the second attempt; each further pause doubles, up to LONGEST_PAUSE seconds.
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 3600.0


def decide(
    failure: BaseException,
    message: str,
    detail: str | None = None,
    *,
    attempt: int,
    max_attempts: int,
    interrupted: bool,
    now: datetime,
    jitter: Callable[[], float] = random.random,
) -> Outcome:
    """The outcome of a run whose renderer raised ``failure``, the ``attempt``-th of at most ``max_attempts``: users are
    told ``message``, operators also ``detail``.

    ``interrupted``: whether the run was asked to stop; ``JobCancelled`` raised unasked is a failure like any other.
    """
    if isinstance(failure, JobCancelled) and interrupted:
        return Outcome(JobStatus.CANCELLED)
    if isinstance(failure, LeaseLost) and interrupted:
        # Written only if the claim holds after all; then the next runner begins at once.
        return Outcome(JobStatus.QUEUED, charged=False)
    if isinstance(failure, Snooze):
        return Outcome(JobStatus.QUEUED, run_at=now + timedelta(seconds=failure.seconds), charged=False)
    if isinstance(failure, Discard) or attempt >= max_attempts:
        return Outcome(JobStatus.FAILED, error=message, detail=detail)
    asked = failure.seconds if isinstance(failure, Retry) else None
    pause = pause_before(attempt + 1, jitter) if asked is None else asked
    return Outcome(JobStatus.QUEUED, error=message, detail=detail, run_at=now + timedelta(seconds=pause))


def pause_before(attempt: int, jitter: Callable[[], float] = random.random) -> float:
    """Seconds before the ``attempt``-th run: doubling, less up to a third at random, so that many jobs spread."""
    return float(min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempt - 2, 20)) * (1 - jitter() / 3))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a job whose attempt gave no files. ``charged``: whether the attempt counts."""

    status: JobStatus
    error: str | None = None
    run_at: datetime | None = None
    charged: bool = True
    detail: str | None = None
