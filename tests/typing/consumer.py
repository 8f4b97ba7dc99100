"""A host as a type checker sees it. Never run: mypy reads it, and a wrong annotation in jobkit fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from typing import BinaryIO, assert_type
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

import jobkit
from jobkit import (
    Asset,
    AssetStore,
    Job,
    JobEvent,
    JobStatus,
    JobStore,
    Relay,
    Rendered,
    Renderers,
    Runner,
    StoredObject,
    aio,
    testing,
)

renderers = Renderers(services={"model": "small"})


@renderers.register("note")
def note(ctx: jobkit.RenderContext) -> Rendered:
    assert_type(ctx.job_id, UUID)
    assert_type(ctx.company_id, str)
    assert_type(ctx.attempt, int)
    ctx.check()
    with ctx.open_asset(ctx.input["source"]) as source:
        return Rendered("note.txt", "text/plain", source.read())


@renderers.register("pages")
def pages(ctx: jobkit.RenderContext) -> Iterator[Rendered]:
    with ctx.writer("all.zip", "application/zip") as out:
        out.write(b"PK")
    yield Rendered("page.txt", "text/plain", [b"a", b"b"])


@renderers.register("later")
async def later(ctx: jobkit.RenderContext) -> list[Rendered]:
    return [Rendered("page.txt", "text/plain", ctx.workdir / "page.txt")]


@renderers.register("stream")
async def stream(ctx: jobkit.RenderContext) -> AsyncIterator[Rendered]:
    yield Rendered("page.txt", "text/plain", b"")


# A decorated renderer keeps its own type.
assert_type(renderers.render("note", {"source": "x"}), list[Rendered])


def rows(session: Session, scoped: scoped_session[Session], connection: sa.Connection, company: UUID) -> None:
    for host in (session, scoped, connection):
        jobs = JobStore(host, max_input_bytes=1 << 16, notify=False)
        job = jobs.create(company, job_type="note", input={"a": [1, None, "x"]}, source_task_id="task-1")
        assert_type(job, Job)
        assert_type(job.status, JobStatus)
        assert_type(job.created_at, datetime)
        assert_type(job.result_asset_id, UUID | None)
        assert_type(jobs.get_by_id(str(job.id), company_id=company), Job | None)
        assert_type(jobs.list_by_company(company, status="done", limit=10, before=job), list[Job])
        assert_type(jobs.transition(job.id, expect=["queued"], status="failed", error_message="no"), Job)
        assert_type(jobs.cancel(job.id, company_id=jobkit.ANY_COMPANY), Job)


def signed_in(session: Session, company: UUID | None, job_id: str) -> None:
    JobStore(session).get_by_id(job_id, company_id=company)  # type: ignore[arg-type]  # nobody's, so everybody's?
    JobStore(session).list_by_company(jobkit.ANY_COMPANY)  # type: ignore[arg-type]


def files(session: Session, engine: sa.Engine) -> None:
    assets = AssetStore("file:///srv/assets", engine=engine, max_bytes=1 << 30)
    stored = assets.put_file("acme", original_filename="a.txt", content_type="text/plain", body=b"x")
    assert_type(stored, StoredObject)
    with assets.writer("acme", original_filename=None, content_type="text/plain") as out:
        out.write(b"x")
    assert_type(out.stored, StoredObject | None)
    asset = assets.create(session, "acme", stored, source_task_id=None)
    assert_type(asset, Asset)
    assert_type(assets.open(asset, start=0, end=10), BinaryIO)
    assert_type(assets.list_by_job(session, asset.id), list[Asset])
    assets.verify(asset)
    assets.delete(session, asset)


async def asynchronous(
    session: AsyncSession, scoped: async_scoped_session[AsyncSession], connection: AsyncConnection, engine: sa.Engine
) -> None:
    for host in (session, scoped, connection):
        jobs = aio.AsyncJobStore(host, max_input_bytes=1 << 16, notify=False)
        job = await jobs.create("acme", job_type="note", input={"a": 1}, priority=1)
        assert_type(job, Job)
        assert_type(await jobs.get_by_id(job.id, company_id="acme"), Job | None)
        assert_type(await jobs.transition(job.id, expect=["queued"], status="failed"), Job)
        await jobs.create("acme", job_typ="note")  # type: ignore[call-arg]
    assets = aio.AsyncAssetStore(AssetStore("files"))
    stored = await assets.put_file("acme", original_filename=None, content_type="text/plain", body=b"x")
    asset = await assets.create(session, "acme", stored, source_task_id=None)
    assert_type(asset, Asset)
    assert_type(await assets.list_by_job(connection, job.id), list[Asset])
    assert_type(await assets.open(asset, start=1), BinaryIO)
    async with assets.writer("acme", original_filename=None, content_type="text/plain") as out:
        out.write(b"x")
    assert_type([piece async for piece in assets.stream(asset)], list[bytes])
    async with aio.subscribe("acme", limit=10) as events:
        async for event in events:
            assert_type(event, JobEvent)
    async for event in aio.watch(engine, job.id, timeout=timedelta(minutes=1)):
        assert_type(event, JobEvent)
    assert_type(await session.run_sync(testing.inline, AssetStore("files"), renderers), list[Job])


def tested(session: Session, connection: sa.Connection) -> None:
    clock = testing.FrozenClock()
    with testing.temporary_assets(max_bytes=10) as assets:
        assert_type(testing.inline(connection, assets, renderers, clock=clock), list[Job])
        assert_type(testing.drain(session, assets, renderers, clock), list[Job])
    assert_type(testing.assert_job_created(session, "acme", job_type="note", input={"a": 1}, priority=1), Job)


def work(engine: sa.Engine, assets: AssetStore) -> None:
    with Runner(engine, assets, renderers, concurrency=2, lease=timedelta(minutes=1), poll_interval=0.5) as runner:
        job = runner.submit("acme", job_type="note", input={})
        assert_type(job, Job)
        runner.dispatch(job)
        assert_type(runner.run_until_idle(timeout=10), int)
    with Relay(engine):
        pass


def heard(company_id: str, *, event: JobEvent) -> None:
    assert_type(event.payload["jobId"], object)  # type: ignore[assert-type]


jobkit.signals.content_job_done.connect(heard)
unsubscribe = jobkit.signals.subscribe("acme", lambda event: print(event.to_dict()))
assert_type(unsubscribe(), None)
assert_type(jobkit.CONTENT_JOB_STATUSES, tuple[str, ...])
assert_type(jobkit.MAX_GENERATED_ASSET_BYTES, int | float)
jobkit.migrations.upgrade(sa.create_engine("sqlite://"), schema=None)
