"""Durations on the command line: a number, and a unit if it differs from the default of the option."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from datetime import timedelta

_NAMES = {"d": "days", "h": "hours"}
_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1), "s": timedelta(seconds=1)}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([dhms]?)", re.ASCII)


def duration(unit: str) -> Callable[[str], timedelta]:
    """A type for ``add_argument``: ``30d``, ``12h``, ``90m``, ``10s``, or a number in ``unit``."""

    def parse(given: str) -> timedelta:
        found = _DURATION.fullmatch(given)
        try:
            if found is not None:
                return float(found[1]) * _UNITS[found[2] or unit]
        except OverflowError:
            pass
        raise argparse.ArgumentTypeError(f"neither a number of {_NAMES[unit]} nor such as 30d or 12h: {given!r}")

    return parse
