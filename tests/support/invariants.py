"""What must hold of the rows and objects at any moment, also right after a process was killed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from jobkit.tables import asset_intents, assets, content_job_events, content_jobs

TERMINAL = {"done", "failed", "cancelled"}


def violations(engine: sa.Engine, folder: Path, expected: Mapping[str, bytes] | None = None) -> list[str]:
    """Every broken invariant, in words; an empty list when all hold.

    ``expected``: what an object has to contain, by the end of its key. An object may exist only whole.
    """
    with engine.connect() as connection:
        jobs = connection.execute(sa.select(content_jobs)).all()
        rows = connection.execute(sa.select(assets)).all()
        events = connection.execute(sa.select(content_job_events).order_by(content_job_events.c.seq)).all()
        intents = {row.object_key: row for row in connection.execute(sa.select(asset_intents))}
    objects = {str(path.relative_to(folder)): path for path in _files(folder)}
    found: list[str] = []
    for job in jobs:
        found += _job(job, [e for e in events if e.job_id == job.id], [a for a in rows if a.job_id == job.id])
    for row in rows:
        found += _asset(row, objects.get(row.object_key), row.object_key in intents)
    live = {row.object_key for row in rows}
    found += [
        f"object {key} has neither a row nor an intent" for key in objects if key not in live and key not in intents
    ]
    for ending, content in (expected or {}).items():
        found += [
            f"object {key} is not whole"
            for key, p in objects.items()
            if key.endswith(ending) and p.read_bytes() != content
        ]
    return found


def spooled(folder: Path) -> list[Path]:
    """Files that are being made, or were when their process died."""
    return [path for path in folder.rglob(".spool/**/*") if path.is_file()]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and ".spool" not in path.relative_to(folder).parts]


def _job(job: Any, events: list[Any], files: list[Any]) -> list[str]:
    found = []
    types = [event.type.removeprefix("content_job.") for event in events]
    ends = [kind for kind in types if kind in TERMINAL]
    if [event.seq for event in events] != list(range(1, job.event_seq + 1)):
        found.append(f"I8: job {job.id} says {job.event_seq} events, the log has {[e.seq for e in events]}")
    # A job in the queue was put there, or put back to be tried again.
    if types[-1:] not in ([job.status], ["retrying"] if job.status == "queued" else []):
        found.append(f"I8: job {job.id} is {job.status}, its last event is {types[-1:]}")
    if len(ends) > (job.status in TERMINAL):
        found.append(f"I2: job {job.id} ended more than once: {types}")
    if types.count("running") != job.fence:
        found.append(f"I3: job {job.id} was claimed {types.count('running')} times, its fence is {job.fence}")
    if (job.status == "done") != bool(files):
        found.append(f"I5: job {job.id} is {job.status} and has {len(files)} asset rows")
    if job.status == "done" and job.result_asset_id != min(files, key=lambda file: file.position, default=job).id:
        found.append(f"I5: job {job.id} has a result that is not its first asset")
    if job.status != "done" and job.result_asset_id is not None:
        found.append(f"I5: job {job.id} is {job.status} and has a result")
    if (job.status == "running") != (job.lease_until is not None):
        found.append(f"job {job.id} is {job.status} and its lease ends {job.lease_until}")
    return found


def _asset(row: Any, path: Path | None, intended: bool) -> list[str]:
    if path is None:
        return [f"I6: asset {row.id} has no object"]
    content = path.read_bytes()
    found = []
    if len(content) != row.byte_size or hashlib.sha256(content).hexdigest() != row.sha256:
        found.append(f"I6: the object of asset {row.id} is not what its row says")
    if intended:
        found.append(f"I7: asset {row.id} is live and a sweep would take its object")
    return found
