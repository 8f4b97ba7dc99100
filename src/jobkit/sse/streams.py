"""The events of one job, or of one company, as ``text/event-stream``: bytes for WSGI and ASGI.

What is sent is worked out once, by a ``_Session``, which never waits for an event.
Two drivers do: on a thread, and on a loop.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from types import FrameType, MappingProxyType
from typing import Any, Self
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import seconds
from jobkit.base.forks import reset_in_children
from jobkit.base.loops import Serialized, in_thread
from jobkit.base.text import require_company_id
from jobkit.db.host import log_key
from jobkit.events import hub
from jobkit.sse.messages import CompanyMessages, JobMessages, MessageSource

#: What a response with a stream needs: no cache may keep it, no nginx may gather it.
HEADERS: Mapping[str, str] = MappingProxyType(
    {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
)


def stream(
    engine: sa.Engine,
    company_id: object,
    job_id: UUID | str | None = None,
    *,
    last_event_id: str | None = None,
    keep_alive: timedelta | float = 15.0,
    retry: timedelta | float = 3.0,
) -> Stream:
    """The events of ``job_id``, or of all jobs of ``company_id``, from now on or after ``last_event_id``, as bytes.

    Blocks on the database. ``JobNotFound``, from this call, for an unknown job and for another company's. Whatever
    ``last_event_id`` is, it raises nothing: one that is too old, or not of this stream, gives a ``resync`` message.
    """
    bell = _Bell()
    session = _session(engine, company_id, job_id, last_event_id, keep_alive, retry, bell.ring)
    session.locate()
    return Stream(session, bell)


async def astream(
    engine: sa.Engine,
    company_id: object,
    job_id: UUID | str | None = None,
    *,
    last_event_id: str | None = None,
    keep_alive: timedelta | float = 15.0,
    retry: timedelta | float = 3.0,
) -> AsyncStream:
    """As ``stream``, for the running loop; awaited, because it asks the database. ``engine`` is a synchronous one."""
    loop, woken = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody will ever read
            loop.call_soon_threadsafe(woken.set)

    session = _session(engine, company_id, job_id, last_event_id, keep_alive, retry, wake)
    await in_thread(session.locate)
    return AsyncStream(session, woken)


def end_all() -> None:
    """End every stream of this process; each client comes back after its ``retry``, and misses nothing. For a host that
    shuts down: servers wait for responses that are under way. At any time, also in a signal handler.
    """
    for session in list(_sessions):
        session.end()


def end_on_signals(*numbers: signal.Signals) -> None:
    """From now on ``end_all`` comes before whatever is done at SIGINT and SIGTERM, or at those given. On the main
    thread, when the server has set its own handlers: in the lifespan of an ASGI app, where a WSGI app is made. On
    another thread, such as a test client's, no handler can be set, and nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in numbers or (signal.SIGINT, signal.SIGTERM):
        former = signal.getsignal(number)
        if not isinstance(former, _Handler):
            signal.signal(number, _Handler(former))


class _Handler:
    """Ends the streams, then does what would have been done."""

    def __init__(self, former: Callable[[int, FrameType | None], Any] | int | None) -> None:
        self._former = former

    def __call__(self, number: int, frame: FrameType | None) -> None:
        end_all()
        if callable(self._former):
            self._former(number, frame)
        elif self._former == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class Stream(Iterator[bytes]):
    """Pieces of a response's body, for WSGI: each is a whole number of messages. ``close()`` ends it.

    ``status``: of the response; 204, with nothing to iterate, when the client has seen the job's end already, so that
    an ``EventSource`` stops coming back.
    """

    def __init__(self, session: _Session, bell: _Bell) -> None:
        self.status = session.status
        self._session, self._pieces = session, _pieces(session, bell)

    def __next__(self) -> bytes:
        return next(self._pieces)

    def close(self) -> None:
        """End it, from any thread: hear nothing more, hold nothing. Any number of times."""
        self._session.end()
        with suppress(ValueError):  # it is iterated on another thread, which closes it
            self._pieces.close()


class AsyncStream(AsyncIterator[bytes]):
    """Pieces of a response's body, for ASGI, as ``Stream``. ``aclose()``, or cancelling the task that iterates, ends
    it.
    """

    def __init__(self, session: _Session, woken: asyncio.Event) -> None:
        self.status = session.status
        self._session, self._pieces = session, _apieces(session, woken)

    async def __anext__(self) -> bytes:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """End it: hear nothing more, hold nothing. Any number of times."""
        self._session.end()
        with suppress(RuntimeError):  # it is iterated by another task, which closes it
            await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _pieces(session: _Session, bell: _Bell) -> Generator[bytes, None, None]:
    if session.over:
        return
    _sessions.add(session)
    try:
        yield session.greeting
        if piece := session.open():
            yield piece
        while not session.over:
            if piece := session.next():
                yield piece
            elif not session.over:
                bell.wait(session.pause())
    finally:
        _sessions.discard(session)
        session.close()


async def _apieces(session: _Session, woken: asyncio.Event) -> AsyncGenerator[bytes, None]:
    if session.over:
        return
    _sessions.add(session)
    thread = Serialized(session.close)
    try:
        yield session.greeting
        if piece := await thread.call(session.open):
            yield piece
        while not session.over:
            woken.clear()
            if piece := await thread.call(session.next):
                yield piece
            elif not session.over:
                with suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), session.pause())
    finally:
        _sessions.discard(session)
        await thread.close()


class _Bell:
    """Wakes the one that waits. A bare lock, because a signal handler may ring while its own thread does anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        with suppress(RuntimeError):  # it was rung already
            self._lock.release()

    def wait(self, timeout: float) -> None:
        self._lock.acquire(timeout=timeout)


class _Session:
    """One stream: what is to be sent, and when. Used by one thread at a time, but for ``end``."""

    def __init__(
        self,
        source: MessageSource,
        engine: sa.Engine,
        last_event_id: str | None,
        keep_alive: float,
        retry: float,
        wake: Callable[[], object],
    ) -> None:
        self._source, self._engine, self._last_event_id, self._wake = source, engine, last_event_id, wake
        self._log = log_key(engine)
        self._keep_alive, self._retry = keep_alive, retry
        self._ended = False
        self._sent = time.monotonic()
        reset_in_children(self)

    def locate(self) -> None:
        self._source.locate(self._last_event_id)

    @property
    def status(self) -> int:
        return 204 if self._source.over else 200

    @property
    def over(self) -> bool:
        return self._ended or self._source.over

    @property
    def greeting(self) -> bytes:
        """What opens the way through every proxy, before anything is asked of the database."""
        return b"retry: %d\n\n%s" % (round(self._retry * 1000), self._source.greeting())

    def open(self) -> bytes:
        return self._noted(self._source.open())

    def next(self) -> bytes:
        """What is to be sent now; nothing when there is nothing."""
        if self._ended:
            return b""
        if piece := self._source.take():
            return self._noted(piece)
        hub.subscribers.look(self._engine, self._log)
        if time.monotonic() >= self._sent + self._keep_alive:
            return self._noted(b":\n\n" + self._source.idle())
        return b""

    def pause(self) -> float:
        """How long to wait for an event, in seconds."""
        return max(0.0, min(hub.LOOK, self._sent + self._keep_alive - time.monotonic()))

    def end(self) -> None:
        self._ended = True
        self._wake()

    def close(self) -> None:
        self._source.close()

    def _after_fork(self) -> None:
        """End in a forked child, where nobody takes what the parent's streams hear."""
        self._ended = True
        _sessions.discard(self)

    def _noted(self, piece: bytes) -> bytes:
        if piece:
            self._sent = time.monotonic()
        return piece


def _session(
    engine: sa.Engine,
    company_id: object,
    job_id: UUID | str | None,
    last_event_id: str | None,
    keep_alive: timedelta | float,
    retry: timedelta | float,
    wake: Callable[[], object],
) -> _Session:
    owner = require_company_id(company_id)
    source: MessageSource
    if job_id is None:
        source = CompanyMessages(engine, owner, wake)
    else:
        source = JobMessages(engine, owner, job_id, wake)
    return _Session(
        source, engine, last_event_id, seconds(keep_alive, "keep_alive"), seconds(retry, "retry", positive=False), wake
    )


_sessions: set[_Session] = set()
