"""What tests of running jobs share: renderers to wait on, conditions with deadlines, a look at a job from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import sqlalchemy as sa

import jobkit
from jobkit.base.text import error_message
from jobkit.tables import asset_intents, assets, content_job_events, content_jobs


def until(holds: Callable[[], Any], what: str = "the condition", timeout: float = 60.0) -> None:
    """Return once ``holds()``; fail the test after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout} s"
        threading.Event().wait(0.005)


def note(ctx: jobkit.RenderContext) -> jobkit.Rendered:
    return jobkit.Rendered("note.txt", "text/plain", str(ctx.job_id).encode())


def only(renderer: Any = note) -> jobkit.Renderers:
    """Every job type is rendered by ``renderer``. Its errors are told as they are, which hosts may choose too."""
    return jobkit.Renderers(default=renderer, describe_error=error_message)


class Gate:
    """A renderer that waits until it is let through."""

    def __init__(self) -> None:
        self.jobs: list[UUID] = []
        self.contexts: list[jobkit.RenderContext] = []
        self._entered = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, ctx: jobkit.RenderContext) -> jobkit.Rendered:
        self.jobs.append(ctx.job_id)
        self.contexts.append(ctx)
        self._entered.release()
        assert self._open.wait(60)
        return note(ctx)

    def entered(self, count: int = 1) -> None:
        """Wait until ``count`` more jobs are in the renderer."""
        for _ in range(count):
            assert self._entered.acquire(timeout=60)

    def open(self) -> None:
        self._open.set()


def seen(engine: sa.Engine, job: jobkit.Job | UUID) -> Any:
    """The job's row as a new connection sees it, or None."""
    job_id = job if isinstance(job, UUID) else job.id
    with engine.connect() as connection:
        return connection.execute(sa.select(content_jobs).where(content_jobs.c.id == job_id)).one_or_none()


def statuses(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(content_jobs.c.status).order_by(content_jobs.c.created_at)).scalars())


def counted(engine: sa.Engine) -> dict[str, int]:
    """How many rows each other table has."""
    with engine.connect() as connection:
        return {
            table.name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for table in (assets, asset_intents, content_job_events)
        }


def objects(folder: Any) -> list[Any]:
    """The stored files below an asset folder."""
    return [p for p in folder.rglob("*") if p.is_file() and ".spool" not in p.relative_to(folder).parts]
