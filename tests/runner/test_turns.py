"""A turn and its parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

import jobkit
from jobkit.base.clock import utcnow
from jobkit.base.ids import new_id
from jobkit.jobs.claims import Claim, Completion, failed
from jobkit.runner.in_flight import InFlight
from jobkit.runner.turns import Committer, Turn
from tests.support.runners import statuses


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


def test_a_claim_that_was_refused_with_the_rest_of_its_turn_is_not_looked_for(
    engine: sa.Engine, create: Callable[..., jobkit.Job]
) -> None:
    # It was rolled back. What this runner gave up, as nothing can be written of it, is not to be taken for that claim:
    # it would go back into the queue, and be claimed and given up again without end.
    rule = {
        "postgresql": "ALTER TABLE content_jobs ADD CHECK (status <> 'failed')",
        "sqlite": "CREATE TRIGGER t BEFORE UPDATE ON content_jobs WHEN NEW.status = 'failed' "
        "BEGIN SELECT RAISE(ABORT, 'never'); END",
    }
    with engine.begin() as connection:
        connection.exec_driver_sql(rule[engine.dialect.name])
    committer = Committer(engine, worker_id="worker", lease=60, clock=utcnow, in_flight=InFlight())
    try:
        create()
        (claim,) = committer.commit(Turn(limit=1)).claimed
        with pytest.raises(sa.exc.IntegrityError):
            committer.commit(Turn(completions=[failed(claim, "no")], limit=1))
        assert not committer.unsure
        assert committer.commit(Turn(limit=1)).claimed == []
    finally:
        committer.link.close()
    assert statuses(engine) == ["running"]
