"""Time-ordered UUIDs (version 7, RFC 9562), and the ids that callers give: of jobs, assets and companies."""

from __future__ import annotations

import os
import threading
import time
from enum import Enum
from typing import Final
from uuid import UUID

from jobkit.base.forks import hold_during_fork
from jobkit.base.text import storable

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


CompanyId = str | int | UUID
"""What names a company; its text is stored."""


class AnyCompany(Enum):
    """The type of ``ANY_COMPANY``."""

    ANY_COMPANY = "ANY_COMPANY"

    def __repr__(self) -> str:
        return self.value


ANY_COMPANY: Final = AnyCompany.ANY_COMPANY
"""In place of a company: whichever has the row. None is no company, so that a forgotten one never sees everyone's."""

CompanyScope = CompanyId | AnyCompany


def require_company_id(value: object) -> str:
    """The text of a company's id: of a ``str``, an ``int`` or a ``UUID``.

    ``ValueError`` for None, blank text, an enum that prints otherwise than its value, NUL, lone surrogates and more
    than 255 characters. ``TypeError`` for anything else: ``ANY_COMPANY``, bytes, bool.
    """
    return storable(company_text(value), "company_id", limit=255)


def company_text(value: object) -> str:
    """As ``require_company_id``, for queries: text that is not blank but cannot be stored finds nothing."""
    if value is None:
        raise ValueError("company_id is missing")
    if isinstance(value, bool) or not isinstance(value, str | int | UUID):
        raise TypeError(f"company_id must be text, a whole number or a UUID, not {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > 800:  # str() refuses some integers
        raise ValueError("company_id has more than 240 digits")
    plain = str.__str__ if isinstance(value, str) else int.__repr__ if isinstance(value, int) else UUID.__str__
    text: str = plain(value)
    if str(value) != text:
        raise ValueError(f"company_id is {text!r:.80} but prints as {str(value)!r:.80}: give its value")
    if not text.strip():
        raise ValueError("company_id is blank")
    return text
