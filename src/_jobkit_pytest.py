"""jobkit's fixtures for pytest. A module of its own, because importing one of the package imports SQLAlchemy: a test
run without these fixtures pays nothing for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from jobkit import AssetStore, JobEvent
    from jobkit.testing import FrozenClock


@pytest.fixture
def jobkit_assets(tmp_path: Path) -> AssetStore:
    """An ``AssetStore`` in a folder of this test."""
    from jobkit import AssetStore

    return AssetStore(tmp_path / "jobkit-assets")


@pytest.fixture
def jobkit_clock() -> FrozenClock:
    """A ``jobkit.testing.FrozenClock`` that stands still at the time of this test."""
    from jobkit.testing import FrozenClock

    return FrozenClock()


@pytest.fixture
def jobkit_events() -> Iterator[list[JobEvent]]:
    """Every event that is signalled in this process while the test runs, in order, of all companies."""
    from jobkit import CONTENT_JOB_EVENTS, signals

    heard: list[JobEvent] = []

    def hear(_company_id: str, *, event: JobEvent) -> None:
        heard.append(event)

    for name in CONTENT_JOB_EVENTS:
        getattr(signals, name.replace(".", "_")).connect(hear)
    yield heard
    for name in CONTENT_JOB_EVENTS:
        getattr(signals, name.replace(".", "_")).disconnect(hear)
