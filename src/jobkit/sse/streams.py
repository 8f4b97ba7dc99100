"""Streams: a ``_Session`` decides what is sent; ``events.iteration`` waits, on a thread or on an event loop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from types import FrameType, MappingProxyType
from typing import Any, Self
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.clock import seconds
from jobkit.base.forks import reset_in_children
from jobkit.base.ids import CompanyId, require_company_id
from jobkit.base.loops import in_thread
from jobkit.db.logs import log_of
from jobkit.events import hub
from jobkit.events.hub import Wake
from jobkit.events.iteration import LoopWaker, ThreadWaker, aiterate, iterate
from jobkit.sse.messages import CompanyMessages, JobMessages, MessageSource

#: What a response with a stream needs: no cache may keep it, no nginx may gather it.
HEADERS: Mapping[str, str] = MappingProxyType(
    {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
)


def stream(
    engine: sa.Engine,
    company_id: CompanyId,
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
    waker = ThreadWaker()
    session = _Session(engine, company_id, job_id, last_event_id, keep_alive, retry, waker.wake)
    return Stream(session, waker)


async def astream(
    engine: sa.Engine,
    company_id: CompanyId,
    job_id: UUID | str | None = None,
    *,
    last_event_id: str | None = None,
    keep_alive: timedelta | float = 15.0,
    retry: timedelta | float = 3.0,
) -> AsyncStream:
    """As ``stream``, for the running loop; awaited, because it asks the database. ``engine`` is a synchronous one."""
    waker = LoopWaker()
    session = await in_thread(_Session, engine, company_id, job_id, last_event_id, keep_alive, retry, waker.wake)
    return AsyncStream(session, waker)


def end_all() -> None:
    """End every stream of this process; each client comes back after its ``retry``, and misses nothing. For a host that
    shuts down: servers wait for responses under way. At any time, also in a signal handler.
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
    """Ends the streams, then does what the former handler did."""

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

    def __init__(self, session: _Session, waker: ThreadWaker) -> None:
        self.status = session.status
        self._session, self._pieces = session, iterate(session, waker)

    def __next__(self) -> bytes:
        return next(self._pieces)

    def close(self) -> None:
        """End it, from any thread: hear nothing more, hold nothing. Any number of times."""
        self._session.end()
        with suppress(ValueError):  # it is iterated on another thread, which closes it
            self._pieces.close()


class AsyncStream(AsyncIterator[bytes]):
    """Pieces of a response's body, for ASGI, as ``Stream``. ``aclose()``, or cancelling the iterating task, ends it."""

    def __init__(self, session: _Session, waker: LoopWaker) -> None:
        self.status = session.status
        self._session, self._pieces = session, aiterate(session, waker)

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


class _Session:
    """One stream as a ``Subscription``: what is to be sent, and when. Used by one thread at a time, but for ``end``."""

    def __init__(
        self,
        engine: sa.Engine,
        company_id: CompanyId,
        job_id: UUID | str | None,
        last_event_id: str | None,
        keep_alive: timedelta | float,
        retry: timedelta | float,
        wake: Wake,
    ) -> None:
        """It begins after ``last_event_id``. Blocks on the database; ``JobNotFound``."""
        owner = require_company_id(company_id)
        self._keep_alive, self._retry = seconds(keep_alive, "keep_alive"), seconds(retry, "retry", positive=False)
        self._source: MessageSource
        if job_id is None:
            self._source = CompanyMessages.seek(engine, owner, last_event_id, wake)
        else:
            self._source = JobMessages.seek(engine, owner, job_id, last_event_id, wake)
        self._engine, self._log, self._wake = engine, log_of(engine), wake
        self._ended = False
        self._sent = time.monotonic()
        reset_in_children(self)

    @property
    def status(self) -> int:
        return 204 if self._source.over else 200

    @property
    def over(self) -> bool:
        return self._ended or self._source.over

    def begin(self) -> list[bytes]:
        """The head of the stream, which opens the way through every proxy. From now on ``end_all`` ends it."""
        _sessions.add(self)
        return [b"retry: %d\n\n%s" % (round(self._retry * 1000), self._source.preamble())]

    def open(self) -> list[bytes]:
        return self._noted(self._source.open())

    def take(self, *, woken: bool) -> list[bytes]:
        if self._ended:
            return []
        piece = self._source.take()
        if not piece:
            hub.subscribers.poll(self._engine, self._log)
            if time.monotonic() >= self._sent + self._keep_alive:
                piece = b":\n\n" + self._source.keep_alive()
        return self._noted(piece)

    def pause(self) -> float:
        return max(0.0, min(hub.POLL, self._sent + self._keep_alive - time.monotonic()))

    def end(self) -> None:
        self._ended = True
        self._wake()

    def close(self) -> None:
        _sessions.discard(self)
        self._source.close()

    def _after_fork(self) -> None:
        """End in a forked child, where nobody takes what the parent's streams hear."""
        self._ended = True
        _sessions.discard(self)

    def _noted(self, piece: bytes) -> list[bytes]:
        if not piece:
            return []
        self._sent = time.monotonic()
        return [piece]


_sessions: set[_Session] = set()
