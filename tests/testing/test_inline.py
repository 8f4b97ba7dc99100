"""``testing.inline`` and ``drain``: the whole life of jobs inside a transaction that is rolled back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

import jobkit
from jobkit import AssetStore, Job, JobStore, RenderContext, Rendered, Renderers, configure_sqlite, metadata, signals
from jobkit.storage.local import LocalStorage
from jobkit.tables import content_job_events
from jobkit.testing import inline
from tests.support import inlining
from tests.support.asynchronous import Lane
from tests.support.inlining import (
    COMPANY,
    NOTHING,
    coroutine,
    create,
    generator,
    note,
    only,
    raising,
    rows,
    two,
)
from tests.support.recorder import Recorder

engine, store = inlining.engine, inlining.store


def log(session: Session, job: Job) -> list[str]:
    e = content_job_events.c
    types = session.execute(sa.select(e.type).where(e.job_id == job.id).order_by(e.seq)).scalars()
    return [kind.removeprefix("content_job.") for kind in types]


# --- the whole life


def test_a_job_lives_wholly_inside_a_transaction_that_is_rolled_back(
    engine: sa.Engine, session: Session, store: AssetStore, recorder: Recorder
) -> None:
    job = create(session, input={"cups": 2})
    [done] = inline(session, store, only(note))
    assert (done.id, done.status, done.fence, done.attempt, done.event_seq) == (job.id, "done", 1, 1, 3)
    [asset] = store.list_by_job(session, job.id, company_id=COMPANY)
    assert asset.id == done.result_asset_id
    store.verify(asset)
    with store.open(asset) as file:
        assert file.read() == b"{'cups': 2}"
    assert log(session, job) == recorder.types(job.id) == ["queued", "running", "done"]
    assert recorder.events[-1].payload == {"jobId": str(job.id), "assetId": str(asset.id)}
    assert rows(engine) == NOTHING
    session.rollback()
    assert JobStore(session).list_by_company(COMPANY) == []


def test_a_receiver_that_uses_the_same_session_sees_the_state_it_hears_of(
    engine: sa.Engine, session: Session, store: AssetStore
) -> None:
    seen: list[tuple[str, str]] = []

    def look(event: jobkit.JobEvent) -> None:
        job = JobStore(session).get_by_id(event.job_id)
        assert job is not None
        seen.append((event.type.removeprefix("content_job."), job.status.value))

    unsubscribe = signals.subscribe(COMPANY, look)
    create(session)
    inline(session, store, only(note))
    unsubscribe()
    assert seen == [("queued", "running"), ("running", "running"), ("done", "done")]


def test_what_renderers_and_receivers_create_runs_too(
    engine: sa.Engine, session: Session, store: AssetStore, recorder: Recorder
) -> None:
    def renderer(ctx: RenderContext) -> Rendered:
        if ctx.input["depth"] < 2:
            create(ctx.services, input={"depth": ctx.input["depth"] + 1})
        return note(ctx)

    def then_mail(_company_id: str, *, event: jobkit.JobEvent) -> None:
        if not JobStore(session).list_by_company(COMPANY, job_type="mail"):
            create(session, "mail")

    renderers = only(renderer, services=session)
    renderers.register("mail")(note)
    first = create(session, input={"depth": 0})
    with signals.content_job_done.connected_to(then_mail):
        ran = inline(session, store, renderers)
    assert [job.job_type for job in ran].count("note") == 3
    assert [job.job_type for job in ran].count("mail") == 1
    assert ran[0].id == first.id
    assert {job.status for job in ran} == {"done"}
    assert recorder.types().count("queued") == recorder.types().count("done") == 4


def test_a_second_call_repeats_no_event_and_goes_on_with_what_came_since(
    engine: sa.Engine, session: Session, store: AssetStore, recorder: Recorder
) -> None:
    job = create(session)
    renderers = only(lambda ctx: None)
    inline(session, store, renderers)
    assert inline(session, store, renderers) == []
    JobStore(session).retry(job.id)
    [again] = inline(session, store, renderers)
    assert (again.status, again.fence, again.attempt) == ("failed", 2, 1)
    assert recorder.types() == ["queued", "running", "failed", "queued", "running", "failed"]
    assert [event.seq for event in recorder.events] == [1, 2, 3, 4, 5, 6]


def test_the_hosts_rows_are_there_for_its_renderers_and_stay_when_a_job_fails(
    engine: sa.Engine, session: Session, store: AssetStore
) -> None:
    class Base(DeclarativeBase):
        pass

    class Report(Base):
        __tablename__ = "reports"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]

    Base.metadata.create_all(session.connection())
    session.add(Report(id=1, title="added, not flushed"))

    def renderer(ctx: RenderContext) -> Rendered:
        title = session.connection().execute(sa.select(Report.title)).scalar_one()
        raise LookupError(title)

    create(session)
    [failed] = inline(session, store, only(renderer))
    assert failed.error_message == "added, not flushed"
    assert session.get_one(Report, 1).title == "added, not flushed"
    session.rollback()


# --- asked to stop, or stopped


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_job_that_is_cancelled_while_it_runs_hears_of_it_at_its_next_check(
    kind: str, engine: sa.Engine, session: Session, store: AssetStore, recorder: Recorder
) -> None:
    def cancel(_company_id: str, *, event: jobkit.JobEvent) -> None:
        JobStore(session).cancel(event.job_id)

    def plain(ctx: RenderContext) -> Rendered:
        ctx.check()
        raise AssertionError

    async def awaited(ctx: RenderContext) -> Rendered:
        await asyncio.sleep(0)
        return plain(ctx)

    create(session)
    with signals.content_job_running.connected_to(cancel):
        [job] = inline(session, store, only(plain if kind == "plain" else awaited))
    assert (job.status, job.error_message) == ("cancelled", None)
    assert recorder.types() == ["queued", "running", "cancelled"]


def test_an_attempt_whose_job_was_ended_by_hand_changes_nothing(
    engine: sa.Engine, session: Session, store: AssetStore
) -> None:
    def renderer(ctx: RenderContext) -> Rendered:
        JobStore(session).transition(ctx.job_id, status="failed", error_message="by hand")
        with pytest.raises(jobkit.LeaseLost):
            ctx.check()
        return note(ctx)

    create(session)
    [job] = inline(session, store, only(renderer))
    assert (job.status, job.error_message, job.event_seq) == ("failed", "by hand", 3)
    assert store.list_by_job(session, job.id) == []


def test_a_renderer_that_took_too_long_and_never_looked_has_failed(
    engine: sa.Engine, session: Session, store: AssetStore
) -> None:
    def renderer(ctx: RenderContext) -> Rendered:
        threading.Event().wait(0.05)
        return note(ctx)

    create(session)
    [job] = inline(session, store, only(renderer, timeout=0.01))
    assert (job.status, job.error_message) == ("failed", "the renderer for 'note' did not end within 0.01 seconds")
    assert store.list_by_job(session, job.id) == []
    assert list(store.spool_folder().iterdir()) == []


def test_a_storage_that_fails_fails_the_job(
    engine: sa.Engine, session: Session, store: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(LocalStorage, "publish", publish)
    create(session)
    [job] = inline(session, store, only(note))
    assert (job.status, job.error_message) == ("failed", "the disk is full")


def test_a_renderer_that_breaks_the_transaction_is_named_as_the_cause(
    engine: sa.Engine, session: Session, store: AssetStore
) -> None:
    create(session)
    renderers = only(lambda ctx: session.execute(sa.text("SELECT nonsense")))
    if engine.dialect.name == "sqlite":  # which lets a transaction go on after an error
        [job] = inline(session, store, renderers)
        assert "nonsense" in (job.error_message or "")
        return
    with pytest.raises(RuntimeError, match=r'transaction unusable: .*column "nonsense" does not exist') as raised:
        inline(session, store, renderers)
    assert isinstance(raised.value.__cause__, sa.exc.ProgrammingError)


@pytest.mark.parametrize("outcome", [KeyboardInterrupt(), pytest.fail.Exception("timeout")], ids=["Ctrl-C", "pytest"])
def test_what_is_meant_for_the_test_is_no_failure_of_a_job(
    outcome: BaseException, engine: sa.Engine, session: Session, store: AssetStore
) -> None:
    create(session)
    with pytest.raises(type(outcome)):
        inline(session, store, only(raising(outcome)))
    session.rollback()


def test_a_receiver_that_raises_is_logged_and_the_job_goes_on(
    engine: sa.Engine, session: Session, store: AssetStore, caplog: pytest.LogCaptureFixture
) -> None:
    def raises(_company_id: str, *, event: jobkit.JobEvent) -> None:
        raise LookupError

    create(session)
    with signals.content_job_running.connected_to(raises):
        [job] = inline(session, store, only(note))
    assert job.status == "done"
    assert "failed on content_job.running" in caplog.text


# --- other files


@pytest.mark.parametrize("kind", ["plain", "coroutine"])
def test_a_renderer_reads_an_asset_that_is_not_committed(
    kind: str, engine: sa.Engine, session: Session, store: AssetStore
) -> None:
    def plain(ctx: RenderContext) -> Rendered:
        with ctx.open_asset(ctx.input["asset"]) as file:
            return Rendered("copy.txt", "text/plain", file.read() * 2)

    async def awaited(ctx: RenderContext) -> Rendered:
        await asyncio.sleep(0)
        return plain(ctx)

    first = create(session)
    inline(session, store, only(note))
    [source] = store.list_by_job(session, first.id)
    create(session, "copy", input={"asset": str(source.id)})
    JobStore(session).create("beta", job_type="copy", input={"asset": str(source.id)})
    renderers = Renderers(default=plain if kind == "plain" else awaited)
    copied, foreign = sorted(inline(session, store, renderers), key=lambda job: job.company_id)
    [copy] = store.list_by_job(session, copied.id)
    assert copy.byte_size == 2 * source.byte_size
    assert (foreign.status, foreign.error_message) == ("failed", f"no asset {source.id}")


# --- sessions of every kind


def test_any_session_will_do(engine: sa.Engine, store: AssetStore, recorder: Recorder) -> None:
    scoped = scoped_session(sessionmaker(engine))
    with engine.connect() as connection, Session(engine) as session:
        for host in (connection, session, scoped):
            job = create(host)
            assert [done.id for done in inline(host, store, only(note))] == [job.id]
            host.rollback()
    scoped.remove()
    assert recorder.types() == ["queued", "running", "done"] * 3


def test_a_session_that_commits_inside_the_tests_transaction(engine: sa.Engine, store: AssetStore) -> None:
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:

            def renderer(ctx: RenderContext) -> Rendered:
                create(session, "more")
                session.commit()
                return note(ctx)

            renderers = only(renderer)
            renderers.register("more")(note)
            create(session)
            session.commit()
            create(session)
            session.rollback()
            assert [job.status for job in inline(session, store, renderers)] == ["done", "done"]
            session.commit()
            assert len(JobStore(session).list_by_company(COMPANY)) == 2
        outer.rollback()


def test_a_database_in_memory_will_do(store: AssetStore) -> None:
    engine = sa.create_engine("sqlite://")
    configure_sqlite(engine)
    metadata.create_all(engine)
    with Session(engine) as session:
        create(session)
        assert [job.status for job in inline(session, store, only(generator))] == ["done"]
    engine.dispose()


def test_an_sqlite_engine_that_was_not_set_up_is_refused(store: AssetStore) -> None:
    engine = sa.create_engine("sqlite://")
    metadata.create_all(engine)
    with Session(engine) as session, pytest.raises(jobkit.ConfigurationError, match="configure_sqlite"):
        inline(session, store, only(note))
    engine.dispose()


@pytest.mark.parametrize("renderer", [note, two, coroutine, generator, raising(ValueError("no"))])
def test_an_asynchronous_session_runs_it_in_its_own_transaction(
    renderer: Any, lane: Lane, store: AssetStore, recorder: Recorder
) -> None:
    async def story() -> str:
        async with AsyncSession(lane.async_engine) as session:
            await session.run_sync(create)
            [job] = await session.run_sync(inline, store, only(renderer))
            for asset in await session.run_sync(lambda s: store.list_by_job(s, job.id)):
                store.verify(asset)
            assert rows(lane.engine) == NOTHING
            await session.rollback()
            return str(job.status)

    assert recorder.types() == [] != lane.run(story)
    assert recorder.types() in (["queued", "running", "done"], ["queued", "running", "failed"])
    assert rows(lane.engine) == NOTHING


def test_an_asynchronous_renderer_of_an_asynchronous_session_reads_an_asset(lane: Lane, store: AssetStore) -> None:
    async def copy(ctx: RenderContext) -> Rendered:
        ctx.check()
        await asyncio.sleep(0)
        with ctx.open_asset(ctx.input["asset"]) as file:
            return Rendered("copy.txt", "text/plain", file.read())

    async def story() -> str:
        async with AsyncSession(lane.async_engine) as session:
            await session.run_sync(create)
            [job] = await session.run_sync(inline, store, only(note))
            await session.run_sync(create, "copy", input={"asset": str(job.result_asset_id)})
            [copied] = await session.run_sync(inline, store, Renderers(default=copy))
            return str(copied.status)

    assert lane.run(story) == "done"
