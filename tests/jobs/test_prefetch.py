"""Prefetched: the same items, each made while the one before is in use."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from typing import NoReturn

import pytest

from jobkit.jobs.creation import prefetched
from tests.support.runners import until


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("jobkit-prefetch")]


class Counted:
    """Numbers from 1 to ``last``, counted when they are drawn; then ``error``, if there is one."""

    def __init__(self, last: int, error: BaseException | None = None) -> None:
        self.last, self.error, self.drawn = last, error, 0
        self.by: set[str] = set()

    def __iter__(self) -> Iterator[int]:
        while self.drawn < self.last:
            self.drawn += 1
            self.by.add(threading.current_thread().name)
            yield self.drawn
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("count", [0, 1, 2, 1_000])
def test_the_items_come_in_their_order_and_the_thread_ends(count: int) -> None:
    items = prefetched(0, iter(Counted(count)))
    assert list(items) == list(range(count + 1))
    assert next(items, None) is None
    assert threads() == []


def test_one_item_is_made_ahead_and_no_more() -> None:
    counted = Counted(10)
    with closing(prefetched(0, iter(counted))) as items:
        for number in range(10):
            assert next(items) == number
            until(lambda number=number: counted.drawn == number + 1)  # type: ignore[misc]
        assert next(items) == 10
        assert len(threads()) == 1
        assert counted.by == set(threads())


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_comes_where_the_item_would(error: BaseException) -> None:
    items = prefetched(0, iter(Counted(2, error)))
    assert [next(items), next(items), next(items)] == [0, 1, 2]
    with pytest.raises(type(error)) as raised:
        next(items)
    assert raised.value is error
    assert threads() == []


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_who_leaves_early_leaves_no_thread(error: type[BaseException]) -> None:
    counted = Counted(1_000)
    items = prefetched(0, iter(counted))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(error), closing(items):
        raise error
    assert threads() == []
    assert counted.drawn <= 2


def test_who_is_interrupted_while_the_thread_starts_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> NoReturn:
        start(thread)
        raise KeyboardInterrupt  # as from a signal handler that raises

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), closing(prefetched(0, iter(Counted(10)))) as items:
        next(items)
    until(lambda: threads() == [])


def test_an_error_that_was_handled_is_gone_without_the_garbage_collector() -> None:
    class Broken(Exception):
        pass

    def failing() -> Iterator[int]:
        raise Broken
        yield 1

    gc.disable()
    try:
        with closing(prefetched(0, failing())) as items:
            assert next(items) == 0
            with pytest.raises(Broken) as raised:
                next(items)
        gone = weakref.ref(raised.value)
        del raised, items
        assert threads() == []
        assert gone() is None
    finally:
        gc.enable()


def test_without_a_thread_the_items_come_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    counted = Counted(3)
    assert list(prefetched(0, iter(counted))) == [0, 1, 2, 3]
    with pytest.raises(LookupError) as raised, closing(prefetched(0, iter(Counted(3)))):
        raise LookupError
    assert raised.value.__context__ is None
    assert counted.by == {threading.current_thread().name}
