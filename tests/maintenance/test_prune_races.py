"""Prune beside everything else: whoever works on a job meanwhile, it is whole or gone, and nobody waits long."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import AssetStore, InvalidTransition, Job, JobNotFound, JobStore, Runner, prune
from jobkit.base.clock import utcnow
from jobkit.base.ids import new_id
from jobkit.db.dialects import statements_for
from jobkit.maintenance import prune as pruning
from jobkit.tables import assets, content_job_events, content_jobs
from tests.benchmarks.many_jobs import record
from tests.maintenance.test_prune import DAY, Create, ended, left, sums
from tests.support.databases import Database
from tests.support.files import intents, objects
from tests.support.plans import explained
from tests.support.runners import note, only, seen
from tests.support.sweeping import collect

DEADLINE = 60.0


@contextmanager
def in_thread(act: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield thread
    thread.join(DEADLINE)
    assert not thread.is_alive()


def after_looking(monkeypatch: pytest.MonkeyPatch, engine: sa.Engine, act: Callable[[], object]) -> None:
    """Let something happen between a prune's look at the table and what it deletes."""
    kind = type(statements_for(engine))
    look = kind.ended_before

    def ended_before(*arguments: Any, **options: Any) -> tuple[list[UUID], UUID | None]:
        found: tuple[list[UUID], UUID | None] = look(*arguments, **options)
        if found[0]:
            act()
        return found

    monkeypatch.setattr(kind, "ended_before", ended_before)


def test_a_job_that_a_host_takes_up_again_meanwhile_stays_whole(database: Database, create: Create) -> None:
    engine, reports = database.engine, []
    jobs = [create() for _ in range(3)]
    for job in jobs:
        ended(engine, job)
    mine = database.connect()
    with Session(engine) as session:
        JobStore(session).retry(jobs[1].id)
        with in_thread(lambda: reports.append(prune(mine, older_than=DAY, dry_run=False))) as thread:
            if engine.dialect.name == "postgresql":
                thread.join(DEADLINE)  # it does not wait for the host
                assert reports
            session.commit()
    assert [sums(report) for report in reports] == [(2, 6, 0)]
    assert left(engine) == ({jobs[1].id}, {jobs[1].id})
    again = seen(engine, jobs[1])
    assert (again.status, again.event_seq) == ("queued", 4)


def test_what_happens_between_the_look_and_the_deletion_is_seen(
    engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    retried, changed, young, untouched = jobs = [create() for _ in range(4)]
    for job in jobs:
        ended(engine, job)

    def meanwhile() -> None:
        with engine.begin() as connection:
            store = JobStore(connection)
            store.retry(retried.id)
            store.transition(changed.id, expect="failed", status="cancelled")
            store.transition(young.id, finished_at=utcnow())

    after_looking(monkeypatch, engine, meanwhile)
    assert sums(prune(engine, older_than=DAY, dry_run=False)) == (2, 4 + 3, 0)
    assert left(engine) == ({retried.id, young.id}, {retried.id, young.id})
    assert {changed.id, untouched.id}.isdisjoint(left(engine)[0])


def test_prune_does_not_wait_for_an_asset_that_a_host_is_changing_and_leaves_its_job_whole(
    postgres_database: Database, disk_of: Callable[[sa.Engine], AssetStore], create_in: Callable[[sa.Engine], Job]
) -> None:
    engine = postgres_database.engine
    store = disk_of(engine)
    first, second = (create_in(engine) for _ in range(2))
    Runner(engine, store, only(note)).run_until_idle(timeout=DEADLINE)
    with Session(engine) as session:
        (asset,) = store.list_by_job(session, first.id)
        session.execute(assets.update().where(assets.c.id == asset.id).values(source_task_id="mine"))
        assert sums(prune(engine, older_than=0, assets=store, dry_run=False)) == (1, 3, 1)
        assert left(engine) == ({first.id}, {first.id})
        # The host goes on with the job: were its row locked, each would wait for the other.
        JobStore(session).transition(first.id, source_task_id="mine")
        session.commit()
    assert prune(engine, older_than=0, assets=store, dry_run=False).sample == (first.id,)
    assert second.id not in left(engine)[0]


@pytest.fixture
def disk_of(tmp_path: Path) -> Callable[[sa.Engine], AssetStore]:
    return lambda engine: AssetStore(tmp_path / "assets", engine=engine)


@pytest.fixture
def create_in() -> Callable[[sa.Engine], Job]:
    def create(engine: sa.Engine) -> Job:
        with engine.begin() as connection:
            return JobStore(connection).create("acme", job_type="note")

    return create


@pytest.mark.parametrize("column", ["content_jobs", "assets"])
def test_jobs_that_rows_of_the_host_refer_to_stay_whole_and_the_others_go(
    column: str, database: Database, disk: AssetStore, create: Create, caplog: pytest.LogCaptureFixture
) -> None:
    engine = database.engine
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", lambda driver, _: driver.execute("PRAGMA foreign_keys = ON"))
        engine.dispose()
    jobs = [create() for _ in range(9)]
    Runner(engine, disk, only(note)).run_until_idle(timeout=DEADLINE)
    kept = {jobs[2].id, jobs[7].id}
    ours = {"content_jobs": content_jobs, "assets": assets}[column]
    host = sa.Table("host", sa.MetaData(), sa.Column("ours", sa.Uuid, sa.ForeignKey(ours.c.id)))
    which = content_jobs.c.id if column == "content_jobs" else assets.c.job_id
    with engine.begin() as connection:
        host.create(connection)
        connection.execute(host.insert().from_select(["ours"], sa.select(ours.c.id).where(which.in_(kept))))
    with caplog.at_level(logging.WARNING, "jobkit"):
        report = prune(engine, older_than=0, assets=disk, dry_run=False)
    assert (*sums(report), report.refused) == (7, 21, 7, 2)
    assert left(engine) == (kept, kept)
    with engine.connect() as connection:
        assert set(connection.execute(sa.select(assets.c.job_id)).scalars()) == kept
    assert len(caplog.records) == 1
    assert str(jobs[2].id) in caplog.text


def test_a_batch_that_fails_at_any_statement_leaves_its_jobs_whole(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    create()
    Runner(engine, disk, only(note)).run_until_idle(timeout=DEADLINE)
    before, statement = (*left(engine), set()), 0
    gone = (set(), set(), {"tombstone"})

    def fail(*_: object) -> None:
        nonlocal run
        run += 1
        if run == statement:
            raise ZeroDivisionError

    sa.event.listen(engine, "before_cursor_execute", fail)
    found: Any = before
    while found == before:
        statement, run = statement + 1, 0
        with pytest.raises(ZeroDivisionError):
            prune(engine, older_than=0, assets=disk, dry_run=False)
        run = statement  # fail no more
        found = (*left(engine), set(intents(engine).values()))
    assert found == gone
    assert statement > 8  # the first ones only look at the tables


@pytest.mark.parametrize("isolation", ["default", "SERIALIZABLE"])
def test_prunes_at_once_delete_every_job_once(
    isolation: str, database: Database, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "BATCH", 5)
    engine, reports = database.engine, []
    for _ in range(60):
        ended(engine, create(), "cancelled")
    options = {} if isolation == "default" else {"isolation_level": isolation}
    barrier = threading.Barrier(4)

    def work(mine: sa.Engine) -> None:
        barrier.wait(DEADLINE)
        reports.append(prune(mine, older_than=DAY, dry_run=False))

    threads = [threading.Thread(target=work, args=(database.connect(**options),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert len(reports) == 4
    assert (sum(report.jobs for report in reports), sum(report.events for report in reports)) == (60, 120)
    assert left(engine) == (set(), set())


def test_others_write_between_two_batches_on_sqlite(
    sqlite_database: Database, create_in: Callable[[sa.Engine], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pauses = sqlite_database.engine, []
    impatient = sqlite_database.connect(connect_args={"timeout": 0})
    for _ in range(9):
        ended(engine, create_in(engine))
    monkeypatch.setattr(pruning, "BATCH", 3)

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        create_in(impatient)

    monkeypatch.setattr(pruning.time, "sleep", pause)
    assert prune(engine, older_than=DAY, dry_run=False).jobs == 9
    assert len(pauses) == 3
    assert all(seconds > 0 for seconds in pauses)


@pytest.mark.parametrize("seed", range(3))
def test_pruning_all_the_time_beside_a_runner_and_hosts_leaves_each_job_whole_or_gone(
    seed: int, database: Database, disk: AssetStore, tmp_path: Path
) -> None:
    engine, chance = database.engine, random.Random(seed)
    over, failures, gone = threading.Event(), [], []

    def guarded(act: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                act()
        except BaseException as error:
            failures.append(error)

    def pruning_all_the_time(mine: sa.Engine) -> Callable[[], None]:
        store = AssetStore(tmp_path / "assets", engine=mine)

        def act() -> None:
            gone.append(prune(mine, older_than=0, assets=store, dry_run=False))

        return act

    def host(mine: sa.Engine) -> Callable[[], None]:
        def act() -> None:
            with mine.connect() as connection:
                known = connection.execute(sa.select(content_jobs.c.id).limit(20)).scalars().all()
            with Session(mine) as session, session.begin():
                jobs = JobStore(session)
                job_id = chance.choice([*known, new_id()])
                with suppress(JobNotFound, InvalidTransition):
                    chance.choice([jobs.retry, jobs.cancel])(job_id)
                if chance.random() < 0.3:
                    session.rollback()

        return act

    runner = Runner(engine, disk, only(note), concurrency=4, poll_interval=0.05)
    workers = [pruning_all_the_time(database.connect()) for _ in range(2)] + [host(database.connect())]
    threads = [threading.Thread(target=guarded, args=(act,), daemon=True) for act in workers]
    with runner:
        for thread in threads:
            thread.start()
        for number in range(60):
            with Session(engine) as session, session.begin():
                JobStore(session).create("acme", job_type="note", idempotency_key=str(number % 7))
        runner.run_until_idle(timeout=DEADLINE)
        over.set()
        for thread in threads:
            thread.join(DEADLINE)
        runner.run_until_idle(timeout=DEADLINE)
    assert failures == []
    assert sum(report.jobs for report in gone) > 0
    assert_whole(engine)
    collect(disk, timedelta(0))
    with engine.connect() as connection:
        kept = set(connection.execute(sa.select(assets.c.object_key)).scalars())
    assert set(objects((tmp_path / "assets").as_uri())) == kept


def assert_whole(engine: sa.Engine) -> None:
    """Each job that is there has its events 1, 2, 3 … and, when it is done, its asset; nothing else is there."""
    e, a = content_job_events.c, assets.c
    with engine.connect() as connection:
        jobs = {row.id: row for row in connection.execute(sa.select(content_jobs))}
        events = connection.execute(sa.select(e.job_id, e.seq).where(e.seq > 0).order_by(e.job_id, e.seq)).all()
        files = set(connection.execute(sa.select(a.id)).scalars())
        owners = set(connection.execute(sa.select(a.job_id)).scalars())
    assert [(row.job_id, row.seq) for row in events] == [
        (id, seq) for id, job in sorted(jobs.items()) for seq in range(1, job.event_seq + 1)
    ]
    assert owners <= jobs.keys()
    assert {job.result_asset_id for job in jobs.values() if job.status == "done"} <= files


def test_what_a_look_and_a_deletion_read_is_bounded_by_keys(engine: sa.Engine) -> None:
    record(engine, 6_000)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE"))
    statements, before = statements_for(engine), utcnow() - DAY * 30
    with explained(engine) as found, engine.begin() as connection:
        jobs, last = statements.ended_before(connection, before=before, after=UUID(int=0), limit=100)
        assert (len(jobs), last) == (50, jobs[-1])
        assert statements.count_related(connection, jobs[:25], provider="local_disk")[1:] == (75, 25)
        assert statements.prune(connection, jobs[:25], before=before, provider="local_disk")[1:] == (75, 25)
    assert [path for path in found if path.endswith(": all")] == []
    assert {path.partition(": index ")[0] for path in found} >= {"content_jobs", "content_job_events", "assets"}
