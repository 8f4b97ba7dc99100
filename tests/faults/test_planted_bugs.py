"""A verdict is worth something only if it sees what is wrong: each bug planted into the workers is named by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobkit.testing.chaos import Size, Target, draw, run
from tests.faults import bugs
from tests.support.postgres import Server

SIZE = Size(
    jobs=60,
    kills=12,
    zombies=6,
    stops=0,
    restarts=0,
    cuts=0,
    storage_faults=0,
    subscriber_kills=1,
    janitor_kills=0,
    creator_kills=0,
)
# Each bug, where it is planted, and the promise that must be seen broken.
PLANTED = [
    (bugs.unfenced_finish, "sqlite", "I3"),
    (bugs.unfenced_finish, "postgresql", "I3"),
    (bugs.finish_by_id, "sqlite", "I2"),
    (bugs.finish_by_id, "postgresql", "I2"),
    (bugs.unguarded_rescue, "sqlite", "I2"),
    (bugs.unguarded_rescue, "postgresql", "I2"),
    (bugs.fence_reset, "sqlite", "I3"),
    (bugs.attempt_charged, "postgresql", "I4"),
    (bugs.no_rescue, "sqlite", "I1"),
    (bugs.no_intents, "postgresql", "I7"),
    (bugs.hasty_sweep, "sqlite", "I11"),
    (bugs.event_outside, "postgresql", "I8"),
    (bugs.told_before_the_commit, "sqlite", "I9"),
    (bugs.deaf, "postgresql", "I9"),
    (bugs.hurried, "sqlite", "I10"),
    (bugs.spoiled, "sqlite", "I6"),
    (bugs.committed_by_the_store, "postgresql", "I8"),
    (bugs.last_file_as_result, "postgresql", "I5"),
    (bugs.another_companys_event, "sqlite", "I14"),
]


@pytest.mark.parametrize(("bug", "kind", "promise"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_the_verdict_names_the_promise_that_a_planted_bug_breaks(
    bug: object, kind: str, promise: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    if kind == "postgresql":
        server: Server = request.getfixturevalue("postgres")
        url = server.create_database()
    target = Target(
        url,
        (tmp_path / "assets").as_uri(),
        setup=f"tests.faults.bugs:{bug.__name__}",  # type: ignore[attr-defined]
        patience=10.0,
        deadline=5.0,
        overdue=3.0,
    )
    verdict = run(target, draw(1, SIZE), tmp_path / "run")
    assert [words for words in verdict.violations if words.startswith(f"{promise}:")] != []
