"""Which jobs are meant: by status, type, source task and the time of their creation."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, TypedDict

import sqlalchemy as sa

from jobkit.base.clock import aware
from jobkit.base.text import storable
from jobkit.tables import content_jobs
from jobkit.types import JobStatus

_c = content_jobs.c
# The statuses in which a job can be cancelled, retried, deleted.
STOPPABLE, REPEATABLE = (JobStatus.QUEUED, JobStatus.RUNNING), (JobStatus.FAILED, JobStatus.CANCELLED)
ENDED = tuple(status for status in JobStatus if status.terminal)


class Which(TypedDict, total=False):
    """Keywords that narrow down the jobs; None narrows nothing. ``since``: created at this time or later; ``until``:
    before this one. Both aware datetimes.
    """

    status: JobStatus | str | None
    job_type: str | None
    source_task_id: str | None
    since: datetime | None
    until: datetime | None


def selected(
    among: Iterable[JobStatus] = JobStatus,
    *,
    status: JobStatus | str | None = None,
    job_type: str | None = None,
    source_task_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[sa.ColumnElement[bool]]:
    """The conditions for these jobs, of those whose status is ``among``. ``ValueError`` or ``TypeError`` naming the
    keyword.
    """
    conditions: list[sa.ColumnElement[bool]] = []
    statuses = list(among)
    if status is not None:
        statuses = [one for one in statuses if one is status_of(status)]
    if len(statuses) == 1:
        conditions.append(_c.status == statuses[0].value)
    elif len(statuses) < len(JobStatus):
        conditions.append(_c.status.in_([one.value for one in statuses]))
    for column, text in ((_c.job_type, job_type), (_c.source_task_id, source_task_id)):
        if text is not None:
            conditions.append(column == storable(text, column.name, blank=True))
    if since is not None:
        conditions.append(_c.created_at >= aware(since, "since"))
    if until is not None:
        conditions.append(_c.created_at < aware(until, "until"))
    return conditions


def status_of(value: Any) -> JobStatus:
    """The status that ``value`` is or spells; ``ValueError``."""
    try:
        return JobStatus(value)
    except ValueError:
        raise ValueError(f"status must be one of {', '.join(JobStatus)}, not {value!r:.80}") from None
