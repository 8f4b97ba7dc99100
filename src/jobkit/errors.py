"""Every error jobkit raises.

::

    JobkitError
    ├── ConfigurationError
    │   └── SchemaOutOfDate
    ├── JobNotFound (LookupError)
    ├── AssetNotFound (LookupError)
    ├── UnknownJobType (LookupError)
    ├── InvalidTransition
    ├── IdempotencyConflict
    ├── EventsPruned
    ├── SubscriberTooSlow
    └── AssetError
        ├── AssetTooLarge
        ├── AssetEmpty
        ├── AssetCorrupt
        ├── AssetKeyRefused
        └── AssetUrlUnavailable
    RenderInterrupted (BaseException)
    ├── JobCancelled
    ├── JobTimeout
    └── LeaseLost
    UserError, Retry, Snooze, Discard (Exception), raised by renderers

Bad arguments are Python's own ``ValueError`` and ``TypeError``, and name the field.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from jobkit.base.clock import seconds


class JobkitError(Exception):
    """Base of all errors of jobkit, except those that are raised into or by renderers."""


class ConfigurationError(JobkitError):
    """The engine, the storage or the renderers are set up in a way that would break a guarantee."""


class SchemaOutOfDate(ConfigurationError):
    """The tables in the database are not the ones this version of jobkit works with."""


class JobNotFound(JobkitError, LookupError):
    """No job has this id, or it belongs to another company."""

    def __init__(self, job_id: object) -> None:
        super().__init__(f"no job {job_id}")


class AssetNotFound(JobkitError, LookupError):
    """No asset has this id or key, or it belongs to another company, or its object was swept."""


class UnknownJobType(JobkitError, LookupError):
    """No renderer is registered for this job type."""

    def __init__(self, job_type: str) -> None:
        super().__init__(f"no renderer for job type {job_type!r}")


class InvalidTransition(JobkitError):
    """The job's status does not allow this change."""

    def __init__(self, job_id: UUID, status: str, wanted: str) -> None:
        super().__init__(f"job {job_id} is {str(status)!r}: {wanted}")


class IdempotencyConflict(JobkitError):
    """A job with this idempotency key exists, with a different input."""

    def __init__(self, job_id: UUID, key: str) -> None:
        super().__init__(f"job {job_id} has the idempotency key {key!r:.80} and another input")


class EventsPruned(JobkitError):
    """Events after this cursor were pruned, or it is of another log: read the state of the jobs instead."""

    def __init__(self, cursor: str, reason: str) -> None:
        super().__init__(f"cannot replay the events after {cursor}: {reason}; read the state of the jobs instead")


class SubscriberTooSlow(JobkitError):
    """More events than its limit waited for an asynchronous subscriber: read the state anew, and subscribe again."""

    def __init__(self, company_id: str, limit: int) -> None:
        super().__init__(f"more than {limit} events of company {company_id!r} waited for this subscriber")


class AssetError(JobkitError):
    """Base of the errors about an asset's bytes or key."""


class AssetTooLarge(AssetError):
    """A body is larger than the limit; nothing was stored."""

    def __init__(self, filename: str | None, limit: int | float, source: str) -> None:
        super().__init__(f"{filename or 'file'!r} is larger than the limit of {limit} bytes ({source})")


class AssetEmpty(AssetError):
    """A body has no bytes; nothing was stored."""

    def __init__(self, filename: str | None) -> None:
        super().__init__(f"{filename or 'file'!r} is empty")


class AssetCorrupt(AssetError):
    """The stored object is missing, or its size or sha256 is not what the row says."""


class AssetKeyRefused(AssetError):
    """The object key belongs to another company or leaves the storage root."""


class AssetUrlUnavailable(AssetError):
    """The storage cannot sign URLs."""

    def __init__(self, provider: str) -> None:
        super().__init__(f"storage {provider!r} has no URLs that it signs: send the bytes that AssetStore.open reads")


class RenderInterrupted(BaseException):
    """Raised in a renderer that should stop; ``except Exception`` does not catch it."""


class JobCancelled(RenderInterrupted):
    """The job was cancelled."""


class JobTimeout(RenderInterrupted):
    """The job ran longer than its renderer allows."""


class LeaseLost(RenderInterrupted):
    """The runner has lost its claim on the job: the result of this attempt will be ignored."""


class UserError(Exception):
    """Raised by a renderer, or by what it calls: the attempt failed, and this text is written for the user who sees the
    job. The text of other errors stays with the operators, behind a reference.
    """


# The longest wait of ``Retry`` and ``Snooze``, in seconds: more is a mistake, and may overflow a date.
LONGEST_WAIT = 3650 * 86400.0


class Retry(Exception):
    """Raised by a renderer: this attempt failed; users are told the ``reason``. If attempts are left, try again
    ``after`` seconds or a timedelta, by default after the job type's backoff. ``ValueError`` beyond ten years.
    """

    seconds: float | None = None

    def __init__(self, after: timedelta | float | None = None, reason: str = "") -> None:
        super().__init__(reason or "the renderer asked for another attempt")
        self.seconds = None if after is None else _wait(after, "after")


class Snooze(Exception):
    """Raised by a renderer: run the job again in ``for_`` seconds or a timedelta. The attempt does not count.
    ``ValueError`` beyond ten years.
    """

    seconds: float = 0.0

    def __init__(self, for_: timedelta | float) -> None:
        super().__init__("the renderer asked to run later")
        self.seconds = _wait(for_, "for_")


class Discard(Exception):
    """Raised by a renderer: the job fails with this ``reason``, which users are told, also when attempts are left."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "the renderer discarded the job")


def _wait(value: timedelta | float, field: str) -> float:
    wait = seconds(value, field, positive=False)
    if wait > LONGEST_WAIT:
        raise ValueError(f"{field} must be at most ten years, not {value!r:.80}")
    return wait
