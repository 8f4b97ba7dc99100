"""The proof: two thousand jobs while two hundred workers are killed and forty frozen, on each database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobkit.testing.chaos import Size, Target, draw, run
from jobkit.testing.chaos.plan import POINTS
from tests.support.postgres import OwnServer, Server

SEED = 5


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_every_promise_is_kept_whoever_is_killed_frozen_or_cut(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    url, restart = f"sqlite:///{tmp_path / 'jobs.db'}", None
    if kind == "postgresql":
        server: Server = request.getfixturevalue("postgres")
        # One that was only lent to these tests is not ours to restart.
        url, restart = server.create_database(), server.restart if isinstance(server, OwnServer) else None
    plan = draw(SEED, Size())
    verdict = run(Target(url, (tmp_path / "assets").as_uri(), restart=restart), plan, tmp_path / "run")
    with capsys.disabled():
        print(f"\n{verdict}")
    assert verdict.holds, f"{verdict}\n{plan}"
    assert verdict.jobs["created"] >= 2_000
    assert verdict.faults["killed"] >= 200
    assert verdict.zombie_writes_rejected >= 40
    assert all(verdict.points[point] for point in POINTS)
    assert json.loads(verdict.to_json())["holds"] is True
