"""Threads that the system refuses: at the exit of Python 3.12, or when there are too many."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa

import jobkit
from jobkit.base.threads import DaemonPool
from jobkit.db.connections import DedicatedConnection
from tests.support.databases import Database

Refuse = Callable[[str, int], None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Let only ``allowed`` threads start whose name begins with ``name``."""
    start = threading.Thread.start
    started: list[str] = []

    def refuse(name: str, allowed: int) -> None:
        def call(thread: threading.Thread) -> None:
            if thread.name.startswith(name):
                if len(started) >= allowed:
                    raise RuntimeError("can't create new thread at interpreter shutdown")
                started.append(thread.name)
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", call)

    return refuse


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_every_task_runs_whatever_number_of_threads_can_be_started(allowed: int, refuse: Refuse) -> None:
    refuse("some", allowed)
    pool, done, ran_on = DaemonPool(2, "some"), threading.Semaphore(0), set()

    def task() -> None:
        ran_on.add(threading.current_thread().name)
        done.release()

    for _ in range(10):
        pool.submit(task)
    pool.close()
    for _ in range(10):
        assert done.acquire(timeout=60)
    assert all(name.startswith("some") for name in ran_on) == bool(allowed)


def test_a_task_that_raises_in_the_submitting_thread_is_logged_too(
    refuse: Refuse, caplog: pytest.LogCaptureFixture
) -> None:
    refuse("some", 0)
    DaemonPool(1, "some").submit(lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    assert "a task of some failed" in caplog.text


@pytest.mark.parametrize("name", ["jobkit-store", "jobkit-render"])
def test_a_job_ends_though_no_thread_can_be_started_for_it(
    name: str, engine: sa.Engine, disk: jobkit.AssetStore, create: Callable[..., jobkit.Job], refuse: Refuse
) -> None:
    jobs = [create() for _ in range(3)]
    refuse(name, 0)
    renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"a"))
    assert jobkit.Runner(engine, disk, renderers).run_until_idle(timeout=60) == 3
    with engine.connect() as connection:
        found = [jobkit.JobStore(connection).get_by_id(job.id) for job in jobs]
    assert [job.status for job in found if job] == ["done"] * 3


def test_a_connection_whose_pool_was_disposed_of_meanwhile_is_closed(postgres_database: Database) -> None:
    engine = postgres_database.engine
    link = DedicatedConnection(engine)
    with link.use() as connection:
        driver = connection.connection.driver_connection
    engine.dispose()
    link.close()
    assert driver is not None
    assert driver.closed
