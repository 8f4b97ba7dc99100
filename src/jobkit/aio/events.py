"""Committed events as asynchronous iterators: ``subscribe`` for those of a company, ``watch`` for one job's."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Self
from uuid import UUID

import sqlalchemy as sa

from jobkit import signals
from jobkit.base.clock import seconds
from jobkit.base.ids import ANY_COMPANY, CompanyId, CompanyScope, require_company_id
from jobkit.errors import SubscriberTooSlow
from jobkit.events.iteration import LoopWaker, aiterate
from jobkit.events.watch import TimedWatch, Watcher
from jobkit.types import JobEvent

# Bound of the events that wait for their subscriber.
LIMIT = 1_000


def subscribe(company_id: CompanyId, *, limit: int = LIMIT) -> Subscription:
    """Every event of one company that is signalled in this process from now on; use it with ``async with``.

    It needs a started ``Relay`` or ``Runner``, as signals do. Up to ``limit`` events wait for a slow reader; when more
    come, the subscription ends: those that wait are still given, then ``SubscriberTooSlow`` is raised. Called on the
    running loop that will read it.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit must be a count above zero, not {limit!r}")
    return Subscription(company_id, limit)


class Subscription(AsyncIterator[JobEvent]):
    """``async for event in subscription``. It ends with ``aclose``, with its ``async with`` block, or when nobody holds
    it any more; cancelling the task that waits for the next event, or a timeout there, loses none.
    """

    def __init__(self, company_id: CompanyId, limit: int) -> None:
        self._queue = EventQueue(require_company_id(company_id), limit)
        unsubscribe = signals.subscribe(company_id, self._queue.receive)
        self._queue.on_overflow = unsubscribe
        # The signals hold the queue, which does not hold the subscription.
        self._unsubscribe = weakref.finalize(self, unsubscribe)
        self._unsubscribe.atexit = False

    async def __anext__(self) -> JobEvent:
        return await self._queue.get()

    async def aclose(self) -> None:
        """Hear no more. The iteration ends, for whoever waits for the next event too."""
        self._unsubscribe()
        self._queue.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class EventQueue:
    """Events on their way from the thread that sends signals to the loop that reads them."""

    def __init__(self, company_id: str, limit: int) -> None:
        self.on_overflow: Callable[[], None] = lambda: None
        self._company_id, self._limit = company_id, limit
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: deque[JobEvent] = deque()
        self._filled = asyncio.Event()
        self._overflowed = self._closed = False

    def receive(self, event: JobEvent) -> None:
        """Keep an event. From any thread."""
        with self._lock:
            if self._closed or self._overflowed:
                return
            self._overflowed = len(self._waiting) == self._limit
            if not self._overflowed:
                self._waiting.append(event)
            first, overflowed = len(self._waiting) == 1, self._overflowed
        if overflowed:
            self.on_overflow()
        if first or overflowed:  # a loop that is late to read is woken once, not for every event
            try:
                self._loop.call_soon_threadsafe(self._filled.set)
            except RuntimeError:  # the loop is closed, and nobody will ever read
                self.on_overflow()

    async def get(self) -> JobEvent:
        while True:
            with self._lock:
                if self._closed:
                    raise StopAsyncIteration
                if self._waiting:
                    return self._waiting.popleft()
                if self._overflowed:
                    raise SubscriberTooSlow(self._company_id, self._limit)
                self._filled.clear()
            await self._filled.wait()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._waiting.clear()
        self._filled.set()


async def watch(
    engine: sa.Engine,
    job_id: UUID | str,
    *,
    company_id: CompanyScope = ANY_COMPANY,
    timeout: timedelta | float | None = None,
) -> AsyncGenerator[JobEvent, None]:
    """``jobkit.watch`` as an asynchronous iterator. ``engine`` is a synchronous one.

    ``aclose()`` on it, or cancelling the task that iterates it, ends it at once. ``JobNotFound`` from its first step
    for an unknown id and for another company's job; later when the job is deleted.
    """
    limit = None if timeout is None else seconds(timeout, "timeout", positive=False)
    waker = LoopWaker()
    watcher = Watcher(engine, job_id, company_id=company_id, wake=waker.wake)
    async with aclosing(aiterate(TimedWatch(watcher, limit), waker)) as events:
        async for event in events:
            yield event
