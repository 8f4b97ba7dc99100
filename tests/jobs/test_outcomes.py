"""What follows a failed attempt, as a table."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import jobkit
from jobkit import Discard, JobCancelled, LeaseLost, Retry, Snooze
from jobkit.jobs import outcomes
from jobkit.jobs.outcomes import Outcome
from jobkit.types import JobStatus

NOW = datetime(2030, 1, 1, tzinfo=UTC)
FAILED = Outcome(JobStatus.FAILED, error="no")


def outcome(failure: BaseException, attempt: int = 1, most: int = 1, *, interrupted: bool = False) -> Outcome:
    return outcomes.decide(
        failure, "no", attempt=attempt, max_attempts=most, interrupted=interrupted, now=NOW, jitter=lambda: 0.0
    )


def again(seconds: float, error: str | None = "no", *, charged: bool = True) -> Outcome:
    return Outcome(JobStatus.QUEUED, error, NOW + timedelta(seconds=seconds), charged)


@pytest.mark.parametrize(
    ("failure", "attempt", "most", "expected"),
    [
        (ValueError(), 1, 1, FAILED),
        (ValueError(), 1, 2, again(5)),
        (ValueError(), 2, 2, FAILED),
        (ValueError(), 7, 2, FAILED),
        (ValueError(), 2, 9, again(10)),
        (ValueError(), 3, 9, again(20)),
        (ValueError(), 500, 999, again(3600)),
        (SystemExit(), 1, 2, again(5)),
        (Retry(), 1, 1, FAILED),
        (Retry(), 2, 3, again(10)),
        (Retry(0), 1, 2, again(0)),
        (Retry(2.5), 1, 2, again(2.5)),
        (Retry(timedelta(days=1)), 2, 3, again(86400)),
        (Retry(7), 3, 3, FAILED),
        (Snooze(30), 1, 1, again(30, None, charged=False)),
        (Snooze(timedelta(hours=1)), 99, 1, again(3600, None, charged=False)),
        (Discard("x"), 1, 9, FAILED),
    ],
)
def test_a_failure_is_repeated_while_attempts_are_left(
    failure: BaseException, attempt: int, most: int, expected: Outcome
) -> None:
    assert outcome(failure, attempt, most) == expected


@pytest.mark.parametrize(
    ("failure", "interrupted", "expected"),
    [
        (JobCancelled(), True, Outcome(JobStatus.CANCELLED)),
        (JobCancelled(), False, FAILED),  # nobody asked
        (LeaseLost(), True, Outcome(JobStatus.QUEUED, charged=False)),
        (LeaseLost(), False, FAILED),
        (ValueError(), True, FAILED),
        (Snooze(1), True, again(1, None, charged=False)),
    ],
)
def test_an_interruption_counts_only_when_it_was_asked_for(
    failure: BaseException, interrupted: bool, expected: Outcome
) -> None:
    assert outcome(failure, interrupted=interrupted) == expected


def test_pauses_double_from_five_seconds_to_an_hour_less_up_to_a_third() -> None:
    longest = [outcomes.pause_before(attempt, lambda: 0.0) for attempt in range(2, 14)]
    assert longest == [5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600]
    shortest = [outcomes.pause_before(attempt, lambda: 1.0) for attempt in range(2, 14)]
    assert shortest == pytest.approx([2 / 3 * pause for pause in longest])
    assert outcomes.pause_before(10**6, lambda: 0.0) == 3600


def test_jobs_that_fail_together_do_not_come_back_together() -> None:
    pauses = [outcomes.pause_before(2) for _ in range(200)]
    assert len(set(pauses)) > 190
    assert min(pauses) > 10 / 3
    assert max(pauses) <= 5
    assert max(pauses) - min(pauses) > 1


@pytest.mark.parametrize("make", [Retry, Snooze])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (timedelta(seconds=-1), ValueError),
        (10**400, ValueError),
        (1e300, ValueError),
        (timedelta.max, ValueError),  # it would leave the calendar
        (timedelta(days=3651), ValueError),
        (True, TypeError),
        ("5", TypeError),
        (datetime(2030, 1, 1, tzinfo=UTC), TypeError),
    ],
)
def test_a_wait_that_is_none_is_refused_where_it_is_raised(make: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"after|for_"):
        make(value)


@pytest.mark.parametrize("made", [Retry, lambda: Retry(None), lambda: Retry(timedelta(days=3650))])
def test_a_wait_may_be_left_out_or_long(made: Any) -> None:
    outcome(made(), 1, 2)


def test_a_subclass_that_does_not_call_its_base_is_as_one_without_arguments() -> None:
    class Later(Retry):
        def __init__(self) -> None:
            pass

    class NotYet(Snooze):
        def __init__(self) -> None:
            pass

    assert outcome(Later(), 1, 2) == again(5)
    assert outcome(NotYet()) == again(0, None, charged=False)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3", None])
def test_max_attempts_is_a_count(value: Any) -> None:
    with pytest.raises(ValueError, match="max_attempts must be a count above zero"):
        jobkit.Renderers().register("note", max_attempts=value)
