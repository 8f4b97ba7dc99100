"""How many threads take what waits: no more than it is worth, and never too few for ever."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jobkit.base.threads import DaemonPool, InlinePool
from jobkit.runner.render_stage import Slots
from tests.support.runners import until


class Renderer:
    """Notes what it is given, on which threads, and halts while it is closed."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun: list[Any] = []
        self.threads: set[str] = set()
        self.late: set[Any] = set()

    def __call__(self, attempt: Any) -> bool:
        self.begun.append(attempt)
        self.threads.add(threading.current_thread().name)
        assert self.open.wait(60)
        return attempt in self.late


@pytest.fixture
def render() -> Iterator[Renderer]:
    renderer = Renderer()
    yield renderer
    renderer.open.set()


@pytest.fixture
def slots(render: Renderer) -> Iterator[Slots]:
    made = Slots(DaemonPool(3, "slot"), 3, render)
    yield made
    render.open.set()
    made.close()


def add(slots: Slots, count: int) -> None:
    slots.add(range(count))  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "most", "engaged"), [(9, 0.1, 1), (9, 1.5, 2), (9, math.inf, 3), (2, math.inf, 2)])
def test_as_many_are_engaged_as_it_is_worth_and_can_use(
    slots: Slots, render: Renderer, count: int, most: float, engaged: int
) -> None:
    add(slots, count)
    assert slots.can_grow
    slots.grow(most)
    until(lambda: len(render.begun) == engaged)
    assert slots._threads == engaged
    assert slots.can_grow == (engaged < 3 and count > engaged)
    render.open.set()
    until(lambda: slots._threads == 0)
    assert sorted(render.begun) == list(range(count))
    assert len(slots) == 0


def test_one_thread_takes_them_in_order(slots: Slots, render: Renderer) -> None:
    render.open.set()
    add(slots, 50)
    slots.grow(1.0)
    until(lambda: len(render.begun) == 50)
    assert render.begun == list(range(50))
    assert render.threads == {"slot-0"}


def test_what_waits_behind_one_that_takes_long_is_taken_by_others_once_they_are_engaged(
    slots: Slots, render: Renderer
) -> None:
    add(slots, 3)
    slots.grow(1.0)
    until(lambda: render.begun == [0])
    slots.grow(math.inf)
    until(lambda: sorted(render.begun) == [0, 1, 2])


def test_a_thread_that_was_replaced_counts_no_more_and_ends(slots: Slots, render: Renderer) -> None:
    render.late = {0, 1, 2}
    add(slots, 3)
    slots.grow(math.inf)
    until(lambda: len(render.begun) == 3)
    for _ in range(3):
        slots.replace()
    assert slots._threads == 0
    slots.add([3, 4])  # type: ignore[list-item]
    slots.grow(math.inf)
    until(lambda: len(render.begun) == 5)
    render.open.set()
    until(lambda: slots._threads == 0)
    until(lambda: len([t for t in threading.enumerate() if t.name.startswith("slot-")]) <= 3)


def test_what_waits_is_dropped_when_it_closes(slots: Slots, render: Renderer) -> None:
    add(slots, 5)
    slots.grow(1.0)
    until(lambda: render.begun == [0])
    slots.close()
    render.open.set()
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("slot-")])
    assert render.begun == [0]


def test_all_is_done_at_once_where_there_are_no_threads(render: Renderer) -> None:
    render.open.set()
    slots = Slots(InlinePool(), 1, render)
    add(slots, 3)
    slots.grow(math.inf)
    assert render.begun == [0, 1, 2]
    assert slots._threads == 0


def test_no_more_can_be_engaged_than_what_waits_can_use(
    slots: Slots, render: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    add(slots, 1)
    slots.grow(math.inf)
    until(lambda: render.begun == [0])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    add(slots, 1)
    slots.grow(math.inf)
    assert len(slots) == 1
    assert not slots.can_grow  # who waits for the thread that was engaged would else look again without a pause


def test_a_thread_whose_rendering_raises_leaves_its_place_to_others(slots: Slots, render: Renderer) -> None:
    def fail(attempt: Any) -> bool:
        raise SystemExit(attempt)

    slots._render = fail
    add(slots, 5)
    for _ in range(5):
        slots.grow(math.inf)
        until(lambda: slots._threads == 0)
    assert (len(slots), slots._rendering) == (0, 0)
