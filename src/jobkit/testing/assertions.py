"""Assertions about the jobs that an app created."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from jobkit.base.ids import ANY_COMPANY, CompanyScope, require_company_id
from jobkit.db.host import connection_of
from jobkit.jobs.store import job_of
from jobkit.tables import JOB_COLUMNS, content_jobs
from jobkit.types import Job

if TYPE_CHECKING:
    from jobkit.db.host import Host

_c = content_jobs.c
SHOWN = 20


def assert_job_created(
    session: Host,
    company_id: CompanyScope = ANY_COMPANY,
    *,
    job_type: str | None = None,
    input: dict[str, Any] | None = None,
    **fields: Any,
) -> Job:
    """The newest job that ``session`` sees with these values. ``AssertionError``, listing the jobs, when there is none.

    ``input``: items that the job's input must contain. ``fields``: other attributes of ``Job``, such as ``status``,
    ``run_at`` or ``source_task_id``; ``TypeError`` for an unknown one.
    """
    wanted, jobs = _wanted(company_id, job_type, input, fields), _jobs(session)
    for job in jobs:
        if _is(job, wanted):
            return job
    raise AssertionError(f"no job with {_shown(wanted)} was created; there {_listed(jobs)}")


def assert_no_job_created(
    session: Host,
    company_id: CompanyScope = ANY_COMPANY,
    *,
    job_type: str | None = None,
    input: dict[str, Any] | None = None,
    **fields: Any,
) -> None:
    """``AssertionError`` when ``session`` sees a job with these values, given as to ``assert_job_created``."""
    wanted = _wanted(company_id, job_type, input, fields)
    found = [job for job in _jobs(session) if _is(job, wanted)]
    if found:
        raise AssertionError(f"a job with {_shown(wanted) or 'anything'} was created: there {_listed(found)}")


def _wanted(
    company_id: CompanyScope, job_type: str | None, input: dict[str, Any] | None, fields: dict[str, Any]
) -> dict[str, Any]:
    if unknown := sorted(fields.keys() - {column.name for column in JOB_COLUMNS}):
        raise TypeError(f"a job has no {', '.join(unknown)}")
    given = {
        "company_id": None if company_id is ANY_COMPANY else require_company_id(company_id),
        "job_type": job_type,
        "input": input,
    }
    return {name: value for name, value in given.items() if value is not None} | fields


def _jobs(session: Host) -> list[Job]:
    query = sa.select(*JOB_COLUMNS).order_by(_c.created_at.desc(), _c.id.desc())
    return [job_of(row) for row in connection_of(session).execute(query)]


def _is(job: Job, wanted: dict[str, Any]) -> bool:
    return all(
        value.items() <= job.input.items() if name == "input" else getattr(job, name) == value
        for name, value in wanted.items()
    )


def _shown(wanted: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in wanted.items())


def _listed(jobs: list[Job]) -> str:
    if not jobs:
        return "are none"
    lines = [f"  {job.company_id!r} {job.job_type!r} {job.status.value} {job.input!r:.200}" for job in jobs[:SHOWN]]
    more = [f"  and {len(jobs) - SHOWN} more"] if len(jobs) > SHOWN else []
    return "\n".join(["are:", *lines, *more])
