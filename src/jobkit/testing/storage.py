"""A storage for one test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobkit.assets.store import AssetStore


@contextmanager
def temporary_assets(**options: Any) -> Iterator[AssetStore]:
    """An ``AssetStore`` in a new folder, which is removed afterwards with all its files. ``options`` are those of
    ``AssetStore``.
    """
    with tempfile.TemporaryDirectory(prefix="jobkit-assets-") as folder:
        yield AssetStore(folder, **options)
