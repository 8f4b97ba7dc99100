"""The steps on rows: claim, record intents, finish, release; each in the caller's transaction."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit.assets import intents
from jobkit.assets.intents import Intent
from jobkit.base.clock import utcnow
from jobkit.jobs import claims
from jobkit.jobs.claims import Claim, Completion
from jobkit.tables import content_jobs
from jobkit.types import StoredObject
from tests.support.databases import Database
from tests.support.runners import counted, seen, statuses

Create = Callable[..., jobkit.Job]


def claim(engine: sa.Engine, limit: int = 1, worker: str = "w") -> list[Claim]:
    with engine.begin() as connection:
        return claims.claim(connection, limit=limit, worker_id=worker, lease=60.0, now=utcnow())[0]


def finish(engine: sa.Engine, *completions: Completion) -> list[Any]:
    with engine.begin() as connection:
        return claims.finish(connection, completions, now=utcnow()).events


def stored(claim: Claim, number: int = 0) -> StoredObject:
    key = f"{claim.company_id}/generated/{claim.job_id}-{claim.fence}-{number}.txt"
    return StoredObject("local_disk", key, "text/plain", 5, "0" * 64, f"{number}.txt")


def record(engine: sa.Engine, files: Sequence[StoredObject]) -> None:
    with engine.begin() as connection:
        intents.record_intents(connection, [Intent("acme", file.provider, file.object_key) for file in files])


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_a_claim_takes_the_oldest_up_to_the_limit_and_no_more(limit: int, engine: sa.Engine, create: Create) -> None:
    jobs = [create() for _ in range(5)]
    taken = claim(engine, limit)
    assert {one.job_id for one in taken} == {job.id for job in jobs[:limit]}
    assert statuses(engine) == ["running"] * min(limit, 5) + ["queued"] * max(0, 5 - limit)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_claim_takes_the_more_urgent_first(limit: int, engine: sa.Engine, create: Create) -> None:
    usual, urgent, later, too = (create(priority=priority) for priority in (0, 5, -1, 5))
    order = [urgent.id, too.id, usual.id, later.id]
    for at in range(0, 4, limit):
        assert {one.job_id for one in claim(engine, limit)} == set(order[at : at + limit])


def test_a_claim_gives_what_a_renderer_needs_and_marks_the_row(engine: sa.Engine, create: Create) -> None:
    job = create("note", "c-1", input={"a": [1, "é", None]}, source_task_id="t")
    [taken] = claim(engine, worker="me")
    assert taken == Claim(job.id, "c-1", "note", {"a": [1, "é", None]}, "t", 1, 1)
    row = seen(engine, job)
    assert (row.status, row.fence, row.attempt, row.worker_id, row.event_seq) == ("running", 1, 1, "me", 2)
    assert row.lease_until > row.started_at
    assert claim(engine) == []


def test_a_rolled_back_claim_took_nothing(engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.connect() as connection:
        assert claims.claim(connection, limit=1, worker_id="w", lease=60.0, now=utcnow())[0]
        connection.rollback()
    assert (seen(engine, job).status, seen(engine, job).fence) == ("queued", 0)
    assert counted(engine)["content_job_events"] == 1


def test_many_claimers_take_every_job_once(engine: sa.Engine, database: Database, create: Create) -> None:
    jobs = [create() for _ in range(60)]
    engines = [database.connect() for _ in range(4)]
    taken: list[Claim] = []
    barrier = threading.Barrier(8)

    def work(mine: sa.Engine) -> None:
        barrier.wait(60)
        while found := claim(mine, 3):
            taken.extend(found)

    threads = [threading.Thread(target=work, args=(engines[number % 4],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Counter(one.job_id for one in taken) == {job.id: 1 for job in jobs}
    with engine.connect() as connection:
        assert set(connection.execute(sa.select(content_jobs.c.fence)).scalars()) == {1}


def test_a_claim_passes_over_a_row_that_another_transaction_holds(
    postgres_database: Database,
) -> None:
    engine = postgres_database.engine
    with engine.begin() as connection:
        store = jobkit.JobStore(connection)
        held, free = (store.create("acme", job_type="note") for _ in range(2))
    with engine.connect() as connection:
        assert claims.claim(connection, limit=1, worker_id="w", lease=60.0, now=utcnow())[0][0].job_id == held.id
        options = {"connect_args": {"options": "-c lock_timeout=10s"}}
        assert [one.job_id for one in claim(postgres_database.connect(**options), 5)] == [free.id]
        connection.rollback()


def test_one_finish_ends_those_whose_claim_holds_and_keeps_nothing_of_the_others(
    engine: sa.Engine, create: Create
) -> None:
    jobs = [create() for _ in range(4)]
    taken = {one.job_id: one for one in claim(engine, 4)}
    done, lost, failed, gone = (taken[job.id] for job in jobs)
    files = {one.job_id: (stored(one, 0), stored(one, 1)) for one in (done, lost, gone)}
    record(engine, [file for pair in files.values() for file in pair])
    with engine.begin() as connection:
        jobkit.JobStore(connection).transition(lost.job_id, status="queued")
        connection.execute(content_jobs.delete().where(content_jobs.c.id == gone.job_id))
    events = finish(
        engine,
        Completion(done, files=files[done.job_id]),
        Completion(lost, files=files[lost.job_id]),
        claims.failed(failed, "no"),
        Completion(gone, files=files[gone.job_id]),
    )
    assert {(event.job_id, event.type, event.seq) for event in events} == {
        (done.job_id, "content_job.done", 3),
        (failed.job_id, "content_job.failed", 3),
    }
    assert statuses(engine) == ["done", "queued", "failed"]
    assert counted(engine) == {"assets": 2, "asset_intents": 4, "content_job_events": 4 + 4 + 1 + 2}
    row = seen(engine, jobs[0])
    with engine.connect() as connection:
        kept = connection.execute(sa.select(jobkit.tables.assets).order_by(jobkit.tables.assets.c.position)).all()
    assert row.result_asset_id == kept[0].id
    assert [(asset.position, asset.original_filename) for asset in kept] == [(0, "0.txt"), (1, "1.txt")]
    assert (row.lease_until, row.worker_id, row.error_message) == (None, None, None)
    assert next(event for event in events if event.job_id == done.job_id).payload["assetId"] == str(kept[0].id)


def test_a_finish_that_is_repeated_after_an_unknown_outcome_changes_nothing(engine: sa.Engine, create: Create) -> None:
    create()
    [one] = claim(engine)
    completion = Completion(one, files=(stored(one),))
    record(engine, completion.files)
    record(engine, completion.files)
    assert len(finish(engine, completion)) == 1
    before = counted(engine)
    assert finish(engine, completion) == []
    assert counted(engine) == before == {"assets": 1, "asset_intents": 0, "content_job_events": 3}


def test_a_finish_whose_file_was_swept_says_so_and_is_rolled_back(engine: sa.Engine, create: Create) -> None:
    job = create()
    [one] = claim(engine)
    with pytest.raises(jobkit.AssetNotFound, match="1 of 2 stored files"):
        finish(engine, Completion(one, files=_with_one_recorded(engine, one)))
    assert seen(engine, job).status == "running"
    assert counted(engine) == {"assets": 0, "asset_intents": 1, "content_job_events": 2}


def _with_one_recorded(engine: sa.Engine, one: Claim) -> tuple[StoredObject, ...]:
    files = (stored(one, 0), stored(one, 1))
    record(engine, files[:1])
    return files


@pytest.mark.parametrize("status", ["failed", "cancelled", "queued", "done"])
def test_a_release_gives_back_only_what_still_is_claimed(status: str, engine: sa.Engine, create: Create) -> None:
    jobs = [create(), create()]
    taken = claim(engine, 2)
    with engine.begin() as connection:
        jobkit.JobStore(connection).transition(jobs[0].id, status=status)
    with engine.begin() as connection:
        events = claims.release(connection, taken, now=utcnow())
    assert [(event.job_id, event.type, event.seq) for event in events] == [(jobs[1].id, "content_job.queued", 3)]
    assert statuses(engine) == [status, "queued"]
    assert seen(engine, jobs[1]).attempt == 0
