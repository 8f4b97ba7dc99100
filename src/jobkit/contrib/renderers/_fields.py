"""Fields of a job's input, checked: each is what it should be, or a ``ValueError`` names it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from jobkit.base.text import storable
from jobkit.contrib.renderers._markdown import clean

UNFIT_FOR_NAME = re.compile(r'[\\/:*?"<>|\x00-\x1f\x7f]+')


def object_of(value: Any, fields: Iterable[str], job_type: str) -> dict[str, Any]:
    """``value`` when it is an object that has none but ``fields``."""
    if not isinstance(value, dict):
        raise ValueError(f"input must be an object with {next(iter(fields))} in it, not {type(value).__name__}")
    if unknown := sorted(set(value) - set(fields)):
        raise ValueError(f"{unknown[0]!r:.80} is not a field of {job_type}: {', '.join(fields)}")
    return value


def text(value: dict[str, Any], field: str, *, limit: int) -> str | None:
    """The field without control characters, None when it is absent."""
    found = value.get(field)
    if found is None:
        return None
    if not isinstance(found, str):
        raise ValueError(f"{field} must be text, not {type(found).__name__}")
    return clean(storable(found, field, limit=limit))


def count(value: dict[str, Any], field: str, *, least: int, most: int) -> int | None:
    """The field, a whole number from ``least`` to ``most``, None when it is absent."""
    found = value.get(field)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not least <= found <= most:
        raise ValueError(f"{field} must be a whole number from {least} to {most}, not {found!r:.80}")
    return found


def choice(value: dict[str, Any], field: str, choices: Iterable[str]) -> str | None:
    """The field, one of ``choices``, None when it is absent."""
    found = value.get(field)
    if found is not None and found not in list(choices):
        raise ValueError(f"{field} {found!r:.80} is not one of {', '.join(choices)}")
    return found


def filename(value: dict[str, Any], *endings: str) -> str | None:
    """``filename``, with the first of ``endings`` added to one that has none of them, None when it is absent."""
    name = text(value, "filename", limit=200)
    if name is None:
        return None
    if UNFIT_FOR_NAME.search(name):
        raise ValueError(f"filename {name!r} has a character that file names do not have everywhere")
    return ended(name, *endings)


def ended(name: str, *endings: str) -> str:
    """``name`` with the first of ``endings`` added, unless it has one of them."""
    return name if name.lower().endswith(endings) else f"{name}{endings[0]}"
