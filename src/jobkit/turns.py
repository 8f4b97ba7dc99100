"""A turn of the pipeline: what one transaction does with attempts, and whether the database failed it or refused it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import sqlalchemy as sa

from jobkit import policy
from jobkit.attempt import Attempt
from jobkit.claims import Completion, Intent
from jobkit.text import describe


@dataclass(slots=True)
class Turn:
    """What one transaction does."""

    ends: list[Completion] = field(default_factory=list)
    rendered: list[Attempt] = field(default_factory=list)
    limit: int = 0
    asked: int = 0
    thorough: bool = False
    # Whether some of the ends were sent to the database before, without a reply.
    again: bool = False

    @property
    def size(self) -> int:
        """How many jobs take part, besides those that are claimed."""
        return len(self.ends) + len(self.rendered)

    @property
    def only_claims(self) -> bool:
        return bool(self.limit) and not self.size

    def __bool__(self) -> bool:
        return bool(self.ends or self.rendered or self.limit)

    def parts(self) -> list[Turn]:
        """Each thing by itself, so that what the database refuses fails alone."""
        found = [Turn(ends=[end], again=self.again) for end in self.ends]
        found += [Turn(rendered=[attempt]) for attempt in self.rendered]
        return [*found, Turn(limit=self.limit, asked=self.asked, thorough=self.thorough)] if self.limit else found


def intents(attempt: Attempt) -> list[Intent]:
    """The keys of a rendered attempt's files."""
    return [Intent(attempt.claim.company_id, file.provider, file.object_key) for file in attempt.stored]


def end(attempt: Attempt, failure: BaseException | None, *, now: datetime) -> Completion:
    """The end of an attempt: its files; or, after a failure, its job's end or its place in the queue."""
    if failure is None:
        return Completion(attempt.claim, files=attempt.stored)
    verdict = policy.verdict(
        failure,
        describe(failure),
        attempt=attempt.claim.attempt,
        max_attempts=attempt.max_attempts,
        interrupted=attempt.interrupted,
        now=now,
    )
    return Completion(attempt.claim, verdict=verdict)


def is_outage(error: Exception) -> bool:
    """Whether the database failed, rather than refused these values: the same values may succeed later."""
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError | OSError)
