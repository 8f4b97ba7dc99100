"""A worker hears every signal at once, and ends in time, whatever is gone or silent: output, terminal, database."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from jobkit.tables import content_jobs
from tests.cli.test_commands import APP, JOBKIT, create, status, wait_done
from tests.support.databases import Database
from tests.support.proxy import Proxy
from tests.support.runners import seen, until
from tests.support.surroundings import hear_hang_ups

# The longest that a worker may take to hear a signal, and to end: much less than what it would otherwise wait for.
DRAIN, SOON = 240, 120.0
# A signal that the kernel gives to another thread than the main one, as it may do with any.
ELSEWHERE = """
import os, signal, threading

def send():
    while not Path("signal").exists():
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), int(Path("signal").read_text()))
    threading.Event().wait()

threading.Thread(target=send, daemon=True).start()
"""


class Worker:
    """``jobkit work`` on an app in ``folder``; its standard output is a pipe that nobody reads, unless ``stdout`` is
    another.
    """

    def __init__(self, folder: Path, url: str, *options: str, app: str = APP, before: tuple[str, ...] = (), **how: Any):
        (folder / "app.py").write_text(app)
        self.folder, self._url = folder, url
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*before, *JOBKIT, "work", "--app", "app:runner", *options],
                cwd=folder,
                env=os.environ | {"APP_DATABASE": url},
                # However this run was started, by nohup for one: the worker is to hear of a hang-up.
                **{"stdout": subprocess.PIPE, "stderr": log, "preexec_fn": hear_hang_ups, **how},
            )

    def until(self, name: str) -> None:
        until((self.folder / name).exists, f"the file {name}; {self.log.read_text()}", SOON)

    def working(self) -> None:
        """Wait until it says that it works."""
        assert self.process.stdout is not None
        assert b"working for" in self.process.stdout.readline(), self.log.read_text()

    def go(self) -> None:
        (self.folder / "go").touch()

    def ended(self) -> int:
        return self.process.wait(SOON)


@contextmanager
def working(folder: Path, url: str, *options: str, **how: Any) -> Iterator[Worker]:
    worker = Worker(folder, url, *options, **how)
    try:
        yield worker
    finally:
        worker.go()
        worker.process.kill()
        worker.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_another_thread_is_given_drains_too(
    sqlite_database: Database, tmp_path: Path, number: signal.Signals
) -> None:
    with working(tmp_path, sqlite_database.url, f"--drain={DRAIN}", app=APP + ELSEWHERE) as worker:
        job = create(sqlite_database, "waits")
        worker.until("begun")
        (tmp_path / "signal.new").write_text(str(int(number)))
        (tmp_path / "signal.new").rename(tmp_path / "signal")
        worker.working()
        assert worker.process.stdout is not None
        assert b"in flight" in worker.process.stdout.readline()
        worker.go()
        assert worker.ended() == 0
        assert status(sqlite_database, job) == "done"


def test_a_signal_right_after_the_first_claim_is_heard(database: Database, tmp_path: Path) -> None:
    job = create(database, "waits")
    with working(tmp_path, url_of(database), f"--drain={DRAIN}") as worker:
        worker.until("begun")
        worker.process.send_signal(signal.SIGTERM)
        worker.go()
        assert worker.ended() == 0
        assert status(database, job) == "done"


def url_of(database: Database) -> str:
    return database.engine.url.render_as_string(hide_password=False)


def closed() -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def full() -> Any:
    """A pipe that takes no more, because nobody reads; its reader stays open."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    fcntl.fcntl(reading, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return writing


@pytest.mark.parametrize("output", [closed, full])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_whose_reader_is_gone_or_stands_still_drains(
    sqlite_database: Database, tmp_path: Path, output: Callable[[], int], number: signal.Signals
) -> None:
    job, descriptor = create(sqlite_database, "waits"), output()
    try:
        with working(tmp_path, sqlite_database.url, f"--drain={DRAIN}", stdout=descriptor) as worker:
            worker.until("begun")
            worker.process.send_signal(number)
            wait_done_after(worker, sqlite_database, job)
    finally:
        os.close(descriptor)


def wait_done_after(worker: Worker, database: Database, job: Any) -> None:
    worker.go()
    assert worker.ended() == 0, worker.log.read_text()
    assert status(database, job) == "done"
    assert "Traceback" not in worker.log.read_text()


def test_a_worker_without_standard_output_drains(sqlite_database: Database, tmp_path: Path) -> None:
    job = create(sqlite_database, "waits")
    shell = ("sh", "-c", 'exec "$@" >&-', "sh")
    with working(tmp_path, sqlite_database.url, f"--drain={DRAIN}", before=shell) as worker:
        worker.until("begun")
        worker.process.send_signal(signal.SIGTERM)
        wait_done_after(worker, sqlite_database, job)


def test_a_worker_under_nohup_outlives_its_terminal(sqlite_database: Database, tmp_path: Path) -> None:
    with working(tmp_path, sqlite_database.url, before=("nohup",)) as worker:
        worker.working()
        worker.process.send_signal(signal.SIGHUP)
        wait_done(sqlite_database, create(sqlite_database, "quick"))
        worker.process.send_signal(signal.SIGTERM)
        assert worker.ended() == 0


def test_jobs_that_outlast_the_drain_go_back_and_the_status_says_so(database: Database, tmp_path: Path) -> None:
    job = create(database, "waits")
    with working(tmp_path, url_of(database), "--drain=0.5") as worker:
        worker.until("begun")
        worker.process.send_signal(signal.SIGHUP)
        assert worker.ended() == 75
    row = seen(database.engine, job)
    assert (row.status, row.attempt, row.lease_until) == ("queued", 0, None)


@pytest.mark.parametrize("when", ["before the start", "with a job in flight"])
def test_a_database_that_says_nothing_does_not_hold_a_worker(
    postgres_database: Database, tmp_path: Path, when: str
) -> None:
    url = postgres_database.engine.url
    job = create(postgres_database, "waits")
    with Proxy(url.host or "", url.port or 0) as proxy:
        if when == "before the start":
            proxy.stall(new=True)
        through = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        with working(tmp_path, through, "--drain=1") as worker:
            if when == "before the start":
                until(lambda: proxy.accepted, "a connection", SOON)
            else:
                worker.until("begun")
                proxy.stall(new=True)
            asked = time.monotonic()
            worker.process.send_signal(signal.SIGTERM)
            assert worker.ended() == (0 if when == "before the start" else 75)
            # Its own threads would be waited for five seconds, the delivery of signals for ten, an answer for thirty.
            assert time.monotonic() - asked < 5
    assert seen(postgres_database.engine, job).status == ("queued" if when == "before the start" else "running")


def test_it_waits_for_the_tables_when_it_is_told_to(sqlite_database: Database, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/late.db"
    with working(tmp_path, url, "--wait") as worker:
        until(lambda: "as soon as the database is ready" in worker.log.read_text(), "the line in the log", SOON)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.ended() == 0
    with working(tmp_path, url, "--wait") as worker:
        until(lambda: "as soon as the database is ready" in worker.log.read_text(), "the line in the log", SOON)
        migrate(url)
        worker.working()
        assert worker.log.read_text().count("as soon as") == 1


def migrate(url: str) -> None:
    import jobkit

    engine = sa.create_engine(url)
    jobkit.configure_sqlite(engine)
    jobkit.migrations.upgrade(engine)
    with engine.connect() as connection:
        assert connection.execute(sa.select(content_jobs)).all() == []
    engine.dispose()


@pytest.mark.parametrize("given", ["-1", "nan", "inf", "soon"])
def test_a_drain_that_is_no_time_is_refused(tmp_path: Path, given: str) -> None:
    ran = subprocess.run(
        [*JOBKIT, "work", "--app", "x:y", f"--drain={given}"],
        cwd=tmp_path,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 2
    assert b"--drain: not a number of seconds" in ran.stderr
