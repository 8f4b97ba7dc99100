"""Prefetch: what an iterator gives next is made on a thread while the caller waits for something else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def prefetched(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Within it, the same items: a thread draws the first at once, and each of the others while the one before is in
    use. It has ended, or ends with what it draws just then, when this is left.

    What ``items`` raises is raised where the item would come. Where no thread can be started, items are drawn when they
    are asked for.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    drawn: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()

    def draw() -> None:
        while wanted.get():
            try:
                drawn.put((next(items),))
            except StopIteration:
                drawn.put(None)
            except BaseException as error:  # SystemExit too: whoever waits for the item shall hear of it
                drawn.put(error)

    def taken() -> Iterator[T]:
        while (found := drawn.get()) is not None:
            if isinstance(found, BaseException):
                try:
                    raise found
                finally:
                    del found  # its traceback has this frame
            wanted.put(True)
            yield found[0]

    wanted.put(True)
    try:
        try:
            threading.Thread(target=draw, name="jobkit-prefetch", daemon=True).start()
            given = taken()
        except RuntimeError:  # the interpreter is ending, or the system has no more threads
            given = items
        yield given
    finally:
        wanted.put(False)
