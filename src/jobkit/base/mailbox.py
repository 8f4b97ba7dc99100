"""A mailbox: many threads send to one, which drains it."""

from __future__ import annotations

import sys
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

Message = TypeVar("Message")
Sent_contra = TypeVar("Sent_contra", contravariant=True)
# More messages than ever come.
NEVER = sys.maxsize


class Sender(Protocol[Sent_contra]):
    """A mailbox for those who send to it."""

    def put(self, message: Sent_contra) -> None: ...


class Mailbox(Generic[Message]):
    """Messages in the order in which they came. ``put`` and ``ring`` may be called by any thread, also in a signal
    handler; ``drain`` by one.

    Not ``queue.Queue``: it wakes the reader for each message, and the context switches cost more than the messages.
    """

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()
        # How many messages wake the reader; NEVER while it is awake.
        self._least = NEVER
        self._rung = False

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> None:
        """Send, and wake the reader if it waits for no more than this."""
        self._messages.append(message)
        if len(self._messages) >= self._least:
            self._bell.put(None)

    def ring(self) -> None:
        """Wake the reader now, or keep it from waiting the next time, whatever it waits for."""
        self._rung = True
        self._bell.put(None)

    def drain(self, timeout: float, least: int = 1) -> list[Message]:
        """Every message, as soon as there are ``least`` of them, or after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        # Set before the messages are counted: whoever sends one after that rings.
        self._least = least
        while not self._rung and len(self._messages) < least and (remaining := deadline - time.monotonic()) > 0:
            try:
                self._bell.get(timeout=remaining)  # maybe an earlier ring: hence the loop
            except Empty:
                break
        self._least, self._rung = NEVER, False
        return [self._messages.popleft() for _ in range(len(self._messages))]
