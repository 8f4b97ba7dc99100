"""A renderer within a runner: what it is given, what it cannot break, and what is left when it fails."""

from __future__ import annotations

import asyncio
import stat
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Job, RenderContext, Rendered, Renderers
from jobkit.base.loops import LoopThread
from jobkit.base.text import error_message
from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import RenderEnvironment
from tests.support.files import COMPANY, intents, keep, rows

Renderer = Callable[[RenderContext], Any]


def note(body: Any = b"x", name: str = "a.txt") -> Rendered:
    return Rendered(name, "text/plain", body)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "assets"


@pytest.fixture
def run(engine: sa.Engine, disk: AssetStore, create: Callable[..., Job]) -> Callable[..., list[Job]]:
    """Run one job for each renderer, in one runner; the jobs as they then are."""

    def run(*renderers: Renderer, **options: Any) -> list[Job]:
        registry = Renderers(services=options.pop("services", None), describe_error=error_message)
        for number, renderer in enumerate(renderers):
            registry.register(f"kind-{number}")(renderer)
        jobs = [create(f"kind-{number}", **options) for number in range(len(renderers))]
        jobkit.Runner(engine, disk, registry).run_until_idle(timeout=60)
        with Session(engine) as session:
            store = jobkit.JobStore(session)
            return [store.get_by_id(job.id) or job for job in jobs]

    return run


def left_on_disk(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() or path.name.startswith("work-")]


def test_a_renderer_is_told_of_its_job(run: Callable[..., list[Job]], engine: sa.Engine) -> None:
    told: dict[str, Any] = {}
    services = object()

    def renderer(ctx: RenderContext) -> Rendered:
        told.update({name: getattr(ctx, name) for name in ("job_id", "company_id", "job_type", "attempt", "services")})
        told["input"] = dict(ctx.input)
        ctx.input["list"].append("changed")
        ctx.check()
        return note()

    (job,) = run(renderer, input={"list": [1]}, company_id=17, source_task_id="task-1", services=services)
    assert told == {
        "job_id": job.id,
        "company_id": "17",
        "job_type": "kind-0",
        "attempt": 1,
        "services": services,
        "input": {"list": [1, "changed"]},
    }
    assert (job.status, job.input) == ("done", {"list": [1]})
    (asset,) = rows(engine)
    assert (asset.id, asset.job_id, asset.company_id) == (job.result_asset_id, job.id, "17")
    assert (asset.source_task_id, asset.created_by_agent_id, asset.created_by_user_id) == ("task-1", None, None)
    assert asset.object_key.startswith("17/generated/")


def test_the_first_output_is_the_result_and_all_are_assets_in_order(
    run: Callable[..., list[Job]], engine: sa.Engine, disk: AssetStore
) -> None:
    def renderer(ctx: RenderContext) -> Iterator[Rendered]:
        with ctx.writer("first.txt", "text/plain") as out:
            out.write(b"1")
        yield note(b"2", "second.txt")

    (job,) = run(renderer)
    with Session(engine) as session:
        files = disk.list_by_job(session, job.id, company_id=COMPANY)
    assert [(f.original_filename, f.position, disk.open(f).read()) for f in files] == [
        ("first.txt", 0, b"1"),
        ("second.txt", 1, b"2"),
    ]
    assert job.result_asset_id == files[0].id
    assert intents(engine) == {}


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit("no words")


FAILURES: list[tuple[BaseException, str]] = [
    (ValueError("plain"), "plain"),
    (ValueError(), "ValueError"),
    (ValueError("nul \0 and \ud800 and \x1b[31m"), "nul \ufffd and \ufffd and \ufffd[31m"),
    (Unprintable(), "Unprintable"),
    (SystemExit(3), "3"),
    (SystemExit(), "SystemExit"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit(), "GeneratorExit"),
    (jobkit.JobCancelled("stopped"), "stopped"),
    (asyncio.CancelledError(), "CancelledError"),
    (StopAsyncIteration(), "StopAsyncIteration"),
]


def raising(error: BaseException, where: str) -> Renderer:
    """A renderer that raises ``error`` in one of the places where one can."""

    def function(ctx: RenderContext) -> Any:
        raise error

    def generator(ctx: RenderContext) -> Iterator[Rendered]:
        yield note()
        raise error

    def body(ctx: RenderContext) -> Rendered:
        return note(chunk for chunk in map(function, [ctx]))

    def writer(ctx: RenderContext) -> None:
        with ctx.writer("a.txt", "text/plain") as out:
            out.write(b"x")
            raise error

    async def coroutine(ctx: RenderContext) -> Any:
        raise error

    async def async_generator(ctx: RenderContext) -> AsyncIterator[Rendered]:
        yield note()
        raise error

    async def child_task(ctx: RenderContext) -> Any:
        await asyncio.create_task(coroutine(ctx))

    return locals()[where]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "where", ["function", "generator", "body", "writer", "coroutine", "async_generator", "child_task"]
)
def test_whatever_a_renderer_raises_fails_its_job_alone_and_leaves_nothing(
    run: Callable[..., list[Job]], engine: sa.Engine, folder: Path, where: str
) -> None:
    async def healthy(ctx: RenderContext) -> Rendered:
        return note()

    *failed, last = run(*[raising(error, where) for error, _ in FAILURES], healthy)
    for job, (error, message) in zip(failed, FAILURES, strict=True):
        assert (job.status, job.result_asset_id) == ("failed", None)
        # A generator turns this into a RuntimeError that says so.
        if not (where == "async_generator" and isinstance(error, StopAsyncIteration)):
            assert job.error_message == message
        assert job.finished_at is not None
    assert last.status == "done"
    (asset,) = rows(engine)
    assert left_on_disk(folder) == [folder / asset.object_key]
    assert intents(engine) == {}


def test_no_output_and_an_unknown_type_fail_with_a_message(
    run: Callable[..., list[Job]], create: Callable[..., Job], engine: sa.Engine, disk: AssetStore
) -> None:
    (job,) = run(lambda ctx: None)
    assert (job.status, job.error_message) == ("failed", "the renderer for 'kind-0' gave no file")
    unknown = create("pdf-documnet")
    jobkit.Runner(engine, disk, Renderers()).run_until_idle(timeout=60)
    with Session(engine) as session:
        found = jobkit.JobStore(session).get_by_id(unknown.id)
    assert found is not None
    assert (found.status, found.error_message) == ("failed", "no renderer for job type 'pdf-documnet'")


def test_the_working_folder_lives_as_long_as_the_attempt(run: Callable[..., list[Job]], folder: Path) -> None:
    folders: list[Path] = []

    def uses_it(ctx: RenderContext) -> Iterator[Rendered]:
        assert list(ctx.workdir.iterdir()) == []
        assert stat.S_IMODE(ctx.workdir.stat().st_mode) == 0o700
        folders.append(ctx.workdir)
        for name in ("one", "two"):
            (ctx.workdir / name).write_text(name)
            yield note(ctx.workdir / name)
        (ctx.workdir / "deep" / "er").mkdir(parents=True)

    def fails(ctx: RenderContext) -> Iterator[Rendered]:
        yield from uses_it(ctx)
        raise RuntimeError("late")

    def never_asks(ctx: RenderContext) -> Rendered:
        assert [path for path in folder.rglob("work-*") if path not in folders] == []
        return note()

    assert [job.status for job in run(uses_it, fails, uses_it)] == ["done", "failed", "done"]
    assert len(set(folders)) == 3
    assert [path for path in folders if path.exists()] == []
    assert run(never_asks)[0].status == "done"


def test_open_asset_reads_the_same_companys_assets_only(
    run: Callable[..., list[Job]], engine: sa.Engine, disk: AssetStore
) -> None:
    own, foreign = keep(disk, engine, b"own"), keep(disk, engine, b"foreign", company="beta")
    seen: list[bytes] = []

    def reads(ctx: RenderContext) -> Rendered:
        for spelling in (own.id, str(own.id)):
            with ctx.open_asset(spelling) as file:
                seen.append(file.read())
        return note(ctx.open_asset(own.id))

    def pries(ctx: RenderContext) -> Rendered:
        return note(ctx.open_asset(foreign.id))

    def guesses(ctx: RenderContext) -> Rendered:
        return note(ctx.open_asset("no such id"))

    read, pried, guessed = run(reads, pries, guesses)
    assert (read.status, seen) == ("done", [b"own", b"own"])
    with Session(engine) as session:
        assert disk.open(disk.list_by_job(session, read.id)[0]).read() == b"own"
    assert (pried.status, pried.error_message) == ("failed", f"no asset {foreign.id}")
    assert (guessed.status, guessed.error_message) == ("failed", "no asset no such id")


def test_check_raises_what_interrupted_the_attempt_past_except_exception(disk: AssetStore) -> None:
    reason = jobkit.LeaseLost("the runner stopped")
    claim = Claim(uuid.uuid4(), COMPANY, "note", {}, None, 1, 1)

    def stubborn(ctx: RenderContext) -> Rendered:
        ctx.check()
        attempt.interrupt(reason)
        try:
            ctx.check()
        except Exception:
            return note()
        return note()

    def no_asset(company_id: str, asset_id: object) -> BinaryIO:
        raise jobkit.AssetNotFound(f"no asset {asset_id}")

    renderers = Renderers()
    renderers.register("note")(stubborn)
    attempt = Attempt(
        claim,
        renderers.find("note"),
        RenderEnvironment(disk, LoopThread(), no_asset),
    )
    with pytest.raises(jobkit.LeaseLost) as raised:
        attempt.render()
    assert raised.value is reason


def test_a_writer_takes_nothing_once_its_block_has_ended(run: Callable[..., list[Job]]) -> None:
    def writes_late(ctx: RenderContext) -> None:
        with ctx.writer("a.txt", "text/plain") as out:
            out.write(b"x")
        out.write(b"late")

    (job,) = run(writes_late)
    assert (job.status, "closed" in (job.error_message or "")) == ("failed", True)
