"""Events that a process publishes to its own feed: in order, and each done only when all before it are."""

from __future__ import annotations

from uuid import uuid4

from jobkit.base.clock import utcnow
from jobkit.db.dialects.base import EventRow
from jobkit.events.own_events import OwnEvents


def row(number: int) -> EventRow:
    return EventRow(number, 0, 1, "acme", "content_job.queued", uuid4(), utcnow(), {})


def test_what_nobody_wants_is_done_with_at_once() -> None:
    own = OwnEvents()
    assert not own.add([row(1), row(2)], wanted=False, room=True)
    assert own.are_done(own.accepted)
    assert not own.ready


def test_what_nobody_wants_does_not_count_for_what_is_being_delivered() -> None:
    own = OwnEvents()
    assert own.add([row(1)], wanted=True, room=True)
    assert [drained.id for drained in own.drain()] == [1]
    own.add([row(2)], wanted=False, room=True)  # the last receiver has gone, and is at work still
    assert not own.are_done(1)
    own.mark_done(1)
    assert own.are_done(1)
    own.mark_done(len(own.drain()))
    assert own.are_done(2)


def test_what_nobody_wants_does_not_count_for_what_is_left_to_the_scan() -> None:
    own = OwnEvents()
    assert own.add([row(1)], wanted=True, room=False)
    own.add([row(2)], wanted=False, room=True)
    assert not own.are_done(1)
