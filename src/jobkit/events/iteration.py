"""A subscription iterated: on a thread, and on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import closing, suppress
from typing import Protocol, TypeVar

from jobkit.base.loops import Serialized

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class Subscription(Protocol[T_co]):
    """Gives items when it was woken. Used by one thread at a time; never waits for an event."""

    @property
    def over(self) -> bool:
        """Whether there are no more items."""

    def begin(self) -> Sequence[T_co]:
        """Items to give before the database is asked; ``close`` is called from now on."""

    def open(self) -> Sequence[T_co]:
        """Subscribe, and give the first items. Blocks on the database."""

    def take(self, *, woken: bool) -> Sequence[T_co]:
        """The items since the last call; ``woken``: False after ``pause`` seconds without. May ask the database."""

    def pause(self) -> float:
        """Seconds to wait for being woken."""

    def close(self) -> None:
        """Hear nothing more, hold nothing."""


class ThreadWaker:
    """Wakes a waiting thread. A bare lock: a signal handler may call ``wake`` while its own thread does anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        with suppress(RuntimeError):  # it was woken already
            self._lock.release()

    def wait(self, timeout: float) -> bool:
        """Wait until woken since the last call; False after ``timeout`` seconds."""
        return self._lock.acquire(timeout=timeout)


class LoopWaker:
    """Wakes a task that waits on the loop that runs now. ``wake`` from any thread."""

    def __init__(self) -> None:
        self._loop, self._woken = asyncio.get_running_loop(), asyncio.Event()

    def wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody will ever read
            self._loop.call_soon_threadsafe(self._woken.set)

    async def wait(self, timeout: float) -> bool:
        """Wait until woken since the last call; False after ``timeout`` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), timeout)
        woken = self._woken.is_set()
        self._woken.clear()
        return woken


def iterate(subscription: Subscription[T], waker: ThreadWaker) -> Generator[T, None, None]:
    """The items of a subscription, on this thread; ``waker`` is what it wakes."""
    if subscription.over:
        return
    with closing(subscription):
        yield from subscription.begin()
        yield from subscription.open()
        while not subscription.over:
            woken = waker.wait(subscription.pause())
            yield from subscription.take(woken=woken)


async def aiterate(subscription: Subscription[T], waker: LoopWaker) -> AsyncGenerator[T, None]:
    """As ``iterate``, on the running loop: what may block is called on threads."""
    if subscription.over:
        return
    thread = Serialized(subscription.close)
    try:
        for item in subscription.begin():
            yield item
        for item in await thread.call(subscription.open):
            yield item
        while not subscription.over:
            woken = await waker.wait(subscription.pause())
            for item in await thread.call(subscription.take, woken=woken):
                yield item
    finally:
        await thread.close()
