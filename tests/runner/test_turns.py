"""A turn and its parts."""

from __future__ import annotations

from jobkit.base.ids import new_id
from jobkit.jobs.claims import Claim, Completion
from jobkit.runner.turns import Turn


def end() -> Completion:
    return Completion(Claim(new_id(), "acme", "note", {}, None, 1, 1))


def test_the_parts_of_a_turn_whose_reply_was_lost_know_that() -> None:
    for again in (False, True):
        parts = Turn(ends=[end(), end()], limit=1, again=again).parts()
        assert [(len(part.ends), part.limit, part.again) for part in parts] == [
            (1, 0, again),
            (1, 0, again),
            (0, 1, False),
        ]
