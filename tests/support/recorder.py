"""What receivers heard, with waiting on a condition instead of sleeping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

from jobkit import JobEvent, signals

ALL = [signals.SIGNALS[name] for name in signals.SIGNALS]


class Recorder:
    """Connected to every signal, for every company, from ``__enter__`` to ``__exit__``."""

    def __init__(self) -> None:
        self.events: list[JobEvent] = []
        self._changed = threading.Condition()

    def receive(self, company_id: str, *, event: JobEvent) -> None:
        with self._changed:
            assert company_id == event.company_id
            self.events.append(event)
            self._changed.notify_all()

    def types(self, job_id: object = None) -> list[str]:
        """The short names of the events, in the order of arrival."""
        return [e.type.removeprefix("content_job.") for e in self.events if job_id is None or e.job_id == job_id]

    def wait(self, until: Callable[[list[str]], bool], timeout: float = 60.0) -> None:
        """Return once ``until(types())`` holds; fail the test after ``timeout`` seconds."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: until(self.types()), timeout)
        assert arrived, f"after {timeout} s only {self.types()}"

    def __enter__(self) -> Self:
        for signal in ALL:
            signal.connect(self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signal in ALL:
            signal.disconnect(self.receive)
