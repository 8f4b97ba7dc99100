"""How large a generated file may be: 500 MiB unless the environment says otherwise."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping

DEFAULT_MAX_BYTES = 500 * 1024 * 1024
VARIABLES = ("JOBKIT_GENERATED_ASSET_MAX_BYTES", "PAPERCLIP_GENERATED_ASSET_MAX_BYTES")

# The white space that ECMAScript's Number() trims (StrWhiteSpaceChar). str.strip() keeps U+FEFF, and drops U+001C to
# U+001F and U+0085.
_SPACE = "\t\n\v\f\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_TRIM = re.compile(f"^[{_SPACE}]+|[{_SPACE}]+$")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?Infinity", re.ASCII)
_RADIX = re.compile(r"0(?:[xX][0-9a-fA-F]+|[oO][0-7]+|[bB][01]+)", re.ASCII)

logger = logging.getLogger("jobkit")


def parse_limit(text: str) -> int | float | None:
    """A limit in bytes, read as ECMAScript's ``Number(text)``; None when that is 0, also for blank text.

    ``ValueError`` for what is no number, NaN or negative, and for forms that only Python reads. ``math.inf`` is no
    limit; a fraction is kept, and admits as many bytes as its whole part.
    """
    trimmed = _TRIM.sub("", text)
    if not trimmed:
        return None
    if _RADIX.fullmatch(trimmed):
        # Rounded as ECMAScript's numbers are; infinite when too large for one.
        number = _rounded(int(trimmed, 0))
    elif _DECIMAL.fullmatch(trimmed):
        number = float(trimmed)
    else:
        raise ValueError("it is not a number")
    if number < 0:
        raise ValueError("it is negative")
    return (int(number) if number.is_integer() else number) or None


def _rounded(whole: int) -> float:
    try:
        return float(whole)
    except OverflowError:
        return math.inf


def configured_limit(environment: Mapping[str, str]) -> tuple[int | float, str]:
    """The limit in bytes and its source, for messages. An unusable value is logged as a warning, and the default
    applies.
    """
    for name in VARIABLES:
        if name not in environment:
            continue
        try:
            limit = parse_limit(environment[name])
        except ValueError as error:
            logger.warning(
                "%s=%.40r is ignored: %s; the limit is %d bytes", name, environment[name], error, DEFAULT_MAX_BYTES
            )
            limit = None
        return (DEFAULT_MAX_BYTES, "the default") if limit is None else (limit, name)
    return DEFAULT_MAX_BYTES, "the default"


MAX_GENERATED_ASSET_BYTES, LIMIT_SOURCE = configured_limit(os.environ)
