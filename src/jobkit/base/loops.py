"""Blocking calls from an event loop, and an event loop for threads."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

logger = logging.getLogger("jobkit")

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` in a thread and return its result. When this task is cancelled the call goes on, and a file
    that it returns is closed.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_drop)
        raise


def _drop(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and task.exception() is None and hasattr(task.result(), "close"):
        task.result().close()


class Serialized:
    """Calls that only one thread may make at a time, and their end: ``close`` runs after a call that a cancelled task
    left running, and calls after it are cancelled.
    """

    def __init__(self, close: Callable[[], object]) -> None:
        self._close = close
        self._busy = threading.Lock()
        self._closed = False

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(self._call, partial(function, *args, **kwargs))

    async def close(self) -> None:
        """Run the ``close`` function, even when this task is cancelled or its loop ends meanwhile."""
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._end))

    def _call(self, function: Callable[[], T]) -> T:
        with self._busy:
            if self._closed:
                raise asyncio.CancelledError
            return function()

    def _end(self) -> None:
        with self._busy:
            self._closed = True
            self._close()


class LoopThread:
    """An asyncio event loop on a daemon thread of its own, which the first coroutine starts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run ``coroutine`` on the loop. The future has its result or exception."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(self._loop,), name="jobkit-loop", daemon=True).start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Stop the loop; coroutines that still run are abandoned."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        while True:
            try:
                loop.run_forever()
                break
            except (SystemExit, KeyboardInterrupt) as error:  # these end run_forever
                logger.warning("a coroutine raised %s; its event loop goes on", type(error).__name__)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
