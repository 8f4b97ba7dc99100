"""What a feed was offered: in order, and through only when all before it is."""

from __future__ import annotations

from uuid import uuid4

from jobkit.base.clock import utcnow
from jobkit.db.dialects.base import EventRow
from jobkit.events.feed import OwnEvents


def row(number: int) -> EventRow:
    return EventRow(number, 0, 1, "acme", "content_job.queued", uuid4(), utcnow(), {})


def test_what_nobody_wants_is_through_at_once() -> None:
    offers = OwnEvents()
    assert not offers.add([row(1), row(2)], wanted=False, room=True)
    assert offers.delivered(offers.accepted)
    assert not offers.ready


def test_what_nobody_wants_does_not_count_for_what_is_being_delivered() -> None:
    offers = OwnEvents()
    assert offers.add([row(1)], wanted=True, room=True)
    assert [taken.id for taken in offers.take()] == [1]
    offers.add([row(2)], wanted=False, room=True)  # the last receiver has gone, and is at work still
    assert not offers.delivered(1)
    offers.through(1)
    assert offers.delivered(1)
    offers.through(len(offers.take()))
    assert offers.delivered(2)


def test_what_nobody_wants_does_not_count_for_what_is_left_to_the_scan() -> None:
    offers = OwnEvents()
    assert offers.add([row(1)], wanted=True, room=False)
    offers.add([row(2)], wanted=False, room=True)
    assert not offers.delivered(1)
