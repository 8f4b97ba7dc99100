"""Time-ordered UUIDs (version 7, RFC 9562), and the parsing of ids that callers give."""

from __future__ import annotations

import os
import threading
import time
from uuid import UUID

from jobkit.base.forks import hold_during_fork

_lock = threading.Lock()
_last = 0
hold_during_fork(_lock)


def new_id() -> UUID:
    """A UUID version 7: 48 bits of milliseconds, then 12 + 62 bits that never go backwards within this process.

    Safe to call from any thread. Ids of one process sort in the order in which they were made, also within one
    millisecond and when the clock is set back.
    """
    return UUID(int=new_number())


def new_number() -> int:
    """A new id as an integer of 128 bits."""
    global _last  # noqa: PLW0603
    milliseconds = time.time_ns() // 1_000_000
    candidate = (milliseconds << 74) | (int.from_bytes(os.urandom(10)) & ((1 << 74) - 1))
    with _lock:
        if candidate <= _last:
            candidate = _last + 1 + (candidate & 0xFFFFFFFF)
        _last = candidate
    time_part, random_part = candidate >> 74, candidate & ((1 << 74) - 1)
    high, low = random_part >> 62, random_part & ((1 << 62) - 1)
    return (time_part << 80) | (0x7 << 76) | (high << 64) | (0b10 << 62) | low


def parse_id(value: object) -> UUID | None:
    """The UUID that ``value`` is or spells, else None: a malformed id is simply not found."""
    if not isinstance(value, str):
        return value if isinstance(value, UUID) else None
    try:
        parsed = UUID(value)
    except ValueError:
        return None
    # UUID() parses digits with int(), which also accepts "0x", "_", blanks and digits of other scripts.
    return parsed if parsed.hex in value.replace("-", "").lower() else None
