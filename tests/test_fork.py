"""A server that loads the app, uses it, and then forks its workers (gunicorn --preload): each worker's store works."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy as sa

from jobkit import AssetStore
from tests.support.files import intents, objects, rows

PRELOADING = """
import os, sys, threading
import sqlalchemy as sa
from sqlalchemy.orm import Session
import jobkit

url, storage = sys.argv[1:]
engine = sa.create_engine(url)
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)
store = jobkit.AssetStore(storage, engine=engine)

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
    [thread.join(40) for thread in threads]
    assert not failed and not any(thread.is_alive() for thread in threads), failed

preloaded = keep("master", b"preloaded")
assert read(preloaded) == b"preloaded"
held = store.open(preloaded)                      # open across the fork, in the parent's hands

def worker(number):
    engine.dispose(close=False)                   # what SQLAlchemy asks of a forked child
    assert read(preloaded) == b"preloaded"
    at_once(4, lambda n: keep(f"worker-{number}", f"{number}-{n}".encode()))

children = []
for number in range(3):
    child = os.fork()
    if not child:
        try:
            worker(number)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
at_once(4, lambda n: keep("master", f"meanwhile {n}".encode()))
assert held.read() == b"preloaded"
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert read(keep("master", b"afterwards")) == b"afterwards"
print(codes)
"""


@pytest.mark.parametrize("storage_url", ["disk", "s3"], indirect=True)  # memory is each process's own
def test_a_store_that_was_used_before_a_fork_works_in_parent_and_children(database: Any, storage_url: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", PRELOADING, database.url, storage_url],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
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
