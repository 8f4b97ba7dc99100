"""The jobs that a pipeline has claimed and not ended."""

from __future__ import annotations

import threading
import time
from uuid import UUID

from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt


class InFlight:
    """Attempts, one for each job. The pipeline's thread adds and removes them; lease keeper and renderers read them.

    Without a lock: each reader needs one operation of the dictionary, which the interpreter does as a whole. A signal
    handler may call ``Runner.stop``, where a lock that its thread holds already would never be free.
    """

    def __init__(self, reported: threading.Event | None = None) -> None:
        self._attempts: dict[UUID, Attempt] = {}
        self._abandoned = False
        #: Set by a progress report. Wakes the lease keeper, which records it.
        self.reported = threading.Event() if reported is None else reported
        #: Reports before this time, of the monotonic clock, wait for the keeper's next regular tick.
        self.record_at = 0.0

    def __len__(self) -> int:
        return len(self._attempts)

    def attempts(self) -> list[Attempt]:
        """All of them, as they are now."""
        return list(self._attempts.values())

    def living(self) -> list[Attempt]:
        """Those that have begun, or wait for a thread: the others are about to be released."""
        return [attempt for attempt in self.attempts() if not attempt.task.cancelled]

    def holds(self, claim: Claim) -> bool:
        """Whether ``claim`` is its job's last: this runner may have lost the job, and claimed it again."""
        attempt = self._attempts.get(claim.job_id)
        return attempt is not None and attempt.claim.fence == claim.fence

    def wants(self, claim: Claim) -> bool:
        """Whether what is rendered for ``claim`` will be stored."""
        return not self._abandoned and self.holds(claim)

    def add(self, attempt: Attempt) -> Attempt | None:
        """Add an attempt; return the one before at the same job, which it replaces."""
        former = self._attempts.get(attempt.claim.job_id)
        self._attempts[attempt.claim.job_id] = attempt
        return former

    def pop(self, claim: Claim) -> Attempt | None:
        """The job has ended, or is somebody else's: its attempt."""
        return self._attempts.pop(claim.job_id, None)

    def abandon(self) -> None:
        """Nothing that is rendered from now on is wanted."""
        self._abandoned = True

    def progressed(self) -> None:
        """A renderer has reported progress: wake the lease keeper, unless it has just recorded some."""
        if time.monotonic() >= self.record_at:
            self.reported.set()
