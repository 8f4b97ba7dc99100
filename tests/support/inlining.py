"""What the tests of ``testing.inline`` share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from jobkit import AssetStore, Job, JobStore, RenderContext, Rendered, Renderers
from jobkit.base.text import error_message
from jobkit.tables import asset_intents, assets, content_job_events, content_jobs
from jobkit.testing import temporary_assets
from tests.support.databases import Database

COMPANY = "acme"
TABLES = (content_jobs, assets, content_job_events, asset_intents)
NOTHING = {table.name: 0 for table in TABLES}


@pytest.fixture
def store() -> Iterator[AssetStore]:
    with temporary_assets() as store:
        yield store


@pytest.fixture
def engine(database: Database) -> Iterator[sa.Engine]:
    """Nothing of a test with it is ever committed."""
    yield database.engine
    assert rows(database.engine) == NOTHING


def rows(engine: sa.Engine) -> dict[str, int]:
    """How many rows of each table are committed."""
    with engine.connect() as connection:
        counts = {table.name: sa.select(sa.func.count()).select_from(table) for table in TABLES}
        return {name: connection.execute(count).scalar_one() for name, count in counts.items()}


def create(session: Any, job_type: str = "note", **options: Any) -> Job:
    return JobStore(session).create(COMPANY, job_type=job_type, **options)


def only(renderer: Any, *, services: Any = None, **options: Any) -> Renderers:
    """A renderer of notes."""
    renderers = Renderers(services=services, describe_error=error_message)
    renderers.register("note", **options)(renderer)
    return renderers


def note(ctx: RenderContext) -> Rendered:
    return Rendered("note.txt", "text/plain", str(ctx.input).encode())


def raising(error: BaseException) -> Callable[[RenderContext], Rendered]:
    def renderer(ctx: RenderContext) -> Rendered:
        raise error

    return renderer


def two(ctx: RenderContext) -> Iterator[Rendered]:
    yield Rendered("a.txt", "text/plain", b"a")
    with ctx.writer("b.txt", "text/plain") as out:
        out.write(b"bb")


async def coroutine(ctx: RenderContext) -> Rendered:
    await asyncio.sleep(0)
    ctx.check()
    return note(ctx)


async def generator(ctx: RenderContext) -> AsyncIterator[Rendered]:
    for name in ("a", "b", "c"):
        await asyncio.sleep(0)
        yield Rendered(f"{name}.txt", "text/plain", name.encode())
