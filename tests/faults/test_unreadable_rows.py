"""A row that cannot be read back stops nobody else: jobkit writes none, and passes over those that others wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobkit import AssetStore, JobStore, Runner
from tests.support.databases import Database
from tests.support.runners import note, only, seen, statuses, until

EDGES = [
    datetime.min.replace(tzinfo=UTC),
    datetime.max.replace(tzinfo=UTC),
    datetime.min.replace(tzinfo=timezone(timedelta(hours=-16))),
    datetime.max.replace(tzinfo=timezone(timedelta(hours=16))),
]
ZONES = ["America/New_York", "Asia/Tokyo", "Etc/GMT+12", "Pacific/Kiritimati", "UTC"]


@pytest.fixture(params=ZONES)
def zoned(request: pytest.FixtureRequest, postgres_database: Database) -> Iterator[sa.Engine]:
    """An engine whose sessions have this time zone."""
    return postgres_database.connect(connect_args={"options": f"-c timezone={request.param}"})  # type: ignore[return-value]


def test_every_time_that_create_takes_is_read_back_in_every_time_zone(zoned: sa.Engine, tmp_path: Path) -> None:
    written = []
    with zoned.begin() as connection:
        for at in [*EDGES, datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, 23, 59, tzinfo=UTC)]:
            with suppress(ValueError):
                written.append(JobStore(connection).create("acme", job_type="note", run_at=at))
    assert len(written) >= 2
    with zoned.begin() as connection:
        other = JobStore(connection).create("globex", job_type="note")
        assert [job.run_at for job in written] == [JobStore(connection).get_by_id(job.id).run_at for job in written]  # type: ignore[union-attr]
    with Runner(zoned, AssetStore(tmp_path / "assets"), only(note)):
        until(lambda: seen(zoned, other).status == "done")
        until(lambda: statuses(zoned).count("done") == 1 + sum(job.run_at.year < 2000 for job in written))  # type: ignore[union-attr]
