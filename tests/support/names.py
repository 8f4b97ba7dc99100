"""Names of parametrised tests that are the same in every process, because several run the tests together."""

from __future__ import annotations

import re


def named(value: object) -> str:
    """``repr(value)`` without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
