"""Batches: rendered jobs whose files one thread stores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jobkit.assets.spool import publish
from jobkit.base.threads import TaskState
from jobkit.rendering.attempt import Attempt

# How many small jobs are stored together at most: more than are claimed at once.
MOST = 64


class StoreBatch:
    """Attempts whose keys are recorded. Their files are stored one after the other, flushed together."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self.attempts = tuple(attempts)
        #: The attempts of which a file was not stored, and why; known when ``publish`` is through.
        self.failures: dict[Attempt, BaseException] = {}
        #: Between the thread that stores and the one that may not want to wait for it.
        self.handover = TaskState()

    def publish(self) -> dict[Attempt, BaseException]:
        """Store every file under its key; return the ``failures``. The spool files are gone afterwards in any case."""
        try:
            failures = publish([draft for attempt in self.attempts for draft in attempt.drafts])
        except BaseException as error:  # of no single file: what a storage raises shall not end the thread
            self.failures = dict.fromkeys(self.attempts, error)
        else:
            self.failures = {
                attempt: failures[draft.key]
                for attempt in self.attempts
                for draft in attempt.drafts
                if draft.key in failures
            }
        return self.failures


def store_batches(attempts: Iterable[Attempt], together: int) -> list[StoreBatch]:
    """Jobs of up to ``together`` bytes by ``MOST``, each of the others alone."""
    small, found = [], []
    for attempt in attempts:
        if sum(file.byte_size for file in attempt.stored) <= together:
            small.append(attempt)
        else:
            found.append(StoreBatch([attempt]))
    return [*(StoreBatch(small[start : start + MOST]) for start in range(0, len(small), MOST)), *found]
