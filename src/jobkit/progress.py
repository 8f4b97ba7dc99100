"""How far a renderer has come, as it says itself."""

from __future__ import annotations

import math
from typing import NamedTuple, SupportsFloat

from jobkit.text import sanitise

# A sum of fractions may come out a little above 1.
ROUNDING = 1e-9


class Report(NamedTuple):
    """A fraction from 0 to 1, and what is being done."""

    fraction: float
    message: str | None


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
