"""A steady stream of every kind of job, made through the public API, and an account of what became of them."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any
from uuid import UUID

import sqlalchemy as sa

import jobkit
from jobkit import JobRequest, JobStore, RenderContext, Rendered, Renderers, signals

# How many of a hundred jobs are of each kind.
KINDS = {"note": 60, "three": 12, "fails": 8, "retries": 6, "awaited": 8, "reports": 3, "endless": 3}
ENDS = ("content_job.done", "content_job.failed", "content_job.cancelled")
COMPANIES = [f"company-{number}" for number in range(10)]
# More jobs than that do not wait: a machine that is too slow for the rate gets a lower one.
MOST_WAITING = 200
FAR = datetime(2999, 1, 1, tzinfo=UTC)


def renderers(running: SimpleQueue[UUID]) -> Renderers:
    """One renderer a kind. An endless one puts its job into ``running``, and goes on until it is cancelled."""
    made = Renderers()

    def file(ctx: RenderContext, number: int = 0) -> Rendered:
        return Rendered(f"{number}.txt", "text/plain", f"{ctx.job_id} {number}\n".encode() * 20)

    made.register("note")(file)

    @made.register("three")
    def three(ctx: RenderContext) -> Iterator[Rendered]:
        for number in range(3):
            yield file(ctx, number)

    @made.register("fails")
    def fails(ctx: RenderContext) -> Rendered:
        raise ValueError(f"job {ctx.job_id} is one of those that fail")

    @made.register("retries", max_attempts=2)
    def retries(ctx: RenderContext) -> Rendered:
        if ctx.attempt == 1:
            raise jobkit.Retry(after=0.5)
        return file(ctx)

    @made.register("awaited")
    async def awaited(ctx: RenderContext) -> Rendered:
        await asyncio.sleep(0.01)
        return file(ctx)

    @made.register("reports")
    def reports(ctx: RenderContext) -> Rendered:
        for step in range(6):
            ctx.progress(step / 6, f"step {step}")
            time.sleep(0.1)
        return file(ctx)

    @made.register("endless", timeout=60)
    def endless(ctx: RenderContext) -> Rendered:
        running.put(ctx.job_id)
        while True:
            ctx.check()
            time.sleep(0.02)

    return made


class Account:
    """A receiver of every event, which only counts."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()
        for name in jobkit.CONTENT_JOB_EVENTS:
            signal: Any = getattr(signals, name.replace(".", "_"))
            signal.connect(self.hear)

    def hear(self, _: str, *, event: jobkit.JobEvent) -> None:
        self.heard[event.type] += 1

    @property
    def ended(self) -> int:
        return sum(self.heard[end] for end in ENDS)


class Host:
    """Creates jobs at a rate a second, and cancels those that would never end. ``run`` belongs to one thread."""

    def __init__(self, runner: jobkit.Runner, account: Account, running: SimpleQueue[UUID]) -> None:
        self._runner, self._engine = runner, runner.engine
        self._account, self._running = account, running
        self._rng = random.Random(7)
        self.created: Counter[str] = Counter()
        #: The last jobs, for whoever wants to watch one.
        self.recent: deque[UUID] = deque(maxlen=20)

    def fill(self, count: int) -> None:
        """So many jobs that are cancelled before their time: what is remembered of the last so many is full then."""
        for _ in range(0, count, 500):
            with self._engine.begin() as connection:
                jobs = JobStore(connection).create_many(COMPANIES[0], [JobRequest("later", run_at=FAR)] * 500)
            self.created["later"] += len(jobs)
            with self._engine.begin() as connection:
                for job in jobs:
                    JobStore(connection).cancel(job.id)

    def run(self, rate: float, stop: threading.Event) -> None:
        due = time.monotonic()
        while not stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + 1 / rate, time.monotonic() - 1)
            if self.created.total() - self._account.ended < MOST_WAITING:
                self._create()
            self.cancel()

    def _create(self) -> None:
        (kind,) = self._rng.choices(list(KINDS), list(KINDS.values()))
        company, number = self._rng.choice(COMPANIES), self.created.total()
        if number % 4 == 0:
            job = self._runner.submit(company, job_type=kind, input={"n": number})
        else:
            with self._engine.begin() as connection:
                job = JobStore(connection).create(company, job_type=kind, input={"n": number})
            self._runner.dispatch(job)
        self.created[kind] += 1
        self.recent.append(job.id)

    def cancel(self) -> None:
        """Cancel the endless jobs that have begun."""
        while True:
            try:
                job_id = self._running.get_nowait()
            except Empty:
                return
            with self._engine.begin() as connection:
                JobStore(connection).cancel(job_id)


def by_status(engine: sa.Engine) -> Counter[str]:
    """How many jobs there are of each status."""
    c = jobkit.tables.content_jobs.c
    with engine.connect() as connection:
        rows = connection.execute(sa.select(c.status, sa.func.count()).group_by(c.status)).all()
    return Counter(dict(map(tuple, rows)))
