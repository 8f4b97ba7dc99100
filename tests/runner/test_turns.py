"""A turn and its parts."""

from __future__ import annotations

from jobkit.base.ids import new_id
from jobkit.jobs.claims import Claim, Completion
from jobkit.runner.turns import Turn


def end() -> Completion:
    return Completion(Claim(new_id(), "acme", "note", {}, None, 1, 1))


def test_the_parts_of_a_turn_whose_reply_was_lost_know_that() -> None:
    for may_be_committed in (False, True):
        parts = Turn([end(), end()], limit=1, may_be_committed=may_be_committed).parts()
        assert [(len(part.completions), part.limit, part.may_be_committed) for part in parts] == [
            (1, 0, may_be_committed),
            (1, 0, may_be_committed),
            (0, 1, False),
        ]
