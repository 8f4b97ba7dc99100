"""The store stage: a runner's threads that store what was rendered. No transaction is open there."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial

from jobkit.assets.spool import publish
from jobkit.base.mailbox import Sender
from jobkit.base.threads import Pool, TaskState
from jobkit.rendering.attempt import Attempt

logger = logging.getLogger("jobkit")
# Most small jobs in one batch: more than are claimed at once.
MOST = 64
# How long storing a batch may take, in seconds, before its thread is replaced. The files may still arrive.
STALLED = 60.0


class StoreBatch:
    """Attempts whose keys are recorded. Their files are stored one after the other, and flushed together."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self.attempts = tuple(attempts)
        #: The attempts of which a file was not stored, and why; set by ``publish``.
        self.failures: dict[Attempt, BaseException] = {}
        #: Shared by the thread that stores and the one that may replace it.
        self.task = TaskState()

    def publish(self) -> dict[Attempt, BaseException]:
        """Store every file under its key; return the ``failures``. The spool files are gone afterwards in any case."""
        try:
            failures = publish([draft for attempt in self.attempts for draft in attempt.drafts])
        except BaseException as error:  # whatever a storage raises must not end the thread
            self.failures = dict.fromkeys(self.attempts, error)
        else:
            self.failures = {
                attempt: failures[draft.key]
                for attempt in self.attempts
                for draft in attempt.drafts
                if draft.key in failures
            }
        return self.failures


def store_batches(attempts: Iterable[Attempt], batch_bytes: int) -> list[StoreBatch]:
    """Jobs of up to ``batch_bytes`` in batches of up to ``MOST``; each larger one alone."""
    small, found = [], []
    for attempt in attempts:
        if sum(file.byte_size for file in attempt.stored) <= batch_bytes:
            small.append(attempt)
        else:
            found.append(StoreBatch([attempt]))
    return [*(StoreBatch(small[start : start + MOST]) for start in range(0, len(small), MOST)), *found]


class StoreStage:
    """Stores the files of rendered jobs on threads of ``pool``; batches come back to ``mailbox``. For one thread."""

    def __init__(self, pool: Pool, batch_bytes: int, mailbox: Sender[StoreBatch]) -> None:
        self._pool, self._batch_bytes, self._mailbox = pool, batch_bytes, mailbox
        # When each batch is overdue, on the monotonic clock. Those that were overdue once are not here.
        self._storing: dict[StoreBatch, float] = {}
        #: How many threads were replaced.
        self.replaced = 0

    def submit(self, attempts: Iterable[Attempt]) -> None:
        """Store these, whose keys are recorded."""
        for batch in store_batches(attempts, self._batch_bytes):
            self._storing[batch] = time.monotonic() + STALLED
            self._pool.submit(partial(self._store, batch))

    def finished(self, batch: StoreBatch) -> None:
        """The pipeline has got ``batch`` from the mailbox."""
        self._storing.pop(batch, None)

    def expected_results(self) -> int:
        """How many batches are likely to be stored within milliseconds."""
        # Without batches the storage is far away, and one upload says nothing about the next.
        return len(self._storing) if self._batch_bytes else 0

    def next_deadline_in(self) -> float:
        """Seconds until a batch may be overdue; infinite when none is being stored."""
        return min(self._storing.values(), default=float("inf")) - time.monotonic()

    def replace_overdue(self) -> None:
        """Replace the threads that wait for the storage for too long."""
        now = time.monotonic()
        for batch in [batch for batch, deadline in self._storing.items() if deadline <= now]:
            self._storing[batch] = now + STALLED
            if batch.task.abandon():
                del self._storing[batch]  # no turn waits for it from now on
                self._pool.replace()
                self.replaced += 1
                first, *others = batch.attempts
                jobs = f"{first.claim.job_id} and {len(others)} more" if others else str(first.claim.job_id)
                logger.warning("job %s: the files take long to be stored", jobs)

    def close(self) -> None:
        """Let the threads end once what was submitted is stored. Waits for none."""
        self._pool.close()

    def _store(self, batch: StoreBatch) -> bool:
        batch.task.start()
        failures = batch.publish()
        replaced = batch.task.finish()
        self._mailbox.put(batch)
        for attempt, failure in failures.items():
            with suppress(Exception):  # a host's log handler may raise
                logger.warning("job %s: its files could not be stored", attempt.claim.job_id, exc_info=failure)
        return replaced
