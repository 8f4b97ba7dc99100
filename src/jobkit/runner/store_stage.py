"""The store stage: a runner's threads that store what was rendered. No transaction is open there."""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial

from jobkit.assets.spool import publish
from jobkit.base.clock import Backoff
from jobkit.base.logs import exc_info_of
from jobkit.base.mailbox import Sender
from jobkit.base.threads import Pool, TaskState
from jobkit.errors import AssetKeyRefused, AssetTooLarge
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.failures import fields_of

logger = logging.getLogger("jobkit")
# Most small jobs in one batch: more than are claimed at once.
MOST = 64
# What a storage refuses whenever it is asked. Everything else may pass; but after EIO, where Linux drops what it could
# not write, a second flush would succeed without the bytes.
_FINAL = (AssetKeyRefused, AssetTooLarge, ValueError, TypeError)
# For how long a file is stored again at most, in seconds.
RETRY_MOST = 3600.0
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
        """Store every file under its key that is not stored yet; return the ``failures``, whose spool files stay."""
        try:
            failures = publish([draft for attempt in self.attempts for draft in attempt.drafts if not draft.stored])
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
    """Stores the files of rendered jobs on threads of ``pool``; batches come back to ``mailbox``. For one thread.

    What a storage does not take is tried again, with growing pauses, for ``retry_for`` seconds; not in a pool whose
    tasks would keep the caller waiting.
    """

    def __init__(self, pool: Pool, batch_bytes: int, mailbox: Sender[StoreBatch], retry_for: float) -> None:
        self._pool, self._batch_bytes, self._mailbox = pool, batch_bytes, mailbox
        self._retry_for = min(retry_for, RETRY_MOST) if pool.waits else 0.0
        # Until when each attempt that failed is tried again; those that wait for it, and when it is time.
        self._until: dict[Attempt, float] = {}
        self._waiting: list[Attempt] = []
        self._backoff, self._again_at = Backoff(), math.inf
        self._closed = False
        # When each batch is overdue, on the monotonic clock. Those that were overdue once are not here.
        self._storing: dict[StoreBatch, float] = {}
        #: How many threads were replaced.
        self.replaced = 0

    def submit(self, attempts: Iterable[Attempt]) -> None:
        """Store these, whose keys are recorded."""
        for batch in store_batches(attempts, self._batch_bytes):
            self._storing[batch] = time.monotonic() + STALLED
            self._pool.submit(partial(self._store, batch))

    def finished(self, batch: StoreBatch) -> list[tuple[Attempt, BaseException | None]]:
        """The pipeline has got ``batch`` from the mailbox: its attempts that ended, each with its failure."""
        self._storing.pop(batch, None)
        again = [attempt for attempt, failure in batch.failures.items() if self._may_try_again(attempt, failure)]
        if again:
            self._backoff.failed()
            self._waiting += again
            self._again_at = time.monotonic() + self._backoff.pause
        elif not batch.failures:
            self._backoff.succeeded()
        return self._over((one, batch.failures.get(one)) for one in batch.attempts if one not in again)

    def try_again(self) -> list[tuple[Attempt, BaseException | None]]:
        """Store again what waits for that, when it is time; the attempts that are no longer wanted, each with why."""
        if time.monotonic() < self._again_at:
            return []
        waiting, self._waiting, self._again_at = self._waiting, [], math.inf
        unwanted = {attempt: reason for attempt in waiting if (reason := attempt.interruption) is not None}
        self.submit(attempt for attempt in waiting if attempt not in unwanted)
        return self._over(unwanted.items())

    def expected_results(self) -> int:
        """How many batches are likely to be stored within milliseconds."""
        # Without batches the storage is far away, and one upload says nothing about the next.
        return len(self._storing) if self._batch_bytes else 0

    def next_deadline_in(self) -> float:
        """Seconds until a batch may be overdue; infinite when none is being stored."""
        return min(self._again_at, *self._storing.values(), math.inf) - time.monotonic()

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
                logger.warning("job %s: the files take long to be stored", jobs, extra=fields_of(first.claim))

    def close(self) -> None:
        """Let the threads end once what was submitted is stored. Waits for none."""
        self._closed = True
        self._pool.close()
        for attempt in self._waiting:
            attempt.discard()

    def _may_try_again(self, attempt: Attempt, failure: BaseException) -> bool:
        until = self._until.setdefault(attempt, time.monotonic() + self._retry_for)
        lost = isinstance(failure, OSError) and failure.errno == errno.EIO
        if self._closed or lost or isinstance(failure, _FINAL) or time.monotonic() >= until:
            return False
        if self._backoff.failures == 0:
            _log("job %s: its files could not be stored yet, and are tried again", attempt, failure)
        return True

    def _over(
        self, ended: Iterable[tuple[Attempt, BaseException | None]]
    ) -> list[tuple[Attempt, BaseException | None]]:
        found = list(ended)
        for attempt, failure in found:
            self._until.pop(attempt, None)
            if failure is not None:
                attempt.discard()
                _log("job %s: its files could not be stored", attempt, failure)
        return found

    def _store(self, batch: StoreBatch) -> bool:
        batch.task.start()
        failures = batch.publish()
        replaced = batch.task.finish()
        self._mailbox.put(batch)
        if self._closed:  # the mailbox may have been drained for the last time
            for attempt in failures:
                attempt.discard()
        return replaced


def _log(message: str, attempt: Attempt, failure: BaseException) -> None:
    fields = fields_of(attempt.claim)
    told, shown = f"{message} (reference {fields['reference']})", exc_info_of(failure)
    with suppress(Exception):  # a host's log handler may raise
        logger.warning(told, attempt.claim.job_id, exc_info=shown, extra=fields)
