"""A process that serves and renders ends in time: streams end, jobs are put back, before its server's grace is over."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any

from jobkit.base.clock import seconds
from jobkit.base.loops import in_thread
from jobkit.errors import ConfigurationError
from jobkit.runner.runner import Runner
from jobkit.sse.streams import end_all

logger = logging.getLogger("jobkit")
# Seconds, below the ten that containers are given to end.
GRACE = 8.0
# Seconds before the end of the grace at which jobs are put back; for a short grace, its second half.
MARGIN = 2.0
# Seconds between two ends of the streams: requests that came before the signal may open another.
AGAIN = 0.2

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Handler = Callable[[int, FrameType | None], object] | int
Asgi = Callable[[Any, Any, Any], Awaitable[None]]


def on_exit(*runners: Runner, grace: timedelta | float = GRACE) -> None:
    """From now on the process ends its streams and stops ``runners`` as soon as it is told to end, and exits within
    ``grace`` (seconds or timedelta). For WSGI servers and scripts.

    ``grace`` is what the server, or whoever supervises it, waits for before it kills. Jobs in flight may go on until
    two seconds before its end, or half of it, and then go back into the queue, the attempt not charged. It begins with
    SIGTERM, SIGINT, SIGHUP or SIGQUIT, whose handlers so far are called too; where there is none, the signal raises
    ``SystemExit`` in the main thread. Without a signal it begins at the interpreter's exit, which waits for its end.

    Call it in the process that serves, after its server has set its handlers, in the main thread;
    ``ConfigurationError`` in another, and in uWSGI, whose workers exit without Python.
    """
    if "uwsgi" in sys.modules:
        raise ConfigurationError(
            "uWSGI ends its workers without asking Python: render beside them, with attach-daemon2 = "
            "cmd=jobkit work --app MODULE:RUNNER"
        )
    if threading.current_thread() is not threading.main_thread():
        raise ConfigurationError("on_exit handles signals: call it in the main thread")
    ending = _Ending(runners, seconds(grace, "grace", positive=False))
    ending.hear(raises=True)
    atexit.register(ending.finish)


def lifespan(app: Asgi, *runners: Runner, grace: timedelta | float = GRACE) -> Asgi:
    """The ASGI application ``app`` with ``runners`` that are started and stopped with its lifespan.

    They are started when the startup of ``app`` is complete: what ``start`` raises makes the server's startup fail. As
    soon as the process is told to end, its streams end and the runners stop, while the server still waits for its
    responses; they have stopped before the shutdown of ``app`` begins. ``grace`` as for ``on_exit``. An application
    without a lifespan, such as Django's, needs none.
    """
    limit = seconds(grace, "grace", positive=False)

    async def served(scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _Lifespan(app, _Ending(runners, limit), receive, send).run(scope)
        else:
            await app(scope, receive, send)

    return served


class _Ending:
    """The end of this process' streams and runners, begun once, on a thread that waits for it."""

    def __init__(self, runners: tuple[Runner, ...], grace: float) -> None:
        if wrong := [runner for runner in runners if not isinstance(runner, Runner)]:
            raise TypeError(f"expected a jobkit.Runner, not {type(wrong[0]).__name__}")
        self.runners, self._grace = runners, grace
        self._pid = os.getpid()
        self._began: float | None = None
        # Not an Event, nor a thread that is started then: a signal's handler may interrupt anything.
        self._asked: SimpleQueue[None] = SimpleQueue()
        self._over, self._left = threading.Event(), threading.Event()
        self._finishing = False
        self._afterwards: Callable[[], object] = lambda: None

    def watch(self) -> None:
        """From now on ``begin`` has an effect."""
        threading.Thread(target=self._end, name="jobkit-ending", daemon=True).start()

    def hear(self, *, raises: bool) -> None:
        """Begin at the signals that end a process. ``raises``: SystemExit where nothing handled them; else the default
        action follows when it is over.
        """
        self.watch()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                former = signal.getsignal(number)
                if callable(former) or (former is signal.SIG_DFL and number is not signal.SIGQUIT):
                    signal.signal(number, partial(self._heard, former, raises))

    def begin(self) -> None:
        """Any number of times, also in a signal's handler."""
        if self._began is None:
            self._began = time.monotonic()
            self._asked.put(None)

    def finish(self) -> None:
        """Begin, and wait until it is over, or the grace nearly."""
        if self._pid == os.getpid():  # a forked child has nothing to end
            self._finishing = True
            self.begin()
            began = self._began or 0.0
            self._over.wait(max(0.0, began + self._grace - min(0.5, self._grace / 8) - time.monotonic()))
            self._left.set()

    def _heard(self, former: Handler, raises: bool, number: int, frame: FrameType | None) -> None:
        mine = self._pid == os.getpid()
        if mine:
            self.begin()
        if mine and self._finishing:
            return
        if callable(former):
            former(number, frame)
        elif mine and raises:
            raise SystemExit(128 + number)
        elif mine and not self._over.is_set():
            self._afterwards = partial(os.kill, self._pid, number)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _end(self) -> None:
        self._asked.get()
        drain = max(self._grace / 2, self._grace - MARGIN)
        stops = [threading.Thread(target=runner.stop, args=(drain,), daemon=True) for runner in self.runners]
        for stop in stops:
            stop.start()
        left = False
        while not left:
            end_all()
            left = self._left.wait(AGAIN)
            if not (self._over.is_set() or any(stop.is_alive() for stop in stops)):
                self._over.set()
                self._afterwards()


class _Lifespan:
    """One lifespan: the application's own, with the runners within it."""

    def __init__(self, app: Asgi, ending: _Ending, receive: Receive, send: Send) -> None:
        self._app, self._ending, self._receive, self._send = app, ending, receive, send
        self._asked = self._answered = self._failed = False

    async def run(self, scope: Any) -> None:
        try:
            await self._app(scope, self._received, self._answer)
        except Exception:
            if self._answered:
                raise
            logger.debug("the application has no lifespan", exc_info=True)
        if not self._answered:
            if not self._asked:
                await self._received()
            await self._answer({"type": "lifespan.startup.complete"})
            await self._received()
            await self._answer({"type": "lifespan.shutdown.complete"})

    async def _received(self) -> Message:
        message = await self._receive()
        self._asked = True
        if message["type"] == "lifespan.shutdown":
            await in_thread(self._ending.finish)
        return message

    async def _answer(self, message: Message) -> None:
        if self._failed:  # the server knows
            return
        self._answered = True
        if message["type"] == "lifespan.startup.complete":
            try:
                for runner in self._ending.runners:
                    await in_thread(runner.start)
            except Exception as error:
                self._failed = True
                for runner in self._ending.runners:
                    await in_thread(runner.stop, 0.0)
                await self._send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
                raise
            self._ending.hear(raises=False)
        await self._send(message)
