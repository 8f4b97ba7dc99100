"""Blocking calls on threads, from a loop, so that a cancelled task leaves nothing open."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns in a thread. A file that nobody waits for any more is closed."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_drop)
        raise


def _drop(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and task.exception() is None and hasattr(task.result(), "close"):
        task.result().close()


class OneAtATime:
    """Calls on something that is no good for two threads at once, and its end: after any call that a cancelled task has
    left behind, and before any other.
    """

    def __init__(self, close: Callable[[], object]) -> None:
        self._close = close
        self._busy = threading.Lock()
        self._closed = False

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(self._call, partial(function, *args, **kwargs))

    async def close(self) -> None:
        """Close it, whether or not the task that waits here is cancelled, and although the loop may end."""
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
