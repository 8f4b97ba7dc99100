"""A server that loads the app, uses it, and then forks its workers (gunicorn --preload): each worker's store works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa

from jobkit import AssetStore
from jobkit.tables import content_jobs
from tests.support.files import intents, objects, rows
from tests.support.invariants import violations

PREAMBLE = """
import contextlib, os, sys, threading, traceback
import sqlalchemy as sa
from sqlalchemy.orm import Session
import jobkit

url, storage = sys.argv[1:]
engine = sa.create_engine(url)
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)
store = jobkit.AssetStore(storage, engine=engine)

def forked(count, worker):
    "The pids of children, each of which does its work and ends."
    children = []
    for number in range(count):
        child = os.fork()
        if not child:
            try:
                worker(number)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children

def codes(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
"""


def run(script: str, *arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", PREAMBLE + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


PRELOADING = """

def keep(company, body):
    stored = store.put_file(company, original_filename="a.txt", content_type="text/plain", body=body)
    with Session(engine) as session, session.begin():
        return store.create(session, company, stored, source_task_id=None)

def read(asset):
    store.verify(asset)
    with store.open(asset) as file:
        return file.read()

def at_once(count, work):
    failed = []
    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            failed.append(repr(error))
    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert not failed and not any(thread.is_alive() for thread in threads), failed

preloaded = keep("master", b"preloaded")
assert read(preloaded) == b"preloaded"
held = store.open(preloaded)                      # open across the fork, in the parent's hands

def worker(number):
    engine.dispose(close=False)                   # what SQLAlchemy asks of a forked child
    assert read(preloaded) == b"preloaded"
    at_once(4, lambda n: keep(f"worker-{number}", f"{number}-{n}".encode()))

children = forked(3, worker)
at_once(4, lambda n: keep("master", f"meanwhile {n}".encode()))
assert held.read() == b"preloaded"
ended = codes(children)
assert read(keep("master", b"afterwards")) == b"afterwards"
print(ended)
"""


@pytest.mark.parametrize("storage_url", ["disk", "s3"], indirect=True)  # memory is each process's own
def test_a_store_that_was_used_before_a_fork_works_in_parent_and_children(database: Any, storage_url: str) -> None:
    ran = run(PRELOADING, database.url, storage_url, options=("-W", "error::ResourceWarning"))
    assert (ran.returncode, ran.stdout) == (0, "[0, 0, 0]\n"), ran.stderr
    engine: sa.Engine = database.engine
    store = AssetStore(storage_url, engine=engine)
    kept = rows(engine)
    for row in kept:
        store.verify(row)
    assert sorted(row.company_id for row in kept) == ["master"] * 6 + [
        f"worker-{n}" for n in range(3) for _ in range(4)
    ]
    assert set(objects(storage_url)) == {row.object_key for row in kept}
    assert intents(engine) == {}


STARTED = """
rendered = []

def note(ctx):
    rendered.append(os.getpid())
    return jobkit.Rendered("a.txt", "text/plain", str(os.getpid()).encode())

runner = jobkit.Runner(engine, store, jobkit.Renderers(default=note), poll_interval=0.05).start()
relay = jobkit.Relay(engine).start()
told, changed = [], threading.Condition()

def hear(company, *, event):
    with changed:
        told.append((os.getpid(), event.type))
        changed.notify_all()

jobkit.signals.content_job_done.connect(hear)
busy = threading.Event()

def create():
    while not busy.is_set():
        with Session(engine) as session, session.begin():
            jobkit.JobStore(session).create("master", job_type="note")
        runner.dispatch(None)

creating = threading.Thread(target=create)
creating.start()

@contextlib.contextmanager
def refused():
    try:
        yield
    except jobkit.ConfigurationError as error:
        assert "fork first" in str(error)
    else:
        raise AssertionError("not refused")

def worker(number):
    assert runner.metrics() == jobkit.RunnerMetrics()
    runner.stop()                                         # was never started here
    relay.stop()
    runner.dispatch(None)
    if engine.dialect.name == "sqlite":                   # what the parent had locked stays locked in the child
        for call in (runner.start, relay.start, runner.run_until_idle, runner.rescue):
            with refused():
                call()
        with refused():
            runner.submit("web", job_type="note")
    elif number % 2:                                        # a web process that renders nothing: the parent will
        runner.submit(f"web-{number}", job_type="note")
    else:                                                 # a worker of its own
        with runner:
            runner.submit(f"worker-{number}", job_type="note")
            with changed:
                assert changed.wait_for(lambda: (os.getpid(), "content_job.done") in told, 60), told

ended = codes(forked(12, worker))
busy.set()
creating.join()
runner.run_until_idle(timeout=60)
runner.stop()
relay.stop()
print(ended, runner.metrics().rejected, len(rendered) > 0)
"""


def test_a_runner_that_was_started_before_a_fork_is_the_parents_and_may_be_started_in_the_child(
    database: Any, tmp_path: Any
) -> None:
    ran = run(STARTED, database.url, str(tmp_path / "assets"))
    assert (ran.returncode, ran.stdout) == (0, f"{[0] * 12} 0 True\n"), ran.stderr[-3000:]
    assert ran.stderr.count("was started before its process was forked") == 12
    engine: sa.Engine = database.engine
    with engine.connect() as connection:
        jobs = connection.execute(
            sa.select(content_jobs.c.company_id, content_jobs.c.status, content_jobs.c.fence)
        ).all()
    assert {(job.status, job.fence) for job in jobs} == {("done", 1)}
    assert len([job for job in jobs if job.company_id != "master"]) == (
        12 if engine.dialect.name == "postgresql" else 0
    )
    assert violations(engine, tmp_path / "assets") == []


POOLED = """
def backends():
    "The servers of five connections that are open at once."
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(engine.connect()) for _ in range(5)]
        return {one.execute(sa.text("SELECT pg_backend_pid()")).scalar_one() for one in opened}

with jobkit.Relay(engine):
    ours = backends()
    def worker(number):
        assert not backends() & ours
    assert codes(forked(1, worker)) == [0]
    assert backends() & ours                              # the child has closed nothing of them
"""


def test_a_child_uses_none_of_its_parents_connections(postgres_database: Any, tmp_path: Any) -> None:
    ran = run(POOLED, postgres_database.url, str(tmp_path / "assets"))
    assert ran.returncode == 0, ran.stderr
