"""Whether a worker has left what it should have: the same, whoever worked."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from jobkit.tables import asset_intents, assets, content_job_events, content_jobs
from tests.benchmarks.workers.files import content

EVENTS = ["content_job.queued", "content_job.running", "content_job.done"]


def undone(engine: sa.Engine, folder: Path, count: int) -> list[str]:
    """What is wrong with ``count`` jobs that should be done, their assets, objects, events and intents."""
    with engine.connect() as connection:
        jobs = connection.execute(sa.select(content_jobs)).all()
        kept = {row.job_id: row for row in connection.execute(sa.select(assets))}
        events = defaultdict(list)
        for row in connection.execute(sa.select(content_job_events).order_by(content_job_events.c.seq)):
            events[row.job_id].append(row.type)
        intents = connection.execute(sa.select(sa.func.count()).select_from(asset_intents)).scalar_one()
        rows = connection.execute(sa.select(sa.func.count()).select_from(assets)).scalar_one()
    files = [path for path in folder.rglob("*") if path.is_file() and ".spool" not in path.parts]
    found = [
        f"{number} {what}, not {wanted}"
        for what, number, wanted in (
            ("jobs", len(jobs), count),
            ("assets", rows, count),
            ("objects", len(files), count),
            ("intents", intents, 0),
        )
        if number != wanted
    ]
    for job in jobs:
        asset = kept.get(job.id)
        if (job.status, job.fence, job.attempt, job.event_seq) != ("done", 1, 1, 3) or job.lease_until is not None:
            found.append(f"job {job.id} is {job.status}, {job.fence=}, {job.attempt=}, {job.event_seq=}")
        if events[job.id] != EVENTS:
            found.append(f"job {job.id} has the events {events[job.id]}")
        if asset is None or asset.id != job.result_asset_id or not _right(asset, folder, job.input["n"]):
            found.append(f"job {job.id} has not its file")
    return found


def uncreated(engine: sa.Engine, count: int) -> list[str]:
    """What is wrong with ``count`` jobs that should be queued, and their events."""
    j, e = content_jobs.c, content_job_events.c
    with engine.connect() as connection:
        numbers = sorted(row.input["n"] for row in connection.execute(sa.select(j.input).where(j.status == "queued")))
        told = connection.execute(
            sa.select(e.payload, e.type, e.seq, j.id, j.event_seq).join(content_jobs, j.id == e.job_id)
        ).all()
    found = [] if numbers == list(range(count)) else [f"{len(numbers)} jobs are queued, not {count}"]
    found += [] if len(told) == count else [f"{len(told)} events, not {count}"]
    right = ("content_job.queued", 1, 1)
    found += [
        f"job {row.id} has the wrong event"
        for row in told
        if (row.type, row.seq, row.event_seq) != right or row.payload != {"jobId": str(row.id)}
    ]
    return found


def _right(asset: Any, folder: Path, number: int) -> bool:
    body = content(number)
    told = (asset.byte_size, asset.sha256, asset.content_type, asset.original_filename)
    return (folder / asset.object_key).read_bytes() == body and told == (
        len(body),
        hashlib.sha256(body).hexdigest(),
        "text/plain",
        "note.txt",
    )
