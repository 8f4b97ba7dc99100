from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest

from jobkit.base.clock import AdaptivePoll, Backoff, aware, seconds, utcnow

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_now_is_aware_and_in_utc() -> None:
    assert utcnow().tzinfo is UTC
    assert abs(utcnow() - datetime.now(timezone(timedelta(hours=9)))) < timedelta(seconds=10)


@pytest.mark.parametrize("hours", [0, 5.5, -11])
def test_a_time_of_any_zone_becomes_the_same_moment_in_utc(hours: float) -> None:
    given = NOON.astimezone(timezone(timedelta(hours=hours)))
    assert aware(given, "when") == NOON
    assert aware(given, "when").tzinfo is UTC


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (datetime(2026, 3, 1, 12), ValueError, r"^when must have a time zone, datetime.datetime\(2026.* has none$"),
        (datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))), ValueError, "^when is out of range in UTC: "),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=1))), ValueError, "^when is out of range in UTC: "),
        (date(2026, 3, 1), TypeError, "^when must be a datetime, not date$"),
        ("2026-03-01T12:00:00Z", TypeError, "^when must be a datetime, not str$"),
        (0, TypeError, "^when must be a datetime, not int$"),
        (None, TypeError, "^when must be a datetime, not NoneType$"),
    ],
)
def test_what_is_no_moment_is_refused_by_name(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        aware(value, "when")


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 1.0), (0.25, 0.25), (timedelta(minutes=2), 120.0), (timedelta(microseconds=1), 1e-6)]
)
def test_a_duration_is_seconds_or_a_timedelta(value: Any, expected: float) -> None:
    assert seconds(value, "lease") == expected
    assert isinstance(seconds(value, "lease"), float)


@pytest.mark.parametrize("value", [0, 0.0, timedelta(0)])
def test_zero_is_a_duration_only_where_it_makes_sense(value: Any) -> None:
    assert seconds(value, "timeout", positive=False) == 0.0
    with pytest.raises(ValueError, match=r"^lease must be above zero and finite, not "):
        seconds(value, "lease")


@pytest.mark.parametrize("value", [-1, -0.001, timedelta(seconds=-1), math.nan, math.inf, -math.inf, 10**400])
def test_a_duration_below_zero_or_without_end_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^timeout must be at least zero and finite, not "):
        seconds(value, "timeout", positive=False)


@pytest.mark.parametrize("value", [True, "1", None, b"1", NOON, 1j])
def test_what_is_no_duration_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=f"^lease must be seconds or a timedelta, not {type(value).__name__}$"):
        seconds(value, "lease")


def test_the_pause_after_failures_grows_to_five_seconds_and_is_never_the_same_for_all() -> None:
    failing = Backoff()
    assert (bool(failing), failing.pause, failing.succeeded()) == (False, 0.0, False)
    for failures in range(1, 2_000):
        failing.failures = failures
        whole = min(5.0, 0.05 * 2.0 ** min(failures, 10))
        assert whole / 2 <= failing.pause <= whole
    assert len({failing.pause for _ in range(100)}) > 50


def test_only_the_first_failure_of_a_row_is_one_to_log() -> None:
    failing = Backoff()
    assert [failing.failed(), failing.failed(), failing.succeeded(), failing.failed()] == [True, False, True, True]


def test_a_poll_is_frequent_for_a_while_after_something_was_found() -> None:
    poll, short = AdaptivePoll(0.1, 1.0, active_for=3600.0), AdaptivePoll(0.1, 1.0, active_for=0.0)
    assert poll.interval == 1.0
    poll.found()
    assert poll.interval == 0.1
    short.found()
    assert short.interval == 1.0
