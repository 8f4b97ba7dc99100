"""The checks: every promise, judged from outside, by the rows, the objects and what the subscribers wrote down."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec
import sqlalchemy as sa

from jobkit.tables import asset_intents, assets, content_job_events, content_jobs
from jobkit.testing.chaos.evidence import Evidence
from jobkit.testing.chaos.plan import FILES, POINTS, Plan
from jobkit.testing.chaos.verdict import Verdict, counted
from jobkit.testing.chaos.workers.workload import ATTEMPTS, CLAIM, PLANNED, PREFIX, content

TERMINAL = ("done", "failed", "cancelled")
# What may follow each event of one job.
_ENDS = {"done", "failed", "cancelled", "retrying", "queued", "progress"}
FOLLOWS = {
    "": {"queued"},
    "queued": {"running", "cancelled"},
    "retrying": {"running", "cancelled"},
    "running": _ENDS,
    "progress": _ENDS,
    "failed": {"queued"},
    "cancelled": {"queued"},
    "done": set[str](),
}
# With which words a job may fail that does not fail on purpose.
UNLUCKY = {
    "worker lost too often": re.compile(r"its worker was lost \d+ times in a row"),
    "storage failed": re.compile(r"fault \d+ of seed \d+|the storage kept \d+ of \d+ bytes"),
}


class Objects:
    """What is in the storage, found by listing it, which jobkit never does."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        self._root = root.rstrip("/")

    def keys(self) -> set[str]:
        """Every object; of a folder also unfinished files."""
        self._filesystem.invalidate_cache()
        found = self._filesystem.find(self._root)
        return {path[len(self._root) + 1 :] for path in found if not path.endswith(".lock")}

    def read(self, key: str) -> bytes | None:
        """The bytes of an object, None when there is none."""
        try:
            found: bytes = self._filesystem.cat_file(f"{self._root}/{key}")
        except FileNotFoundError:
            return None
        return found


def _by_job(rows: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        found[str(row.job_id)].append(row)
    return found


def judge(
    engine: sa.Engine,
    objects: Objects,
    evidence: Evidence,
    plan: Plan,
    *,
    logs: Mapping[str, list[dict[str, Any]]],
    seconds: float,
    restartable: bool,
) -> Verdict:
    """The verdict on a run that is over."""
    with engine.connect() as connection:
        jobs = {str(row.id): row for row in connection.execute(sa.select(content_jobs))}
        rows = connection.execute(sa.select(assets)).all()
        events = connection.execute(sa.select(content_job_events).order_by(content_job_events.c.seq)).all()
        intents = connection.execute(sa.select(asset_intents)).all()
        version = ".".join(str(part) for part in (connection.dialect.server_version_info or ())[:2])
    by_job, files = _by_job(events), _by_job(rows)
    unlucky: Counter[str] = Counter()
    found = list(evidence.violations)
    found += _creations(evidence, jobs, by_job, len(plan.orders))
    for job_id, job in jobs.items():
        found += _history(job, by_job[job_id], evidence)
        found += _outcome(job, evidence, unlucky)
        found += _result(job, files[job_id])
    found += [
        f"I5: asset {row.id} is of job {row.job_id}, which is not there" for row in rows if str(row.job_id) not in jobs
    ]
    found += _bytes(rows, jobs, objects)
    live = {row.object_key for row in rows}
    keys = objects.keys()
    found += [f"I7: object {key} has no row" for key in sorted(keys - live)]
    found += [f"I7: the record of {intent.object_key} is still {intent.state}" for intent in intents]
    for name, log in logs.items():
        found += _heard(name, log, events)
    statuses = Counter(job.status for job in jobs.values())
    return Verdict(
        seed=plan.seed,
        database=f"{engine.dialect.name} {version}".strip(),
        storage=type(objects._filesystem).__name__,
        seconds=round(seconds, 1),
        jobs={"created": len(jobs), **{status: statuses[status] for status in TERMINAL}}
        | {"rolled back": len(evidence.rolled_back), "asked to retry": len(evidence.asked["retry"])},
        unlucky=dict(sorted(unlucky.items())),
        faults=dict(sorted(evidence.done_to.items())) | {"storage faults": evidence.faults.total()},
        points={point: evidence.struck[point] for point in POINTS},
        zombie_writes_rejected=evidence.rejected.total(),
        events=len(events),
        events_heard={name: len(log) for name, log in logs.items()},
        objects=len(live),
        object_bytes=sum(row.byte_size for row in rows),
        swept=dict(sorted(evidence.janitor.items())),
        violations=tuple(found),
        lacks=tuple(
            _lacks(evidence, plan, len(jobs), postgresql=engine.dialect.name == "postgresql", restartable=restartable)
        ),
        **counted(found),
    )


def _creations(
    evidence: Evidence, jobs: Mapping[str, Any], by_job: Mapping[str, list[Any]], orders: int
) -> Iterator[str]:
    yield from (f"I1: job {job_id} was committed, and is gone" for job_id in sorted(evidence.acked - jobs.keys()))
    strangers = jobs.keys() - evidence.tried
    yield from (f"I1: nobody created job {job_id}" for job_id in sorted(strangers))
    back = evidence.rolled_back - evidence.acked
    yield from (f"I8: job {job_id} was rolled back, and is there" for job_id in sorted(back & jobs.keys()))
    told = by_job.keys() - jobs.keys()
    yield from (f"I8: there are events of job {job_id}, which is not there" for job_id in sorted(told))
    if evidence.created != orders:
        yield f"the creator carried out {evidence.created} of {orders} orders"


def _history(job: Any, events: list[Any], evidence: Evidence) -> Iterator[str]:
    types = [event.type.removeprefix("content_job.") for event in events]
    told = f"job {job.id}, which is {job.status}: {' '.join(types)}"
    if [event.seq for event in events] != list(range(1, job.event_seq + 1)):
        yield f"I8: {told}: the row says {job.event_seq} events, the log has {[event.seq for event in events]}"
    if types[-1:] != [job.status]:
        yield f"I8: {told}: its last event is not its status"
    if job.status not in TERMINAL:
        yield f"I1: {told}: it did not end"
    for before, after in zip(["", *types], types, strict=False):
        by_hand = before in ("failed", "cancelled") and str(job.id) not in evidence.asked["retry"]
        if after not in FOLLOWS[before] or by_hand:
            yield f"I2: {told}: {after} after {before or 'nothing'}"
    reached = 0.0
    for event in events:
        if event.type == "content_job.queued":
            reached = 0.0
        if event.type == "content_job.progress":
            if event.payload["progress"] < reached:
                yield f"I2: {told}: {event.payload['progress']} after {reached}"
            reached = event.payload["progress"]
    if types.count("running") != job.fence:
        yield f"I3: {told}: its fence is {job.fence}"
    if any(event.company_id != job.company_id for event in events):
        yield f"I14: {told}: an event is another company's"


def _outcome(job: Any, evidence: Evidence, unlucky: Counter[str]) -> Iterator[str]:
    kind = job.job_type.removeprefix(PREFIX)
    if job.attempt > ATTEMPTS[kind]:
        yield f"I4: job {job.id} ({kind}) is in its attempt {job.attempt}"
    if job.status == "cancelled" and str(job.id) not in evidence.asked["cancel"]:
        yield f"I2: job {job.id} was cancelled, and nobody asked for it"
    if job.status == "done" and not FILES[kind]:
        yield f"I2: job {job.id} ({kind}) is done, and always fails"
    said = f"{job.error_message} {job.error_detail or ''}"
    if job.status == "failed" and (FILES[kind] or PLANNED not in said):
        causes = [cause for cause, pattern in UNLUCKY.items() if pattern.search(said)]
        unlucky.update(causes)
        if not causes:
            yield f"I11: job {job.id} ({kind}) failed: {said}"


def _result(job: Any, files: list[Any]) -> Iterator[str]:
    kind = job.job_type.removeprefix(PREFIX)
    wanted = FILES[kind] if job.status == "done" else 0
    if sorted(file.position for file in files) != list(range(wanted)):
        yield f"I5: job {job.id} ({kind}) is {job.status} and has {len(files)} asset rows"
        return
    first = next((file.id for file in files if file.position == 0), None)
    if job.result_asset_id != first:
        yield f"I5: the result of job {job.id} is {job.result_asset_id}, its first file {first}"
    claims = {found[1] for file in files if (found := CLAIM.search(file.original_filename))}
    if claims - {str(job.fence)}:
        yield f"I3: job {job.id} has files of claim {', '.join(claims)}, its fence is {job.fence}"
    if any(file.company_id != job.company_id for file in files):
        yield f"I14: a file of job {job.id} is another company's"


def _bytes(rows: Sequence[Any], jobs: Mapping[str, Any], objects: Objects) -> Iterator[str]:
    for row in rows:
        body = objects.read(row.object_key)
        if body is None:
            yield f"I6: asset {row.id} has no object {row.object_key}"
            continue
        job = jobs.get(str(row.job_id))
        if len(body) != row.byte_size or hashlib.sha256(body).hexdigest() != row.sha256:
            yield f"I6: object {row.object_key} is not what its row says"
        elif job is not None and body != content(job.id, row.position, job.input["size"]):
            yield f"I6: object {row.object_key} is not what job {job.id} renders"
        if not row.object_key.startswith(f"{row.company_id}/"):
            yield f"I14: object {row.object_key} is not in the folder of {row.company_id}"


def _heard(name: str, log: list[dict[str, Any]], events: Sequence[Any]) -> Iterator[str]:
    committed = {event.id: event for event in events}
    last: dict[str, int] = defaultdict(int)
    lives: set[tuple[int, int]] = set()
    heard: set[int] = set()
    for line in log:
        event = committed.get(line["id"])
        told = f"{name} heard {line['type']} of job {line['job']} as {line['seq']}"
        if event is None or (str(event.job_id), event.seq, event.type, event.company_id) != (
            *(line["job"], line["seq"], line["type"], line["company"]),
        ):
            yield f"I9: {told}, which was not committed"
        if (line["life"], line["id"]) in lives:
            yield f"I9: {told} twice in one life"
        if line["id"] not in heard and line["seq"] != last[line["job"]] + 1:
            yield f"I10: {told} after {last[line['job']]}"
        lives.add((line["life"], line["id"]))
        heard.add(line["id"])
        last[line["job"]] = max(last[line["job"]], line["seq"])
    yield from (
        f"I9: {name} never heard {event.type} of job {event.job_id}" for event in events if event.id not in heard
    )


def _lacks(evidence: Evidence, plan: Plan, jobs: int, *, postgresql: bool, restartable: bool) -> Iterator[str]:
    size, done = plan.size, evidence.done_to
    if jobs < size.jobs:
        yield f"{jobs} of {size.jobs} jobs were created"
    planned = Counter(life.point for life in plan.lives if life.point)
    for point in POINTS:
        if planned[point] and not evidence.struck[point]:
            yield f"nobody was killed or frozen at {point}, which was planned {planned[point]} times"
    if done["frozen"] < size.zombies:
        yield f"{done['frozen']} of {size.zombies} zombies were frozen"
    if evidence.rejected.total() < size.zombies:
        yield f"{evidence.rejected.total()} zombie writes were rejected, of {size.zombies} at least"
    wanted = {"killed": size.kills, "stopped": size.stops, "subscriber killed": size.subscriber_kills}
    wanted |= {"janitor killed": size.janitor_kills}
    if postgresql:
        wanted |= {"database cut": size.cuts} | ({"database restarted": size.restarts} if restartable else {})
    for what, least in wanted.items():
        if done[what] < least:
            yield f"{done[what]} of {least} times: {what}"
    if evidence.faults.total() < size.storage_faults:
        yield f"{evidence.faults.total()} of {size.storage_faults} storage faults"
    if size.kills and not evidence.janitor["swept"] + evidence.janitor["swept at the end"]:
        yield "there was nothing to sweep"
