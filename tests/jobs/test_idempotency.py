"""``idempotency_key``: one job for a company, job type and key, whoever asks at the same moment."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import IdempotencyConflict, JobRequest, JobStore
from jobkit.tables import content_jobs
from tests.support.databases import Database
from tests.support.recorder import Recorder
from tests.support.runners import counted, only, statuses, until

Create = Callable[..., jobkit.Job]


def count(engine: sa.Engine) -> tuple[int, int]:
    """How many jobs and events there are."""
    return len(statuses(engine)), counted(engine)["content_job_events"]


@pytest.mark.parametrize("status", jobkit.CONTENT_JOB_STATUSES)
def test_a_repeat_gets_the_same_job_whatever_its_status(status: str, engine: sa.Engine, create: Create) -> None:
    job = create(idempotency_key="k", input={"a": 1})
    if status != "queued":
        with engine.begin() as connection:
            job = JobStore(connection).transition(job.id, status=status)
    before = count(engine)
    assert create(idempotency_key="k", input={"a": 1}, priority=9, source_task_id="other") == job
    assert count(engine) == before


def test_the_same_key_elsewhere_is_another_job(engine: sa.Engine, create: Create) -> None:
    made = [
        create("note", "acme", idempotency_key="k"),
        create("other", "acme", idempotency_key="k"),
        create("note", "else", idempotency_key="k"),
        create("note", "acme", idempotency_key="K"),
        create("note", "acme", idempotency_key="k "),
        create("note", "acme"),
        create("note", "acme"),
    ]
    assert len({job.id for job in made}) == len(made)


@pytest.mark.parametrize(
    ("first", "second"),
    [({"a": 1}, {"a": 2}), ({"a": 1}, {}), ({"a": 1}, {"a": True}), ({"a": 0}, {"a": False}), ({"a": 1}, {"a": 1.0}),
     ({"a": [1, 2]}, {"a": [2, 1]}), ({"a": "1"}, {"a": 1}), ({"a": None}, {})],
)  # fmt: skip
def test_another_input_is_a_conflict_and_writes_nothing(
    first: Any, second: Any, engine: sa.Engine, create: Create
) -> None:
    job = create(idempotency_key="k", input=first)
    for one in (second, first):
        if one is first:
            assert create(idempotency_key="k", input=one).id == job.id
            continue
        with pytest.raises(IdempotencyConflict, match=f"{job.id}.*'k'"):
            create(idempotency_key="k", input=one)
    assert count(engine) == (1, 1)


@pytest.mark.parametrize(
    "input",
    [None, {}, {"b": 1, "a": {"z": 1, "y": [1, 2]}}, {"n": 1e23, "m": -0.0, "k": 1e-7, "big": 10**30, "f": 0.1},
     {"t": (1, 2), 7: "x"}, {"é": "🎈"}],
)  # fmt: skip
def test_the_same_input_is_no_conflict_however_the_database_keeps_it(input: Any, create: Create) -> None:
    job = create(idempotency_key="k", input=input)
    turned = None if input is None else dict(reversed(list(input.items())))
    assert create(idempotency_key="k", input=turned).id == job.id


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("", ValueError),
        (" ", ValueError),
        ("\0", ValueError),
        ("\ud800", ValueError),
        ("x" * 256, ValueError),
        (7, TypeError),
    ],
)
def test_a_key_that_cannot_be_one_is_refused(
    key: Any, error: type[Exception], engine: sa.Engine, create: Create
) -> None:
    with pytest.raises(error, match="idempotency_key"):
        create(idempotency_key=key)
    assert count(engine) == (0, 0)


def test_a_rolled_back_job_leaves_its_key_free(engine: sa.Engine, create: Create) -> None:
    with engine.begin() as connection:
        store = JobStore(connection)
        savepoint = connection.begin_nested()
        gone = store.create("acme", job_type="note", idempotency_key="k", input={"a": 1})
        savepoint.rollback()
        job = store.create("acme", job_type="note", idempotency_key="k", input={"a": 2})
        with pytest.raises(IdempotencyConflict):
            store.create("acme", job_type="note", idempotency_key="k")
        assert store.create("acme", job_type="note", idempotency_key="k", input={"a": 2}).id == job.id != gone.id
    assert count(engine) == (1, 1)


def test_a_conflict_leaves_the_hosts_transaction_usable(engine: sa.Engine, create: Create) -> None:
    create(idempotency_key="k")
    with engine.begin() as connection:
        store = JobStore(connection)
        store.create("acme", job_type="before")
        with pytest.raises(IdempotencyConflict):
            store.create("acme", job_type="note", idempotency_key="k", input={"a": 2})
        store.create("acme", job_type="after")
    assert count(engine) == (3, 3)


def test_twenty_threads_make_one_job(engine: sa.Engine, database: Database) -> None:
    engines = [database.connect() for _ in range(4)]
    for number in range(3):
        made: list[jobkit.Job] = []
        barrier = threading.Barrier(20)

        def work(mine: sa.Engine, key: str, made: list[jobkit.Job], barrier: threading.Barrier) -> None:
            barrier.wait(60)
            with mine.begin() as connection:
                made.append(JobStore(connection).create("acme", job_type="note", idempotency_key=key, input={"a": 1}))

        threads = [threading.Thread(target=work, args=(engines[n % 4], f"k{number}", made, barrier)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(made) == 20
        assert len({job.id for job in made}) == 1
    assert count(engine) == (3, 3)


PROCESS = """
import sys, sqlalchemy as sa, jobkit
engine = sa.create_engine(sys.argv[1])
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)
print("ready", flush=True)
sys.stdin.readline()
for n in range(25):
    with engine.begin() as c:
        job = jobkit.JobStore(c).create("acme", job_type="note", idempotency_key=f"k{n}", input={"n": n})
    print(job.id, flush=True)
"""


def test_processes_make_one_job_of_each_key(engine: sa.Engine) -> None:
    url = engine.url.render_as_string(hide_password=False)
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0].split() for process in processes]
    assert told == [told[0]] * 4
    assert len(set(told[0])) == 25
    assert count(engine) == (25, 25)


@pytest.mark.parametrize("commits", [True, False])
def test_who_comes_second_waits_for_the_first_to_commit_or_roll_back(
    commits: bool, engine: sa.Engine, database: Database
) -> None:
    other, made, begun = database.connect(), [], threading.Event()
    sa.event.listen(other, "begin", lambda _: begun.set())

    def second() -> None:
        with other.begin() as connection:
            made.append(JobStore(connection).create("acme", job_type="note", idempotency_key="k"))

    with engine.connect() as connection:
        first = JobStore(connection).create("acme", job_type="note", idempotency_key="k")
        thread = threading.Thread(target=second)
        thread.start()
        until(lambda: begun.is_set() and (other.dialect.name == "sqlite" or blocked(engine)), "the second's wait")
        assert not made
        connection.commit() if commits else connection.rollback()
    thread.join(60)
    assert (made[0].id == first.id) is commits
    assert count(engine) == (1, 1)


def blocked(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return bool(connection.execute(sa.text(query)).scalar())


def test_a_key_is_free_again_when_its_row_is_gone(engine: sa.Engine, create: Create) -> None:
    job = create(idempotency_key="k")
    with engine.begin() as connection:
        connection.execute(content_jobs.delete())
    assert create(idempotency_key="k").id != job.id


def test_create_many_keeps_the_order_with_and_without_keys(engine: sa.Engine, create: Create) -> None:
    there = create("note", idempotency_key="b", input={"n": "b"})
    requests = [
        JobRequest("note", {"n": 0}),
        JobRequest("note", {"n": "a"}, idempotency_key="a"),
        JobRequest("note", {"n": 1}, priority=4),
        JobRequest("note", {"n": "b"}, idempotency_key="b"),
        JobRequest("note", {"n": "a"}, idempotency_key="a"),
        JobRequest("note", {"n": 2}),
    ]
    with engine.begin() as connection:
        jobs = JobStore(connection).create_many("acme", requests)
    assert [job.input["n"] for job in jobs] == [0, "a", 1, "b", "a", 2]
    assert (jobs[3].id, jobs[4].id, jobs[2].priority) == (there.id, jobs[1].id, 4)
    assert count(engine) == (5, 5)
    with engine.connect() as connection:
        listed = JobStore(connection).list_by_company("acme")
    # Those it made are listed in the order of the requests, keys or not.
    assert [job.input["n"] for job in reversed(listed)] == ["b", 0, "a", 1, 2]
    assert listed[0].created_at == listed[3].created_at


def test_a_conflict_in_create_many_writes_none_of_them(engine: sa.Engine, create: Create) -> None:
    create(idempotency_key="b")
    with engine.begin() as connection, pytest.raises(IdempotencyConflict):
        JobStore(connection).create_many(
            "acme",
            [
                JobRequest("note"),
                JobRequest("note", idempotency_key="a"),
                JobRequest("note", {"x": 1}, idempotency_key="b"),
            ],
        )
    assert count(engine) == (1, 1)


@pytest.mark.parametrize("started", [True, False])
def test_submitting_a_known_key_signals_nothing_more(
    started: bool, engine: sa.Engine, disk: jobkit.AssetStore, recorder: Recorder
) -> None:
    runner = jobkit.Runner(engine, disk, only())
    if started:
        runner.start()
    first = runner.submit("acme", job_type="note", idempotency_key="k")
    if started:
        recorder.wait(lambda types: "done" in types)
    second = runner.submit("acme", job_type="note", idempotency_key="k")
    runner.submit("acme", job_type="note", idempotency_key="last")
    if started:
        recorder.wait(lambda types: types.count("done") == 2)
        runner.stop()
    assert second.id == first.id
    assert recorder.types(first.id) == (["queued", "running", "done"] if started else ["queued"])


def test_submitting_the_key_of_a_job_that_another_process_made_signals_nothing(
    engine: sa.Engine, disk: jobkit.AssetStore, create: Create, recorder: Recorder
) -> None:
    job = create(idempotency_key="k")
    assert jobkit.Runner(engine, disk, only()).submit("acme", job_type="note", idempotency_key="k").id == job.id
    assert recorder.events == []


def test_a_retry_starts_the_job_of_a_key_again(engine: sa.Engine, create: Create) -> None:
    job = create(idempotency_key="k")
    with engine.begin() as connection:
        store = JobStore(connection)
        store.cancel(job.id)
        store.retry(job.id)
        assert store.create("acme", job_type="note", idempotency_key="k").status == "queued"
