"""A verdict is worth something only if it sees what is wrong: each bug planted into the workers is named by it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobkit.testing.chaos import Size, Target, Verdict, draw, run
from tests.faults.bugs import VARIABLE
from tests.support.postgres import Server

SIZE = Size(
    jobs=60,
    kills=18,  # one at each point, and six at any moment
    zombies=6,
    stops=0,
    restarts=0,
    cuts=0,
    storage_faults=0,
    subscriber_kills=1,
    janitor_kills=0,
    creator_kills=0,
)
# Whether a bug does harm in one small run is a matter of chance.
SEEDS = (1, 2, 3, 4)
# What the verdict says of each bug.
WORDS = {
    "unfenced_finish": r"I3: job \S+ has files of claim \d+, its fence is \d+",
    "finish_by_id": r"I2: .*: (done|failed) after (done|failed|queued|retrying)",
    "unguarded_rescue": r"I2: .*: retrying after (done|failed|cancelled|queued|retrying)",
    "no_rescue": r"I1: .*, which is running: .*: it did not end",
    "no_intents": r"I7: object \S+ has no row",
    "told_before_the_commit": r"I9: \S+ was told before the commit",
    "event_outside": r"I8: .*: the row says \d+ events, the log has",
    "deaf": r"I9: subscriber-\d never heard",
    "hurried": r"I10: subscriber-\d heard \S+ of job \S+ as \d+ after \d+",
    "spoiled": r"I6: object \S+ is not what its row says",
    "last_file_as_result": r"I5: the result of job \S+ is",
    "another_companys_event": r"I14: .*: an event is another company's",
    "attempt_charged": r"I4: job \S+ \(\w+\) is in its attempt",
    "fence_reset": r"I3: .*: its fence is \d+",
    "committed_by_the_store": r"I8: job \S+ was rolled back, and is there",
    "hasty_sweep": r"I11: .* failed: .*the sweep was faster",
}
# Those that do not get in each other's way share a run.
PLANTED = [
    ("sqlite", "unfenced_finish"),
    ("postgresql", "unfenced_finish"),
    ("postgresql", "finish_by_id"),
    ("sqlite", "unguarded_rescue"),
    ("sqlite", "no_rescue"),
    ("postgresql", "no_intents told_before_the_commit"),
    ("postgresql", "event_outside deaf"),
    ("sqlite", "spoiled last_file_as_result another_companys_event attempt_charged fence_reset"),
    ("postgresql", "committed_by_the_store hurried hasty_sweep"),
]


def seen(verdict: Verdict) -> set[str]:
    return {bug for bug, words in WORDS.items() if any(re.match(words, told) for told in verdict.violations)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "planted"), PLANTED)
def test_the_verdict_names_what_a_planted_bug_breaks(
    kind: str, planted: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, planted)
    missing = set(planted.split())
    for seed in SEEDS:
        folder = tmp_path / str(seed)
        folder.mkdir()
        url = f"sqlite:///{folder / 'jobs.db'}"
        if kind == "postgresql":
            server: Server = request.getfixturevalue("postgres")
            url = server.create_database()
        target = Target(
            url,
            (folder / "assets").as_uri(),
            setup="tests.faults.bugs:plant",
            patience=10.0,
            # Who does not tell of every event is waited for in vain.
            deadline=15.0 if {"deaf", "hasty_sweep"} & missing else 60.0,
            overdue=8.0,
        )
        verdict = run(target, draw(seed, SIZE), folder / "run")
        missing -= seen(verdict)  # none, in a run in which the bug did not matter
        if not missing:
            break
    assert missing == set()


def test_every_planted_bug_is_in_the_table() -> None:
    assert {bug for _, planted in PLANTED for bug in planted.split()} == set(WORDS)
