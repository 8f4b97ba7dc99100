"""``testing.inline`` takes the steps of a runner, and its time is that of a frozen clock."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Discard, JobStore, RenderContext, Rendered, Renderers, Retry, Runner, Snooze
from jobkit.tables import content_jobs
from jobkit.testing import FrozenClock, drain, inline
from tests.support import inlining
from tests.support.databases import Database
from tests.support.inlining import (
    COMPANY,
    TABLES,
    coroutine,
    create,
    generator,
    note,
    only,
    raising,
    two,
)
from tests.support.recorder import Recorder

engine, store = inlining.engine, inlining.store


# --- the same steps as a runner's


def fails_after_a_file(ctx: RenderContext) -> Iterator[Rendered]:
    yield note(ctx)
    raise ValueError("half way \0 \ud800")


async def endless(ctx: RenderContext) -> Rendered:
    await asyncio.Event().wait()
    return note(ctx)


def overdue(ctx: RenderContext) -> Rendered:
    threading.Event().wait(0.1)
    ctx.check()
    return note(ctx)


RENDERERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (note, {}),
    "two files": (two, {}),
    "coroutine": (coroutine, {}),
    "generator": (generator, {}),
    "fails": (raising(ValueError("no \0")), {}),
    "fails after a file": (fails_after_a_file, {}),
    "fails and is tried again": (raising(ValueError("no")), {"max_attempts": 3}),
    "asks for another attempt": (raising(Retry(60, "later")), {"max_attempts": 2}),
    "snoozes": (raising(Snooze(3600)), {}),
    "discards": (raising(Discard("not wanted")), {"max_attempts": 5}),
    "exits": (raising(SystemExit(3)), {}),
    "is cancelled by itself": (raising(jobkit.JobCancelled("by itself")), {}),
    "gives nothing": (lambda ctx: None, {}),
    "gives nonsense": (lambda ctx: [1], {}),
    "empty": (lambda ctx: Rendered("a", "text/plain", b""), {}),
    "input it cannot parse": (note, {"input": lambda value: value["missing"]}),
    "takes too long": (overdue, {"timeout": 0.05}),
    "never ends": (endless, {"timeout": 0.05}),
}


@pytest.mark.parametrize("name", [*RENDERERS, "nobody renders it"])
def test_it_leaves_what_a_runner_leaves(name: str, engine: sa.Engine, database: Database, store: AssetStore) -> None:
    renderer, options = RENDERERS.get(name, (None, {}))
    renderers = only(renderer, **options) if renderer else Renderers()
    clock = FrozenClock()
    with Session(engine) as session:
        create(session)
        inline(session, store, renderers, clock=clock)
        mine = left(session)
        session.rollback()
    with Session(engine) as session, session.begin():
        create(session)
    Runner(engine, store, renderers, clock=clock).run_until_idle(timeout=60)
    with Session(engine) as session, session.begin():
        theirs = left(session)
        for table in TABLES:
            session.execute(table.delete())
    assert mine == theirs
    assert len(mine["content_jobs"]) == 1


# What differs between any two runs: ids, times, who ran it, and how long the pause before another attempt is.
DIFFERS = {"id", "job_id", "object_key", "worker_id", "lease_until", "xid", "result_asset_id", "run_at"}


def left(session: Session) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for table in TABLES:
        kept = [column for column in table.columns if column.name not in DIFFERS and not column.name.endswith("_at")]
        order = [column for column in (table.c.get("seq"), table.c.get("position")) if column is not None]
        found[table.name] = [dict(row._mapping) for row in session.execute(sa.select(*kept).order_by(*order))]
        for row in found[table.name]:
            row["payload"] = sorted(row.get("payload") or {})
    [job] = session.execute(sa.select(content_jobs)).all()
    found["set"] = [{name: value is not None for name, value in job._mapping.items()}]
    return found


# --- time


def test_a_job_waits_for_its_time_and_for_its_next_attempt_by_the_frozen_clock(
    engine: sa.Engine, session: Session, store: AssetStore, recorder: Recorder
) -> None:
    clock = FrozenClock()
    attempts: list[int] = []

    def renderer(ctx: RenderContext) -> Rendered:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ValueError(f"attempt {ctx.attempt}")
        return note(ctx)

    renderers = only(renderer, max_attempts=3)
    job = JobStore(session, clock=clock).create(COMPANY, job_type="note", run_at=clock() + timedelta(hours=1))
    assert inline(session, store, renderers, clock=clock) == []
    clock.advance(3600)
    [waiting] = inline(session, store, renderers, clock=clock)
    assert (waiting.status, waiting.error_message) == ("queued", "attempt 1")
    assert inline(session, store, renderers, clock=clock) == []
    clock.advance(5)
    [waiting] = inline(session, store, renderers, clock=clock)
    assert waiting.run_at is not None
    clock.move_to(waiting.run_at)
    [done] = inline(session, store, renderers, clock=clock)
    assert (done.id, done.status, attempts) == (job.id, "done", [1, 2, 3])
    assert recorder.types() == ["queued", "running", "retrying", "running", "retrying", "running", "done"]


def test_drain_moves_the_clock_over_every_wait(engine: sa.Engine, session: Session, store: AssetStore) -> None:
    clock = FrozenClock()
    begun, naps = clock(), 3

    def renderer(ctx: RenderContext) -> Rendered:
        nonlocal naps
        naps -= 1
        if naps >= 0:
            raise Snooze(3600)
        return note(ctx)

    create(session)
    later = create(session, "other", run_at=begun + timedelta(hours=100))
    renderers = only(renderer)
    renderers.register("other")(note)
    ran = drain(session, store, renderers, clock)
    assert [(job.job_type, job.status, job.attempt) for job in ran] == [("note", "done", 1), ("other", "done", 1)]
    assert clock() == later.run_at


@pytest.mark.parametrize("run", [inline, drain])
def test_jobs_that_never_end_are_an_error_in_the_end(
    engine: sa.Engine, session: Session, store: AssetStore, run: Any
) -> None:
    error = Snooze(0) if run is inline else Snooze(60)
    create(session)
    with pytest.raises(RuntimeError, match="still queued after 7 runs"):
        run(session, store, only(raising(error)), clock=FrozenClock(), limit=7)
