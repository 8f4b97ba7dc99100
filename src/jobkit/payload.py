"""A job's input: a JSON object that both databases store and give back alike."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

MAX_DEPTH = 100
MAX_INPUT_BYTES = 1 << 20
# Numbers that jsonb would change: it reads 1e+23 as an integer, which is another number, and has no negative zero. The
# first branch steps over strings.
_NUMBERS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|-?[0-9.]+e\+[0-9]+|-0\.0(?![0-9])')
# As json.dumps and json.loads, which would make an encoder for each call.
_encode = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode
_decode = json.JSONDecoder().decode
_TOO_DEEP = f"input is nested deeper than {MAX_DEPTH} levels"


def canonical(value: object, *, max_bytes: int = MAX_INPUT_BYTES) -> tuple[str, dict[str, Any]]:
    """``value`` as compact JSON text, and a copy of it read back from that text: tuples become arrays, number keys
    text, -0.0 becomes 0.0. PostgreSQL does not keep the order of keys.

    ``ValueError`` beginning with ``input`` for: not an object, NaN or Infinity, NUL, a lone surrogate, more than 100
    levels, an integer too long for Python to read, two keys that become the same, a value JSON does not know, more
    than ``max_bytes``.
    """
    if not isinstance(value, dict):
        raise ValueError(f"input must be a JSON object (a dict), not {type(value).__name__}")
    try:
        text = _encode(value)
        if "e+" in text or "-0.0" in text:
            text = _NUMBERS.sub(_written_out, text)
        size = len(text.encode())
        if size > max_bytes:
            raise ValueError(f"it is {size} bytes of JSON, the limit is {max_bytes}")
        copy: dict[str, Any] = _decode(text)
        changed = copy != value
    except RecursionError:
        raise ValueError(f"{_TOO_DEEP}, or contains itself") from None
    except UnicodeEncodeError:
        raise ValueError("input contains a lone surrogate") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"input cannot be stored: {error}") from None
    # Only what these cheap signs point at is walked; each may point without cause, none stays silent with one.
    if changed or "\\u0000" in text or text.count("{") + text.count("[") > MAX_DEPTH:
        _inspect(value, 1)
    return text, copy


def _written_out(match: re.Match[str]) -> str:
    token = match.group()
    if token[0] == '"':
        return token
    return "0.0" if token == "-0.0" else f"{Decimal(token):f}.0"


def _inspect(value: object, depth: int) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("input contains a NUL character")
        return
    if not isinstance(value, dict | list | tuple):
        return
    if depth > MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, dict):
        if len({key if isinstance(key, str) else json.dumps(key) for key in value}) != len(value):
            raise ValueError("input has two keys that are the same in JSON")
        for key in value:
            _inspect(key, depth)
    for item in value.values() if isinstance(value, dict) else value:
        _inspect(item, depth + 1)
