"""Each attempt has a context of its own, within the host's context manager, however it is made."""

from __future__ import annotations

import contextlib
import decimal
import logging
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Discard, JobStore, RenderContext, Rendered, Renderers, Retry, Runner, UserError
from jobkit.testing import inline
from tests.support import shared as module_database
from tests.support.runners import seen

shared, database = module_database.shared, module_database.database
tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Rooms:
    """Renderers that leave their company behind, and remember whose they found."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def plain(self, ctx: RenderContext) -> Rendered:
        self.found.append(tenant.get())
        tenant.set(ctx.company_id)
        decimal.getcontext().prec = 3
        return Rendered("a.txt", "text/plain", b"x")

    def lazily(self, ctx: RenderContext) -> Iterator[Rendered]:
        yield self.plain(ctx)
        assert tenant.get() == ctx.company_id

    def fails(self, ctx: RenderContext) -> None:
        self.plain(ctx)
        raise UserError("no")

    async def later(self, ctx: RenderContext) -> Rendered:
        return self.plain(ctx)

    async def streams(self, ctx: RenderContext) -> AsyncIterator[Rendered]:
        yield self.plain(ctx)

    def parses(self, value: dict[str, Any]) -> dict[str, Any]:
        self.found.append(tenant.get())
        tenant.set("parser")
        return value


KINDS = ["plain", "lazily", "fails", "later", "streams"]


@pytest.mark.parametrize("started", [True, False], ids=["threads", "until idle"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_attempt_sees_what_another_one_set(engine: sa.Engine, disk: AssetStore, kind: str, started: bool) -> None:
    rooms = Rooms()
    runner = Runner(engine, disk, Renderers(default=getattr(rooms, kind)), concurrency=1)
    with runner if started else contextlib.nullcontext():
        for company in ("acme", "globex", "acme", "initech"):
            runner.submit(company, job_type="note")
        runner.run_until_idle(timeout=60)
    assert rooms.found == ["nobody"] * 4


def test_a_check_of_the_input_is_within_the_attempt(engine: sa.Engine, disk: AssetStore) -> None:
    rooms, renderers = Rooms(), Renderers()
    renderers.register("note", input=rooms.parses)(rooms.plain)
    runner = Runner(engine, disk, renderers, concurrency=1)
    for _ in range(2):
        runner.submit("acme", job_type="note")
    runner.run_until_idle(timeout=60)
    assert rooms.found == ["nobody", "parser"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_nor_in_the_thread_of_a_test_or_script(session: Session, disk: AssetStore, kind: str) -> None:
    rooms = Rooms()
    token, precision = tenant.set("the caller's"), decimal.getcontext().prec
    try:
        for company in ("acme", "globex"):
            JobStore(session).create(company, job_type="note")
        inline(session, disk, Renderers(default=getattr(rooms, kind)))
        with contextlib.suppress(UserError):
            Renderers(default=getattr(rooms, kind)).render("note")
        assert (tenant.get(), decimal.getcontext().prec) == ("the caller's", precision)
    finally:
        tenant.reset(token)
    assert rooms.found == ["nobody"] * 3


# --- around


class Around:
    """A host's manager: sets its tenant, and notes what it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def __call__(self, ctx: RenderContext) -> Iterator[None]:
        tenant.set(f"{ctx.company_id}'s app")
        self.seen.append((ctx.job_id, ctx.company_id, ctx.job_type, ctx.attempt))
        try:
            yield
        except BaseException as error:
            self.seen.append((type(error).__name__,))
            raise
        else:
            self.seen.append(("done",))


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_surrounds_every_attempt_and_sees_how_it_ends(engine: sa.Engine, disk: AssetStore, kind: str) -> None:
    rooms, around = Rooms(), Around()
    runner = Runner(engine, disk, Renderers(default=getattr(rooms, kind), around=around))
    job = runner.submit("acme", job_type="note")
    runner.run_until_idle(timeout=60)
    assert around.seen == [(job.id, "acme", "note", 1), ("UserError" if kind == "fails" else "done",)]
    assert rooms.found == ["acme's app"]


def test_it_surrounds_inline_and_render_too(session: Session, disk: AssetStore) -> None:
    rooms, around = Rooms(), Around()
    renderers = Renderers(default=rooms.plain, around=around)
    job = JobStore(session).create("acme", job_type="note")
    inline(session, disk, renderers)
    renderers.render("note")
    assert around.seen[:2] == [(job.id, "acme", "note", 1), ("done",)]
    assert rooms.found == ["acme's app", "render's app"]


@pytest.mark.parametrize(
    ("error", "status"), [(Retry(3600), "queued"), (Discard("no"), "failed"), (jobkit.Snooze(3600), "queued")], ids=repr
)
def test_it_sees_what_a_renderer_asks_for(engine: sa.Engine, disk: AssetStore, error: Exception, status: str) -> None:
    def asks(ctx: RenderContext) -> None:
        raise error

    around, renderers = Around(), Renderers()
    renderers.around = around
    renderers.register("note", max_attempts=2)(asks)
    runner = Runner(engine, disk, renderers)
    job = runner.submit("acme", job_type="note")
    runner.run_until_idle(timeout=60)
    assert around.seen[1:] == [(type(error).__name__,)]
    assert seen(engine, job).status == status


def test_it_cannot_make_a_failure_a_success(engine: sa.Engine, disk: AssetStore) -> None:
    @contextlib.contextmanager
    def swallows(ctx: RenderContext) -> Iterator[None]:
        with contextlib.suppress(BaseException):
            yield

    runner = Runner(engine, disk, Renderers(default=Rooms().fails, around=swallows))
    job = runner.submit("acme", job_type="note")
    runner.run_until_idle(timeout=60)
    assert (seen(engine, job).status, seen(engine, job).error_message) == ("failed", "no")


@pytest.mark.parametrize("when", ["call", "enter", "exit"])
def test_what_it_raises_fails_the_attempt_and_leaves_no_file(
    engine: sa.Engine, disk: AssetStore, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Manager:
        def __enter__(self) -> None:
            if when == "enter":
                raise UserError("not in")

        def __exit__(self, *_: object) -> None:
            if when == "exit":
                raise UserError("not out")

    def around(ctx: RenderContext) -> Manager:
        if when == "call":
            raise UserError("not at all")
        return Manager()

    runner = Runner(engine, disk, Renderers(default=Rooms().plain, around=around))
    with caplog.at_level(logging.CRITICAL, "jobkit"):
        job = runner.submit("acme", job_type="note")
        runner.run_until_idle(timeout=60)
    row = seen(engine, job)
    assert (row.status, row.error_message.startswith("not ")) == ("failed", True)
    with engine.connect() as connection:
        assert disk.list_by_job(connection, job.id, company_id="acme") == []
    assert list(disk.spool_folder().iterdir()) == []


def test_it_must_be_a_function() -> None:
    with pytest.raises(TypeError, match=r"^around must be a function, not str$"):
        Renderers(around="app")  # type: ignore[arg-type]
