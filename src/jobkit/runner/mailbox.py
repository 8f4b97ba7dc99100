"""An inbox: what many threads send to one, which takes all of it at once."""

from __future__ import annotations

import sys
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Message = TypeVar("Message")
# No number of messages.
NEVER = sys.maxsize


class Mailbox(Generic[Message]):
    """Messages in the order in which they came. ``put`` is for any thread, also within a signal handler; ``take`` for
    one.

    Not a queue: that wakes its reader for each message, and two threads that take turns cost more than what they say.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()
        # How many messages wake the reader; while it is awake, no number does.
        self._least = NEVER
        self._rung = False

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> None:
        """Send, and wake the reader if this is what it waits for."""
        self._messages.append(message)
        if len(self._messages) >= self._least:
            self._bell.put(None)

    def ring(self) -> None:
        """Wake the reader now, or keep it from its next sleep, whatever it waits for."""
        self._rung = True
        self._bell.put(None)

    def take(self, timeout: float, least: int = 1) -> list[Message]:
        """Everything that has come, as soon as that is ``least`` messages, or after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        # Before looking how many there are: whoever sends one after that look rings.
        self._least = least
        while not self._rung and len(self._messages) < least and (remaining := deadline - time.monotonic()) > 0:
            try:
                self._bell.get(timeout=remaining)  # an earlier ring may be left: hence the loop
            except Empty:
                break
        self._least, self._rung = NEVER, False
        return [self._messages.popleft() for _ in range(len(self._messages))]
