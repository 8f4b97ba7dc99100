"""Time: aware UTC datetimes in and out, durations as seconds or ``timedelta``."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

Clock = Callable[[], datetime]

# Seconds. Longer durations are cut to this one before they are added to a date, which would overflow.
CENTURY = 36525 * 86400.0
# The first and the last time that is a datetime in every time zone: PostgreSQL's are less than 16 hours from UTC.
_FIRST, _LAST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, 23, 59, 59, 999_999, tzinfo=UTC)


def utcnow() -> datetime:
    """The wall clock, aware, in UTC. What every ``clock=`` argument defaults to."""
    return datetime.now(UTC)


def aware(value: datetime, field: str) -> datetime:
    """``value`` in UTC. ``ValueError`` naming ``field`` when it has no time zone or, within a day, is no datetime in
    every other: a session's time zone decides in which the database answers.
    """
    if not isinstance(value, datetime):
        raise TypeError(f"{field} must be a datetime, not {type(value).__name__}")
    if value.utcoffset() is None:
        raise ValueError(f"{field} must have a time zone, {value!r} has none")
    try:
        found = value.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{field} is out of range in UTC: {value!r}") from None
    if not _FIRST <= found <= _LAST:
        raise ValueError(f"{field} must be within the years 1 to 9999 in every time zone, not {value!r}")
    return found


class Backoff:
    """Failures in a row, and how long to wait after them. Changed by one thread; may be read by any."""

    def __init__(self) -> None:
        self.failures = 0

    def __bool__(self) -> bool:
        """Whether the last try failed."""
        return self.failures > 0

    def failed(self) -> bool:
        """Count a failure. True for the first of a row, the one to log."""
        self.failures += 1
        return self.failures == 1

    def succeeded(self) -> bool:
        """End the row. True when there was one."""
        recovered, self.failures = self.failures > 0, 0
        return recovered

    @property
    def pause(self) -> float:
        """Seconds to wait before the next try: doubling up to 5, less a random part that keeps many processes apart; 0
        after a success.
        """
        if not self.failures:
            return 0.0
        return min(5.0, 0.05 * 2.0 ** min(self.failures, 10)) * random.uniform(0.5, 1)


class AdaptivePoll:
    """How long to wait between two polls: ``active`` seconds for ``active_for`` seconds after something was found, then
    ``idle`` seconds. Changed by one thread.
    """

    def __init__(self, active: float, idle: float, active_for: float) -> None:
        self.active, self.idle, self._active_for = active, idle, active_for
        self._active_until = 0.0

    def found(self) -> None:
        """Something was found: more is likely to follow."""
        self._active_until = time.monotonic() + self._active_for

    @property
    def interval(self) -> float:
        """Seconds until the next poll."""
        return self.active if time.monotonic() < self._active_until else self.idle


def seconds(value: timedelta | float, field: str, *, positive: bool = True) -> float:
    """``value`` as finite seconds. ``ValueError`` naming ``field`` when negative, infinite or, if ``positive``, 0."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{field} must be seconds or a timedelta, not {type(value).__name__}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{field} must be {'above' if positive else 'at least'} zero and finite, not {value!r:.80}")
    return number
