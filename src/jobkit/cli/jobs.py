"""``jobkit jobs list|show|cancel|retry``, for operators: jobs of every company."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import sqlalchemy as sa

from jobkit.base.ids import parse_id
from jobkit.base.text import storable
from jobkit.cli.app import add_source, opened
from jobkit.cli.output import complain, plain, shown, table, text
from jobkit.errors import InvalidTransition, JobNotFound
from jobkit.jobs.store import JobStore, job_of
from jobkit.tables import JOB_COLUMNS, assets, content_job_events, content_jobs
from jobkit.types import Asset, Job, JobStatus

_c, _e, _a = content_jobs.c, content_job_events.c, assets.c
COLUMNS = ("id", "company_id", "job_type", "status", "attempt", "created_at", "error_message")
EVENT_COLUMNS = ("seq", "type", "created_at", "payload")
ASSET_COLUMNS = ("position", "id", "original_filename", "content_type", "byte_size", "provider", "object_key")


def add(commands: Any) -> None:
    parser = commands.add_parser("jobs", help="list, show, cancel and retry jobs")
    own = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = own.add_parser("list", help="the newest jobs, of every company")
    listing.add_argument("--status", choices=[str(status) for status in JobStatus], help="only jobs in this status")
    listing.add_argument("--type", metavar="TYPE", help="only jobs of this type")
    listing.add_argument("--limit", type=_count, default=20, metavar="N", help="how many (default: 20)")
    listing.set_defaults(command=_list)
    show = own.add_parser("show", help="one job with its events and assets")
    show.add_argument("job", metavar="JOB", help="the job's id")
    show.set_defaults(command=_show)
    cancel = own.add_parser("cancel", help="cancel jobs: at once when queued, else as soon as their renderer checks")
    cancel.set_defaults(command=partial(_change, change=JobStore.cancel))
    retry = own.add_parser("retry", help="queue failed or cancelled jobs again, with all their attempts")
    retry.set_defaults(command=partial(_change, change=JobStore.retry))
    for command in (listing, show):
        command.add_argument("--json", action="store_true", help="print a JSON document per line")
    for command in (cancel, retry):
        command.add_argument("job", metavar="JOB", nargs="+", help="a job's id")
    for command in (listing, show, cancel, retry):
        command.add_argument("--company", metavar="ID", help="only jobs of this company")
        add_source(command)


def _count(given: str) -> int:
    if not given.isdecimal() or not given.isascii():
        raise argparse.ArgumentTypeError(f"not a count: {given!r}")
    return min(int(given), (1 << 63) - 1)


def _list(options: argparse.Namespace) -> int:
    # JobStore lists the jobs of one company only. Whoever runs this command has the database anyway.
    query = sa.select(*JOB_COLUMNS).order_by(_c.created_at.desc(), _c.id.desc()).limit(options.limit)
    for column, wanted in ((_c.company_id, options.company), (_c.status, options.status), (_c.job_type, options.type)):
        if wanted is not None:
            query = query.where(column == wanted if _can_be_stored(wanted) else sa.false())
    with opened(options) as (engine, _), engine.connect() as connection:
        jobs = [job_of(row) for row in connection.execute(query)]
    if options.json:
        for job in jobs:
            print(json.dumps(plain(job)))
    else:
        table(COLUMNS, ([getattr(job, name) for name in COLUMNS] for job in jobs))
    return 0


def _can_be_stored(wanted: str) -> bool:
    try:
        storable(wanted, "argument", blank=True)
    except ValueError:
        return False
    return True


def _show(options: argparse.Namespace) -> int:
    with opened(options) as (engine, _), engine.connect() as connection:
        job = JobStore(connection).get_by_id(options.job, company_id=options.company)
        if job is None:
            return _none(options.job)
        told = sa.select(*(_e[name] for name in EVENT_COLUMNS)).where(_e.job_id == job.id).order_by(_e.seq)
        events = connection.execute(told).all()
        theirs = sa.select(assets).where(_a.job_id == job.id).order_by(_a.position, _a.id)
        files = [Asset(*row) for row in connection.execute(theirs)]
    if options.json:
        log = [{name: text(value) for name, value in row._mapping.items()} for row in events]
        print(json.dumps({**plain(job), "events": log, "assets": [plain(file) for file in files]}))
        return 0
    for field in dataclasses.fields(job):
        if (value := getattr(job, field.name)) is not None:
            print(f"{field.name:<20} {shown(value)}")
    print()
    table(EVENT_COLUMNS, events)
    if files:
        print()
        table(ASSET_COLUMNS, ([getattr(file, name) for name in ASSET_COLUMNS] for file in files))
    return 0


def _change(options: argparse.Namespace, change: Callable[..., Job]) -> int:
    with opened(options) as (engine, _):
        return max([_change_one(engine, options.company, job, change) for job in options.job])


def _change_one(engine: sa.Engine, company: str | None, job_id: str, change: Callable[..., Job]) -> int:
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
