"""``jobkit jobs list|count|show|cancel|retry|delete``, for operators: jobs of every company."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import sqlalchemy as sa

from jobkit.base.clock import aware
from jobkit.base.ids import CompanyScope, parse_id
from jobkit.base.text import is_storable
from jobkit.cli.app import add_company, add_source, opened
from jobkit.cli.output import complain, plain, progress, shown, table, text
from jobkit.db.host import in_scope
from jobkit.errors import ConfigurationError, InvalidTransition, JobNotFound
from jobkit.jobs.selection import ENDED, REPEATABLE, STOPPABLE, Which, selected
from jobkit.jobs.store import JobStore
from jobkit.tables import JOB_COLUMNS, assets, content_job_events, content_jobs
from jobkit.types import Asset, Job, JobStatus

_c, _e, _a = content_jobs.c, content_job_events.c, assets.c
COLUMNS = ("id", "company_id", "job_type", "status", "attempt", "created_at", "error_message")
# What a list reads: everything but the inputs.
LISTED = tuple(column.name for column in JOB_COLUMNS if column.name != "input")
# In which statuses a job is open to a change.
OPEN_TO = {JobStore.cancel_all: STOPPABLE, JobStore.retry_all: REPEATABLE, JobStore.delete: ENDED}
EVENT_COLUMNS = ("seq", "type", "created_at", "payload")
ASSET_COLUMNS = ("position", "id", "original_filename", "content_type", "byte_size", "provider", "object_key")


def add(commands: Any) -> None:
    parser = commands.add_parser("jobs", help="list, count, show, cancel, retry and delete jobs")
    own = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = own.add_parser("list", help="the newest jobs, of every company")
    listing.add_argument("--limit", type=_count, default=20, metavar="N", help="how many (default: 20)")
    listing.set_defaults(command=_list)
    show = own.add_parser("show", help="one job with its events and assets")
    show.add_argument("job", metavar="JOB", help="the job's id")
    show.add_argument("--internal", action="store_true", help="also the detail of its error that users are not told")
    show.set_defaults(command=_show)
    count = own.add_parser("count", help="how many jobs there are, by status and type")
    count.set_defaults(command=_count_jobs)
    cancel = own.add_parser("cancel", help="cancel jobs: at once when queued, else as soon as their renderer checks")
    cancel.set_defaults(command=partial(_change, change=JobStore.cancel, change_all=JobStore.cancel_all))
    retry = own.add_parser("retry", help="queue failed or cancelled jobs again, with all their attempts")
    retry.set_defaults(command=partial(_change, change=JobStore.retry, change_all=JobStore.retry_all))
    delete = own.add_parser("delete", help="delete the jobs that match and are over, with their events")
    delete.set_defaults(command=partial(change_matching, change_all=JobStore.delete))
    for command in (listing, count, show):
        command.add_argument("--json", action="store_true", help="print a JSON document per line")
    for command in (cancel, retry):
        command.add_argument("job", metavar="JOB", nargs="*", help="a job's id")
        command.add_argument("--all", action="store_true", help="in place of ids: all that match")
    for command in (listing, count, cancel, retry, delete):
        command.add_argument("--status", choices=[str(status) for status in JobStatus], help="only jobs in this status")
        command.add_argument("--type", metavar="TYPE", help="only jobs of this type")
        command.add_argument("--source-task", metavar="ID", help="only jobs of this task")
        command.add_argument(
            "--since", type=_time, metavar="TIME", help="only jobs created at this time or later (UTC)"
        )
        command.add_argument("--until", type=_time, metavar="TIME", help="only jobs created before this time (UTC)")
    for command in (cancel, retry, delete):
        command.add_argument("--yes", action="store_true", help="change all that match, rather than count them")
    for command in (listing, count, show, cancel, retry, delete):
        add_company(command, "jobs")
        add_source(command)


def _count(given: str) -> int:
    if not given.isdecimal() or not given.isascii():
        raise argparse.ArgumentTypeError(f"not a count: {given!r}")
    return min(int(given), (1 << 63) - 1)


def _time(given: str) -> datetime:
    try:
        found = datetime.fromisoformat(given)
        return aware(found if found.tzinfo else found.replace(tzinfo=UTC), "time")
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a time such as 2026-01-31 or 2026-01-31T12:00: {given!r}") from None


def _which(options: argparse.Namespace) -> Which:
    which = {"status": options.status, "job_type": options.type, "source_task_id": options.source_task}
    return cast("Which", {**which, "since": options.since, "until": options.until})


def _selected(options: argparse.Namespace, among: Iterable[JobStatus] = JobStatus) -> list[sa.ColumnElement[bool]]:
    """JobStore lists the jobs of one company only. Whoever runs these commands has the database anyway."""
    if not all(is_storable(text) for text in (options.type, options.source_task) if text is not None):
        return [sa.false()]
    return [in_scope(_c.company_id, options.company), *selected(among, **_which(options))]


def _list(options: argparse.Namespace) -> int:
    query = sa.select(*(_c[name] for name in LISTED)).where(*_selected(options))
    query = query.order_by(_c.created_at.desc(), _c.id.desc()).limit(options.limit)
    with opened(options) as (engine, _), engine.connect() as connection:
        rows = connection.execute(query).all()
    if options.json:
        for row in rows:
            print(json.dumps({name: text(value) for name, value in row._mapping.items()}))
    else:
        table(COLUMNS, ([row._mapping[name] for name in COLUMNS] for row in rows))
    return 0


def _count_jobs(options: argparse.Namespace) -> int:
    columns = (_c.status, _c.job_type)
    query = sa.select(*columns, sa.func.count().label("count")).where(*_selected(options))
    with opened(options) as (engine, _), engine.connect() as connection:
        rows = connection.execute(query.group_by(*columns).order_by(*columns)).all()
    if options.json:
        for row in rows:
            print(json.dumps(row._asdict()))
    else:
        table(("status", "job_type", "count"), rows)
    return 0


def _show(options: argparse.Namespace) -> int:
    with opened(options) as (engine, _), engine.connect() as connection:
        job = JobStore(connection).get_by_id(options.job, company_id=options.company)
        if job is None:
            return _none(options.job)
        told = sa.select(*(_e[name] for name in EVENT_COLUMNS)).where(_e.job_id == job.id).order_by(_e.seq)
        events = connection.execute(told).all()
        theirs = sa.select(assets).where(_a.job_id == job.id).order_by(_a.position, _a.id)
        files = [Asset(*row) for row in connection.execute(theirs)]
        detail = connection.execute(sa.select(_c.error_detail).where(_c.id == job.id)).scalar_one_or_none()
    internal = {"error_detail": detail} if options.internal else {}
    if options.json:
        log = [{name: text(value) for name, value in row._mapping.items()} for row in events]
        print(json.dumps({**plain(job), **internal, "events": log, "assets": [plain(file) for file in files]}))
        return 0
    for name, value in [
        *((field.name, getattr(job, field.name)) for field in dataclasses.fields(job)),
        *internal.items(),
    ]:
        if value is not None:
            print(f"{name:<20} {shown(value)}")
    print()
    table(EVENT_COLUMNS, events)
    if files:
        print()
        table(ASSET_COLUMNS, ([getattr(file, name) for name in ASSET_COLUMNS] for file in files))
    return 0


def _change(options: argparse.Namespace, change: Callable[..., Job], change_all: Callable[..., int]) -> int:
    if options.all == bool(options.job):
        raise ConfigurationError("name jobs, or give --all and what they have in common")
    if options.all:
        return change_matching(options, change_all)
    with opened(options) as (engine, _):
        return max([_change_one(engine, options.company, job, change) for job in options.job])


def change_matching(options: argparse.Namespace, change_all: Callable[..., int]) -> int:
    """In batches, a transaction each. Ctrl-C undoes the batch under way; the next call goes on."""
    done, query = (
        0,
        sa.select(sa.func.count()).select_from(content_jobs).where(*_selected(options, OPEN_TO[change_all])),
    )
    with opened(options) as (engine, _):
        with engine.connect() as connection:
            total = connection.scalar(query) or 0
        if not options.yes:
            print(f"{total} jobs match; nothing was changed, --yes changes them")
            return 0
        with progress("jobs", total) as advance:
            try:
                while count := _batch(engine, options, change_all):
                    done += count
                    advance(count)
            except KeyboardInterrupt:
                complain(f"interrupted: {done} of {total} jobs were changed; the same command goes on")
                return 130
    print(f"{done} jobs changed")
    return 0


def _batch(engine: sa.Engine, options: argparse.Namespace, change_all: Callable[..., int]) -> int:
    with engine.begin() as connection:
        return change_all(JobStore(connection), options.company, **_which(options))


def _change_one(engine: sa.Engine, company: CompanyScope, job_id: str, change: Callable[..., Job]) -> int:
    try:
        with engine.begin() as connection:
            job = change(JobStore(connection), job_id, company_id=company)
    except JobNotFound:
        return _none(job_id)
    except InvalidTransition as error:
        complain(error)
        return 1
    asked = job.status is JobStatus.RUNNING and job.cancel_requested_at is not None
    print(f"{job.id}: {job.status}{', asked to stop' if asked else ''}", flush=True)
    return 0


def _none(job: str) -> int:
    complain(f"no job {job}{'' if parse_id(job) else ', which is not an id'}")
    return 1
