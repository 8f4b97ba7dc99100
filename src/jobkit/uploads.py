"""An upload: a finished file on its way into a storage."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Upload(NamedTuple):
    """A finished file on local disk, and where it shall be stored."""

    path: Path
    key: str
    content_type: str
