"""A clock that stands still."""

from __future__ import annotations

from datetime import datetime, timedelta

from jobkit.base.clock import aware, seconds, utcnow


class FrozenClock:
    """A ``clock=`` argument that stands still until it is moved, at ``at`` (default: now)."""

    def __init__(self, at: datetime | None = None) -> None:
        self._now = utcnow() if at is None else aware(at, "at")

    def __call__(self) -> datetime:
        return self._now

    def __repr__(self) -> str:
        return f"FrozenClock({self._now.isoformat()})"

    def advance(self, by: timedelta | float) -> datetime:
        """Move on by seconds or a timedelta; the new time."""
        self._now += timedelta(seconds=seconds(by, "by", positive=False))
        return self._now

    def move_to(self, at: datetime) -> datetime:
        """Set the time, later or earlier; the new time."""
        self._now = aware(at, "at")
        return self._now
