"""What benchmarks run on, and who writes beside them."""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa

import jobkit
from tests.benchmarks.measuring import MIB, memory, parent, reset_peak
from tests.support.postgres import QUICK, Server, start_server

T = TypeVar("T")
DATABASES = ("sqlite", "postgresql")


def add_databases(parser: argparse.ArgumentParser) -> None:
    """Let a command take the names of databases."""
    parser.add_argument("databases", nargs="*", metavar="sqlite|postgresql", type=_known, help="default: both")


def _known(name: str) -> str:
    if name not in DATABASES:
        raise argparse.ArgumentTypeError(f"no database of this benchmark: {name}")
    return name


@contextmanager
def server_for(name: str, settings: Sequence[str] = QUICK) -> Iterator[Server | None]:
    """A server of one's own for ``postgresql``; SQLite needs none."""
    server = start_server(settings=settings) if name == "postgresql" else None
    try:
        yield server
    finally:
        if server is not None:
            server.stop()


def connect(url: str) -> sa.Engine:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        jobkit.configure_sqlite(engine)
    return engine


@contextmanager
def database(url: str | None) -> Iterator[tuple[sa.Engine, Path]]:
    """The database at ``url`` (default: an SQLite file), which must be empty, with the tables; and a folder."""
    with tempfile.TemporaryDirectory(prefix="jobkit-bench-") as folder:
        engine = connect(url or f"sqlite:///{folder}/bench.db")
        jobkit.migrations.upgrade(engine)
        yield engine, Path(folder)
        engine.dispose()


@contextmanager
def fresh(server: Server | None) -> Iterator[tuple[sa.Engine, Path]]:
    """As ``database``: a new one on ``server``, which is dropped afterwards, or an SQLite file."""
    url = None if server is None else server.create_database()
    with database(url) as made:
        yield made
    if server is not None and url is not None:
        server.drop_database(url)


def postmaster(engine: sa.Engine) -> int | None:
    """The first process of the PostgreSQL server of ``engine``, when it runs on this machine."""
    if engine.dialect.name != "postgresql":
        return None
    with engine.connect() as connection:
        backend: int = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        program = Path(f"/proc/{backend}/comm")
        return parent(backend) if program.exists() and "postgres" in program.read_text() else None


def settle(engine: sa.Engine) -> None:
    """Write out and count what filling a database has left, so that it is no burden of what is measured next."""
    steps = ("VACUUM ANALYZE", "CHECKPOINT") if engine.dialect.name == "postgresql" else ("PRAGMA wal_checkpoint",)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for step in steps:
            connection.exec_driver_sql(step)
    os.sync()


class Neighbour:
    """Writes a job every few milliseconds, and knows how long each took."""

    def __init__(self, engine: sa.Engine) -> None:
        self.waits: list[float] = []
        self._engine, self._stopped = engine, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(0.005):
            start = time.perf_counter()
            with self._engine.begin() as connection:
                jobkit.JobStore(connection).create("neighbour", job_type="note")
            self.waits.append(time.perf_counter() - start)

    def __str__(self) -> str:
        ordered = sorted(self.waits)
        if not ordered:
            return "no write beside it: over too soon"
        return (
            f"{len(ordered)} writes beside it: median {ordered[len(ordered) // 2] * 1000:.1f} ms, "
            f"p99 {ordered[len(ordered) * 99 // 100] * 1000:.1f} ms, longest {ordered[-1] * 1000:.1f} ms"
        )


def beside_a_neighbour(engine: sa.Engine, idle: int, act: Callable[[], T], tell: Callable[[T, float], str]) -> None:
    """Print what ``tell`` makes of the result of ``act`` and the seconds it took, the memory over ``idle``, and how the
    neighbour fared.
    """
    reset_peak()
    start = time.perf_counter()
    with Neighbour(engine) as neighbour:
        result = act()
    took = time.perf_counter() - start
    print(f"{tell(result, took)}, {(memory('VmHWM') - idle) / MIB:.1f} MiB over idle")
    print(f"  {neighbour}", flush=True)
