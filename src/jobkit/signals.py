"""The blinker signals of a job's life, and their delivery: each receiver by itself, whatever the others do.

Receivers get ``receiver(company_id, *, event)``. ``connect`` is blinker's: it holds receivers weakly unless
``weak=False``, and ``sender=company_id`` narrows to one company. A signal is only ever sent for a committed event.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from inspect import iscoroutinefunction
from itertools import chain
from typing import Any, TypeVar
from weakref import ref

from blinker import ANY, NamedSignal
from blinker.base import ANY_ID

from jobkit.base.forks import hold_during_fork
from jobkit.base.ids import CompanyId, require_company_id
from jobkit.base.logs import exc_info_of, job_fields
from jobkit.types import CONTENT_JOB_EVENTS, JobEvent

Receiver = TypeVar("Receiver", bound=Callable[..., Any])
Listener = Callable[[JobEvent], object]
# Receivers, and whether they are held weakly: a weak one is called for the receiver, or None.
Audience = list[tuple[bool, Callable[..., Any]]]

logger = logging.getLogger("jobkit")
# Release the GIL after this many receivers in a row; else other threads wait for the switch interval, 5 ms: as long as
# tens of small jobs take.
RECEIVERS_PER_TURN = 500
_delivering = threading.local()
# Connecting, disconnecting and choosing receivers, one at a time: blinker's bookkeeping is not made for threads. An
# RLock, because a weak receiver may be collected, and thereby disconnected, in the middle of any of them.
_bookkeeping = threading.RLock()
hold_during_fork(_bookkeeping)


class JobSignal(NamedSignal):
    """A signal whose senders are company ids, as text."""

    def __init__(self, name: str, doc: str | None = None) -> None:
        super().__init__(name, doc)
        self._chosen: dict[Hashable, Audience] = {}

    def audience(self, company_id: str) -> Iterable[tuple[bool, Callable[..., Any]]]:
        """The receivers of this company's events: those of every company, and its own. None while it is muted."""
        while not self.is_muted:
            chosen = self._chosen
            everyone = self._choose(ANY_ID)
            own = self._choose(company_id) if company_id in self._by_sender else []
            if chosen is self._chosen:  # else a receiver came, went or moved between the two
                return chain(everyone, own)
        return ()

    def _choose(self, sender_id: Hashable) -> Audience:
        """The receivers connected to this sender, and not to all. Kept until one comes or goes: with thousands of
        receivers, choosing them takes longer than calling them.
        """
        found = self._chosen.get(sender_id)
        if found is None:
            with _bookkeeping:
                chosen = self._chosen  # another one from now on, should a receiver be collected while this is made
                ids = self._by_sender.get(sender_id, set())
                if sender_id != ANY_ID:
                    ids = ids - self._by_sender.get(ANY_ID, set())
                held = [self.receivers.get(receiver_id) for receiver_id in list(ids)]
                found = chosen[sender_id] = [(isinstance(one, ref), one) for one in held if one is not None]
        return found

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Within it receivers come or go. Drops the choices made before, and those made meanwhile: a signal handler or
        the garbage collector may have had this thread deliver then.
        """
        self._chosen = {}
        try:
            yield
        finally:
            self._chosen = {}

    def connect(self, receiver: Receiver, sender: Any = ANY, weak: bool = True) -> Receiver:
        """As blinker's; the text of the sender counts, because equal UUIDs are different senders to blinker.

        ``TypeError`` for a coroutine function: nobody would await it; ``ValueError`` or ``TypeError`` for a sender that
        is no company.
        """
        _refuse_coroutine(receiver)
        with _bookkeeping, self._changing():
            return super().connect(receiver, _sender(sender), weak)

    def disconnect(self, receiver: Callable[..., Any], sender: Any = ANY) -> None:
        """As blinker's; the text of the sender counts here too."""
        super().disconnect(receiver, _sender(sender))

    def _clear_state(self) -> None:
        """As blinker's, which hosts' tests call: nobody is connected any more."""
        with _bookkeeping, self._changing():
            super()._clear_state()

    def _disconnect(self, receiver_id: Hashable, sender_id: Hashable) -> None:
        # blinker's goes through every sender, which takes long when there are thousands. And it keeps a receiver that
        # is disconnected from its last sender, and that sender.
        with _bookkeeping, self._changing():
            senders = self._by_receiver.get(receiver_id, set())
            for left in list(senders) if sender_id == ANY_ID else [sender_id]:
                senders.discard(left)
                self._by_sender[left].discard(receiver_id)
                if not self._by_sender[left]:
                    del self._by_sender[left]
            if not senders:
                self._by_receiver.pop(receiver_id, None)
                self.receivers.pop(receiver_id, None)


def _sender(company_id: Any) -> Any:
    return company_id if company_id is ANY else require_company_id(company_id)


def _refuse_coroutine(receiver: object) -> None:
    if iscoroutinefunction(receiver) or iscoroutinefunction(getattr(receiver, "__call__", None)):  # noqa: B004
        hint = "signals are sent from a thread, connect a plain function"
        raise TypeError(f"{receiver!r} is a coroutine function; {hint}")


SIGNALS: dict[str, JobSignal] = {}


def _signal(name: str, doc: str) -> JobSignal:
    SIGNALS[name] = JobSignal(name, doc)
    return SIGNALS[name]


content_job_queued = _signal("content_job.queued", "Created, or back in the queue.")
content_job_running = _signal("content_job.running", "Claimed by a runner.")
content_job_done = _signal("content_job.done", "Finished, its files stored.")
content_job_failed = _signal("content_job.failed", "Failed for good.")
content_job_cancelled = _signal("content_job.cancelled", "Stopped on request.")
content_job_progress = _signal("content_job.progress", "Further on than before.")
content_job_retrying = _signal("content_job.retrying", "Failed or lost its worker, and will run again.")
assert tuple(SIGNALS) == CONTENT_JOB_EVENTS


def subscribe(company_id: CompanyId, listener: Listener) -> Callable[[], None]:
    """Call ``listener(event)`` for every event of one company, until the function returned is called.

    The listener is held strongly. ``TypeError`` for a coroutine function.
    """
    _refuse_coroutine(listener)

    def receive(_company_id: str, *, event: JobEvent) -> None:
        listener(event)

    for signal in SIGNALS.values():
        signal.connect(receive, sender=company_id, weak=False)

    def unsubscribe() -> None:
        for signal in SIGNALS.values():
            signal.disconnect(receive)

    return unsubscribe


def any_receivers() -> bool:
    """Whether anyone listens to anything."""
    return any(signal.receivers for signal in SIGNALS.values())


def deliver(events: Iterable[JobEvent], origin: str = "") -> None:
    """Call the receivers of each event, in order. One that raises is logged and the others still run; nothing is
    raised. ``origin``: the name of the log they are from.

    Events delivered from within a receiver wait until the current ones are through, so recursion has no depth.
    """
    queue: deque[tuple[JobEvent, str]] | None = getattr(_delivering, "queue", None)
    if queue is not None:
        queue.extend((event, origin) for event in events)
        return
    _delivering.queue = queue = deque((event, origin) for event in events)
    called = 0
    try:
        while queue:
            event, _delivering.origin = queue.popleft()
            called = _send(event, called)
    finally:
        _delivering.queue = None


def origin() -> str:
    """The log of the event that this thread delivers now. A process may have several, with companies of one name."""
    found: str = getattr(_delivering, "origin", "")
    return found


def _send(event: JobEvent, before: int) -> int:
    """Call the receivers; return how many were called in a row, with those ``before`` this event."""
    signal, company_id, called = SIGNALS.get(event.type), event.company_id, before
    for called, (weak, held) in enumerate(signal.audience(company_id) if signal else (), before + 1):
        if not called % RECEIVERS_PER_TURN:
            time.sleep(0)
        receiver = held() if weak else held
        if receiver is None:  # collected since
            continue
        try:
            receiver(company_id, event=event)
        except BaseException as error:  # SystemExit too: one receiver must not end the thread that serves all
            message, fields = "receiver %r failed on %s of job %s", job_fields(event.job_id, company_id)
            logger.error(message, receiver, event.type, event.job_id, exc_info=exc_info_of(error), extra=fields)
    return called
