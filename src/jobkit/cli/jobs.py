"""``jobkit jobs list|show|cancel|retry`` and ``jobkit prune``, for whoever operates the app: every company's jobs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobkit.cli.app import add_app, migrated
from jobkit.errors import InvalidTransition, JobNotFound
from jobkit.ids import parse_id
from jobkit.jobs import JobStore, job_of
from jobkit.pruning import prune
from jobkit.tables import content_job_events, content_jobs
from jobkit.text import printable
from jobkit.types import Job, JobStatus

_c = content_jobs.c
COLUMNS = ("id", "company_id", "job_type", "status", "attempt", "created_at", "error_message")


def add(commands: Any) -> None:
    parser = commands.add_parser("jobs", help="see, cancel and retry jobs")
    own = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = own.add_parser("list", help="the newest jobs, of every company")
    listing.add_argument("--company", metavar="ID", help="only those of one company")
    listing.add_argument("--status", choices=[str(status) for status in JobStatus], help="only those in this status")
    listing.add_argument("--type", metavar="TYPE", help="only those of this type")
    listing.add_argument("--limit", type=_count, default=20, metavar="N", help="how many (default: 20)")
    listing.set_defaults(command=_list)
    show = own.add_parser("show", help="one job with its events and assets")
    show.set_defaults(command=_show)
    cancel = own.add_parser("cancel", help="stop a job: at once when it is queued, else as soon as its renderer asks")
    cancel.set_defaults(command=_cancel)
    retry = own.add_parser("retry", help="put a failed or cancelled job back into the queue, as new")
    retry.set_defaults(command=_retry)
    for command in (listing, show):
        command.add_argument("--json", action="store_true", help="a JSON document on each line")
    for command in (show, cancel, retry):
        command.add_argument("job", metavar="JOB", help="the job's id")
    pruning = commands.add_parser("prune", help="tell which old jobs would go; with --yes delete them")
    pruning.add_argument("--older-than", type=_days, required=True, metavar="DAYS", help="how long ago they ended")
    pruning.add_argument("--assets", action="store_true", help="their assets too")
    pruning.add_argument("--yes", action="store_true", help="do it")
    pruning.set_defaults(command=_prune)
    for command in (listing, show, cancel, retry, pruning):
        add_app(command, "whose database")


def _count(text: str) -> int:
    if not text.isdecimal() or not text.isascii():
        raise argparse.ArgumentTypeError(f"not a count: {text!r}")
    return min(int(text), (1 << 63) - 1)


def _days(text: str) -> timedelta:
    try:
        days = timedelta(days=float(text))
    except (ValueError, OverflowError):
        days = timedelta(-1)
    if days < timedelta(0):
        raise argparse.ArgumentTypeError(f"not a number of days: {text!r}")
    return days


def _list(options: argparse.Namespace) -> int:
    # A JobStore lists one company's jobs, so that no web page shows another's. Who may run this sees the database.
    query = sa.select(content_jobs).order_by(_c.created_at.desc(), _c.id.desc()).limit(options.limit)
    for column, wanted in ((_c.company_id, options.company), (_c.status, options.status), (_c.job_type, options.type)):
        if wanted is not None:
            query = query.where(column == wanted)
    with migrated(options.app) as runner, runner.engine.connect() as connection:
        jobs = [job_of(row) for row in connection.execute(query)]
    if options.json:
        for job in jobs:
            print(json.dumps(_plain(job)))
    else:
        _table(COLUMNS, ([_shown(getattr(job, name)) for name in COLUMNS] for job in jobs))
    return 0


def _show(options: argparse.Namespace) -> int:
    with migrated(options.app) as runner, runner.engine.connect() as connection:
        job = JobStore(connection).get_by_id(options.job)
        if job is None:
            return _none(options.job)
        events = connection.execute(
            sa.select(content_job_events.c.seq, content_job_events.c.type, content_job_events.c.created_at)
            .where(content_job_events.c.job_id == job.id)
            .order_by(content_job_events.c.seq)
        ).all()
        assets = runner.assets.list_by_job(connection, job.id)
    if options.json:
        told = [{"seq": row.seq, "type": row.type, "created_at": row.created_at.isoformat()} for row in events]
        print(json.dumps({**_plain(job), "events": told, "assets": [_plain(asset) for asset in assets]}))
        return 0
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if value is not None:
            print(f"{field.name:<20} {_shown(json.dumps(value) if isinstance(value, dict) else value)}")
    print()
    _table(("seq", "event", "at"), ([str(row.seq), row.type, _shown(row.created_at)] for row in events))
    if assets:
        print()
        names = ("position", "original_filename", "content_type", "byte_size", "object_key")
        _table(names, ([_shown(getattr(asset, name)) for name in names] for asset in assets))
    return 0


def _cancel(options: argparse.Namespace) -> int:
    return _change(options, JobStore.cancel)


def _retry(options: argparse.Namespace) -> int:
    return _change(options, JobStore.retry)


def _change(options: argparse.Namespace, change: Any) -> int:
    with migrated(options.app) as runner:
        try:
            with runner.engine.begin() as connection:
                job: Job = change(JobStore(connection), options.job)
        except JobNotFound:
            return _none(options.job)
        except InvalidTransition as error:
            print(f"jobkit: {error}", file=sys.stderr)
            return 1
    asked = job.status is JobStatus.RUNNING and job.cancel_requested_at is not None
    print(f"{job.id}: {job.status}{', asked to stop' if asked else ''}")
    return 0


def _prune(options: argparse.Namespace) -> int:
    with migrated(options.app) as runner:
        store = runner.assets if options.assets else None
        report = prune(runner.engine, older_than=options.older_than, assets=store, dry_run=not options.yes)
    print(f"{report.jobs} jobs, {report.events} events, {report.assets} assets")
    print("deleted" if options.yes else "nothing was changed; --yes deletes them")
    return 0


def _none(job: str) -> int:
    print(f"jobkit: no job {printable(job)}{'' if parse_id(job) else ', which is not an id'}", file=sys.stderr)
    return 1


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as what is in them; the last may be of any length."""
    lines = [[name.upper() for name in names], *rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(names) - 1)]
    for line in lines:
        print("  ".join([*(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip())


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat(" ", "seconds")
    return printable(str(value))


def _plain(row: Any) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    return {name: value if _is_json(value) else str(value) for name, value in values.items()}


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | dict)
