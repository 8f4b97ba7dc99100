"""A soak: a runner works for a long time on every kind of job, and its process must not grow.

    python -m tests.benchmarks.soak [--minutes 30] [--rate 20] [--postgres] [URL ...]

Each database in turn, which must be empty: by default an SQLite file, with ``--postgres`` a PostgreSQL server of its
own. Beside the runner a host creates and cancels jobs, receivers hear of them, readers come and go, old jobs are pruned
and the storage is swept. Prints how the figures of this process and the tables went, and whether they are flat; exits
with 1 when not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from queue import SimpleQueue

import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, Runner, aio, signals, sse
from jobkit.events.log import REMEMBERED_EVENTS, REMEMBERED_JOBS
from tests.benchmarks.daily import until
from tests.benchmarks.databases import database
from tests.benchmarks.mixture import COMPANIES, Account, Host, by_status, renderers
from tests.benchmarks.samples import LIMITS, ROWS, Limit, Sample, grown, of_process, trend
from tests.support.postgres import start_server
from tests.support.runners import objects

# How old jobs get before they are pruned, and abandoned files before they are swept; how often either is done. Seconds;
# in short soaks sooner, so that tables stop growing within the first fifth, but no file takes as long as LEAST_GRACE.
OLD, GRACE, TIDY = 60.0, 30.0, 10.0
LEAST_GRACE = 5.0
# How long a reader stays, in seconds.
STAY = 3.0
# How often figures are sampled, and garbage is collected for that, in seconds; in short soaks more often.
EVERY, COLLECT = 5.0, 60.0
BYSTANDERS = 10
TABLES = list(jobkit.metadata.sorted_tables)


class Housekeeper:
    """Prunes and sweeps now and then, and knows how many jobs went."""

    def __init__(self, engine: sa.Engine, assets: AssetStore, seconds: float) -> None:
        self._engine, self._assets = engine, assets
        self._old, self._pause = min(OLD, seconds / 10), min(TIDY, seconds / 60)
        self._grace = max(LEAST_GRACE, min(GRACE, seconds / 10))
        self.pruned = 0

    def prune(self, older_than: float) -> None:
        self.pruned += jobkit.prune(self._engine, older_than=older_than, assets=self._assets, dry_run=False).jobs

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(self._pause):
            self.prune(self._old)
            self._assets.collect_garbage(older_than=self._grace, dry_run=False)


class Readers:
    """One reader after the other: of a job, of a company's stream, on an event loop, of a company's signals."""

    def __init__(self, engine: sa.Engine, host: Host) -> None:
        self._engine, self._host = engine, host
        self.told: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        kinds = (self._watch, self._stream, self._awaited, self._subscribe)
        for kind, company in zip(itertools.cycle(kinds), itertools.cycle(COMPANIES), strict=False):
            if stop.wait(0.1):
                break
            with suppress(IndexError, jobkit.JobNotFound):  # nothing was created yet; it was pruned already
                self.told[kind.__name__.strip("_")] += kind(company)

    def _watch(self, _: str) -> int:
        with closing(jobkit.watch(self._engine, self._host.recent[-1], timeout=STAY)) as events:
            return sum(1 for _ in events)

    def _stream(self, company: str) -> int:
        over = time.monotonic() + STAY
        with closing(sse.stream(self._engine, company, keep_alive=0.5)) as pieces:
            return sum(piece.count(b"\n\n") for piece in itertools.takewhile(lambda _: time.monotonic() < over, pieces))

    def _awaited(self, _: str) -> int:
        async def read() -> int:
            return len([event async for event in aio.watch(self._engine, self._host.recent[-1], timeout=STAY)])

        return asyncio.run(read())

    def _subscribe(self, company: str) -> int:
        heard: Counter[str] = Counter()
        unsubscribe = signals.subscribe(company, lambda event: heard.update([event.type]))
        time.sleep(STAY / 3)
        unsubscribe()
        return heard.total()


def rows(engine: sa.Engine) -> dict[str, float]:
    with engine.connect() as connection:
        return {t.name: connection.execute(sa.select(sa.func.count()).select_from(t)).scalar_one() for t in TABLES}


def sampled(engine: sa.Engine, seconds: float, workers: list[Future[None]]) -> list[Sample]:
    """Samples over so many seconds, or until a worker fails."""
    every, pause = min(EVERY, seconds / 60), min(COLLECT, seconds / 20)
    begun, samples, collected = time.monotonic(), [], -pause
    while (now := time.monotonic() - begun) <= seconds and not any(worker.done() for worker in workers):
        collecting = now >= collected + pause
        collected = now if collecting else collected
        samples.append(Sample(now, {**of_process(collected=collecting), **rows(engine)}))
        time.sleep(max(0.0, begun + len(samples) * every - time.monotonic()))
    return samples


def bystanders() -> list[Callable[..., None]]:
    """Receivers of every event and of one company's, which do nothing; held by whoever has the list."""

    def bystander() -> Callable[..., None]:
        return lambda _company_id, *, event: None

    made = [bystander() for _ in range(BYSTANDERS)]
    for receiver, company in zip(made, itertools.cycle(COMPANIES), strict=False):
        signals.content_job_done.connect(receiver)
        signals.content_job_running.connect(receiver, sender=company)
    return made


def soak(engine: sa.Engine, folder: Path, seconds: float, rate: float) -> tuple[list[Sample], list[str]]:
    """The samples, and what is wrong with the jobs in the end."""
    assets, running, stop = AssetStore(folder, engine=engine), SimpleQueue(), threading.Event()
    account, others = Account(), bystanders()
    runner = Runner(engine, assets, renderers(running))
    host, housekeeper = Host(runner, account, running), Housekeeper(engine, assets, seconds)
    readers = Readers(engine, host)
    with runner, ThreadPoolExecutor() as threads:
        host.fill(max(REMEMBERED_JOBS, REMEMBERED_EVENTS) + 1_000)
        until(lambda: account.ended == host.created.total())
        housekeeper.prune(0)
        workers = [threads.submit(act, stop) for act in (lambda s: host.run(rate, s), housekeeper.run, readers.run)]
        try:
            samples = sampled(engine, seconds, workers)
        finally:
            stop.set()
        for worker in workers:
            worker.result()
        until(lambda: all_ended(host, account))
    for _ in range(2):
        assets.collect_garbage(older_than=0, dry_run=False)
    print(f"  created {dict(host.created)} in {samples[-1].at:.0f} s, pruned {housekeeper.pruned}")
    print(f"  heard {dict(account.heard)}, as {len(others)} more receivers did; read {dict(readers.told)}")
    return samples, unaccounted(engine, host, account, housekeeper.pruned, len(objects(folder)))


def all_ended(host: Host, account: Account) -> bool:
    host.cancel()
    return account.ended >= host.created.total()


def unaccounted(engine: sa.Engine, host: Host, account: Account, pruned: int, files: int) -> list[str]:
    """What does not add up: every job ended once, as its kind does, and was told once; every file has its row."""
    left, created, heard = by_status(engine), host.created, account.heard
    kept = sum(left.pop(status, 0) for status in ("done", "failed", "cancelled"))
    failed, cancelled = created["fails"], created["endless"] + created["later"]
    sums = {
        "jobs that ended, and were pruned": (kept + pruned, created.total()),
        "jobs that did not end": (left.total(), 0),
        "failed jobs told": (heard["content_job.failed"], failed),
        "cancelled jobs told": (heard["content_job.cancelled"], cancelled),
        "done jobs told": (heard["content_job.done"], created.total() - failed - cancelled),
        "retries told": (heard["content_job.retrying"], created["retries"]),
        "stored files": (files, int(rows(engine)["assets"])),
    }
    return [f"{name}: {found}, not {wanted}" for name, (found, wanted) in sums.items() if found != wanted]


def verdict(samples: list[Sample], wrong: list[str]) -> bool:
    """Print the table and what is wrong with it; whether all is well."""
    limits: dict[str, Limit] = {name: limit for name, limit in LIMITS.items() if name in samples[0].figures}
    limits.update({table.name: ROWS for table in TABLES if table.name in samples[0].figures})
    print(f"  {len(samples)} samples  {'second fifth':>16}{'middle':>12}{'last fifth':>12}{'highest':>12}")
    for name in limits:
        print(f"  {name:20}" + "".join(f"{figure:12,.1f}" for figure in trend(samples, name)))
    wrong = [*grown(samples, limits), *wrong]
    print("  flat, and every job accounted for" if not wrong else "  NOT FLAT: " + "; ".join(wrong), flush=True)
    return not wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="*", metavar="URL", help="empty databases")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=20.0, help="jobs a second")
    parser.add_argument("--postgres", action="store_true", help="on a PostgreSQL server of its own")
    options = parser.parse_args()
    logging.getLogger("jobkit").setLevel(logging.ERROR)  # jobs that fail are warned of
    flat = True
    with ExitStack() as stack:
        urls: list[str | None] = options.urls or [None]
        if options.postgres:
            server = start_server()
            stack.callback(server.stop)
            urls = [*options.urls, server.create_database()]
        for url in urls:
            with database(url) as (engine, folder):
                print(f"{engine.dialect.name}, {options.minutes:g} minutes", flush=True)
                flat = verdict(*soak(engine, folder / "assets", options.minutes * 60, options.rate)) and flat
    sys.exit(not flat)


if __name__ == "__main__":
    main()
