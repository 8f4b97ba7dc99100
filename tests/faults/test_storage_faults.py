"""Every way in which a renderer or a storage fails ends the job with a clear message, and leaves nothing unnamed."""

from __future__ import annotations

import asyncio
import errno
import io
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, RenderContext, Rendered, Runner
from jobkit.assets import spool
from jobkit.tables import asset_intents
from jobkit.testing import Fault, FaultPlan, faulty_filesystem
from tests.support.files import intents, keep, objects, put, rows
from tests.support.runners import only, seen, statuses, until

Create = Callable[..., jobkit.Job]
LIMIT = 4 << 20
AGES_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def spool_here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool folder of this test alone, also for storages that have no folder."""
    for server in ("engine", "moto"):
        if server in request.fixturenames or "storage_url" in request.fixturenames:
            request.getfixturevalue(server)  # first: a server must not start in here
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def spooled(store: AssetStore) -> list[Path]:
    return [path for path in store.spool_folder().rglob("*") if path.is_file()]


def assert_named(engine: sa.Engine, url: str) -> None:
    """Every object has a row, or an intent that names it or what it was to become."""
    named = set(intents(engine)) | {row.object_key for row in rows(engine)}
    assert {key.removesuffix(".part") for key in objects(url)} <= named


def assert_swept_clean(store: AssetStore, engine: sa.Engine, url: str) -> None:
    for _ in range(2):
        store.collect_garbage(older_than=0, dry_run=False, engine=engine)
    live = {row.object_key for row in rows(engine)}
    assert (set(objects(url)), intents(engine)) == (live, {})


# --- renderers


def infinite() -> Iterator[bytes]:
    return itertools.repeat(b"x" * 65_536)


def half() -> Iterator[bytes]:
    yield b"half"
    raise RuntimeError("the source broke half-way")


def text() -> Iterator[Any]:
    yield b"bytes"
    yield "text"


def swallowing(ctx: RenderContext) -> None:
    with ctx.writer("big.bin", "text/plain") as out:
        try:
            out.write(b"x" * (LIMIT + 1))
        except jobkit.AssetTooLarge:
            out.seek(0)
            out.truncate()
            out.write(b"a little")


def swallowing_it_outside(ctx: RenderContext) -> Rendered:
    try:
        with ctx.writer("big.bin", "text/plain") as out:
            out.write(b"x" * (LIMIT + 1))
    except jobkit.AssetError:
        pass
    return note("instead.txt")


def note(name: str = "a.txt", body: Any = b"content") -> Rendered:
    return Rendered(name, "text/plain", body)


def late(ctx: RenderContext) -> Iterator[Rendered]:
    yield note("one.txt")
    yield note("two.txt")
    raise LookupError("too late")


async def late_too(ctx: RenderContext) -> Any:
    yield note("one.txt")
    raise LookupError("too late, asynchronously")


def raising(error: BaseException) -> Callable[[RenderContext], Rendered]:
    def renderer(ctx: RenderContext) -> Rendered:
        raise error

    return renderer


class Mute(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


FAILING: dict[str, tuple[Callable[[RenderContext], Any], str]] = {
    "infinite": (lambda ctx: note("film.mp4", infinite()), f"'film.mp4' is larger than the limit of {LIMIT} bytes"),
    "one byte over": (lambda ctx: note(body=b"x" * (LIMIT + 1)), "'a.txt' is larger than"),
    "second over": (lambda ctx: [note(), note("b.txt", infinite())], "'b.txt' is larger than"),
    "swallowing": (swallowing, "'big.bin' is larger than"),
    "swallowing outside": (swallowing_it_outside, "'big.bin' is larger than"),
    "half-way": (lambda ctx: note(body=half()), "the source broke half-way"),
    "raises": (raising(ValueError("no such slide")), "no such slide"),
    "raises nothing said": (raising(Mute()), "Mute"),
    "exits": (raising(SystemExit(3)), "3"),
    "interrupts": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "out of memory": (raising(MemoryError()), "MemoryError"),
    "cancels": (raising(asyncio.CancelledError()), "CancelledError"),
    "late": (late, "too late"),
    "late, async": (late_too, "too late, asynchronously"),
    "returns None": (lambda ctx: None, "gave no file"),
    "returns no files": (lambda ctx: [], "gave no file"),
    "returns a number": (lambda ctx: 7, "returned int, not Rendered"),
    "returns text": (lambda ctx: "text", "returned str, not Rendered"),
    "returns bytes": (lambda ctx: b"bytes", "returned bytes, not Rendered"),
    "yields text": (lambda ctx: iter(["text"]), "yielded str, not Rendered"),
    "body is text": (lambda ctx: note(body="text"), "body is text"),
    "body yields text": (lambda ctx: note(body=text()), "body yields str, not bytes"),
    "body is a text file": (lambda ctx: note(body=io.StringIO("text")), "returns str, not bytes"),
    "body is a number": (lambda ctx: note(body=7), "body must be bytes, a path"),
    "body is empty": (lambda ctx: note(body=b""), "'a.txt' is empty"),
    "body is no file": (lambda ctx: note(body=Path("/no/such/file")), "/no/such/file"),
    "body is a folder": (lambda ctx: note(body=Path("/")), "directory"),
    "no media type": (lambda ctx: Rendered("a", "nonsense", b"x"), "content_type 'nonsense'"),
}


def test_a_renderer_that_fails_leaves_a_clear_message_and_nothing_else(
    engine: sa.Engine, storage_url: str, create: Create
) -> None:
    store = AssetStore(storage_url, max_bytes=LIMIT)
    runner = Runner(engine, store, only(lambda ctx: FAILING[ctx.input["case"]][0](ctx)))
    jobs = {case: create(input={"case": case}) for case in FAILING}
    fine = create("fine", input={"case": "fine"})
    runner.renderers.register("fine")(lambda ctx: note())
    assert runner.run_until_idle(timeout=60) == len(FAILING) + 1
    for case, (_, message) in FAILING.items():
        job = seen(engine, jobs[case])
        assert (case, job.status, job.result_asset_id) == (case, "failed", None)
        assert message in job.error_message, case
        assert "Traceback" not in job.error_message
    assert seen(engine, fine).status == "done"
    assert [row.job_id for row in rows(engine)] == [fine.id]
    assert intents(engine) == {}  # refused before its key was recorded: nothing to sweep
    assert set(objects(storage_url)) == {rows(engine)[0].object_key}
    assert spooled(store) == []
    assert list(store.spool_folder().iterdir()) == []


# --- storages

PLANNED = "planned fault"
FAULTS: dict[str, tuple[Fault, str]] = {
    "at open": (Fault("put_file", at="before"), PLANNED),
    "at byte 0": (Fault("put_file", at=0), PLANNED),
    "at byte 3": (Fault("put_file", at=3), PLANNED),
    "at close": (Fault("put_file", at="after"), PLANNED),
    "at publish": (Fault("mv", at="before"), PLANNED),
    "after publish": (Fault("mv", at="after"), PLANNED),
    "when asked for the size": (Fault("info"), PLANNED),
    "when it told the size": (Fault("info", at="after"), PLANNED),
    "keeps too little": (Fault("put_file", "cut", at=3), "kept 3 of 7 bytes"),
    "keeps nothing": (Fault("put_file", "cut", at=0), "kept 0 of 7 bytes"),
    "disk full": (Fault("put_file", at=5, error=OSError(errno.ENOSPC, "No space left on device")), "No space left"),
    "time out": (Fault("put_file", error=TimeoutError()), "TimeoutError"),
    "refused": (Fault("put_file", error=PermissionError(errno.EACCES, "Access Denied")), "Access Denied"),
    "loses it": (Fault("info", error=FileNotFoundError("not there")), "not there"),
    "cancelled": (Fault("put_file", at=3, error=asyncio.CancelledError()), "CancelledError"),
    "driver exits": (Fault("mv", at="after", error=SystemExit(1)), "1"),
    "driver's own": (Fault("put_file", at="after", error=Exception("503 Slow Down")), "503 Slow Down"),
}


def test_a_storage_that_fails_fails_the_job_and_what_it_kept_is_named_and_swept(
    engine: sa.Engine, create: Create
) -> None:
    where = str(uuid.uuid4())
    for case, (fault, message) in FAULTS.items():
        with faulty_filesystem(FaultPlan(fault)) as plan:
            store = AssetStore(f"faulty://{where}", provider="faulty")
            job = create()
            Runner(engine, store, only(lambda ctx: note())).run_until_idle(timeout=60)
            assert plan.fired == [fault], case
            found = seen(engine, job)
            assert (case, found.status, found.result_asset_id) == (case, "failed", None)
            assert message in found.error_message, case
            assert rows(engine) == []
            assert list(intents(engine).values()) == ["pending"], case
            assert_named(engine, f"memory://{where}")
            assert spooled(store) == []
            assert_swept_clean(store, engine, f"memory://{where}")


def test_put_file_raises_what_the_storage_raised_and_leaves_the_same(engine: sa.Engine) -> None:
    where = str(uuid.uuid4())
    for case, (fault, message) in FAULTS.items():
        with faulty_filesystem(FaultPlan(fault)):
            store = AssetStore(f"faulty://{where}", engine=engine)
            with pytest.raises(BaseException) as raised:
                put(store)
            assert message in str(raised.value) or message == type(raised.value).__name__, case
            assert_named(engine, f"memory://{where}")
            assert spooled(store) == []
            assert_swept_clean(store, engine, f"memory://{where}")


def test_when_the_second_file_of_a_job_fails_the_first_is_swept_too(engine: sa.Engine, create: Create) -> None:
    where = str(uuid.uuid4())
    with faulty_filesystem(FaultPlan(Fault("put_file", skip=1))):
        store = AssetStore(f"faulty://{where}")
        job = create()
        Runner(engine, store, only(lambda ctx: [note("1"), note("2"), note("3")])).run_until_idle(timeout=60)
        assert seen(engine, job).status == "failed"
        assert len(objects(f"memory://{where}")) == 1
        assert len(intents(engine)) == 3
        assert_named(engine, f"memory://{where}")
        assert spooled(store) == []
        assert_swept_clean(store, engine, f"memory://{where}")


def test_under_random_faults_every_job_ends_and_only_whole_files_have_rows(engine: sa.Engine, create: Create) -> None:
    fired = 0
    for seed in range(3):
        where = str(uuid.uuid4())
        with faulty_filesystem(FaultPlan.seeded(seed, rate=0.25)) as plan:
            store = AssetStore(f"faulty://{where}", provider=f"faulty-{seed}")
            for _ in range(30):
                create()
            runner = Runner(engine, store, only(lambda ctx: note(body=os.urandom(500))))
            assert runner.run_until_idle(timeout=60) == 30
            fired += len(plan.fired)
            for _ in range(30):  # removing fails now and then, too
                store.collect_garbage(older_than=0, dry_run=False)
                with engine.begin() as connection:
                    connection.execute(asset_intents.update().values(not_before=AGES_AGO))
            mine = [row for row in rows(engine) if row.provider == store.provider]
            with faulty_filesystem(FaultPlan()):
                calm = AssetStore(f"faulty://{where}", provider=store.provider)
                for row in mine:
                    calm.verify(row)
            assert set(objects(f"memory://{where}")) == {row.object_key for row in mine}
    assert fired > 10, "the faults hit too little"  # of at least 90 calls, each with a chance of a quarter
    assert set(statuses(engine)) == {"done", "failed"}


def test_a_byte_that_the_storage_changed_is_found_by_verify(engine: sa.Engine) -> None:
    for fault in (Fault("put_file", "flip", at=3), Fault("read", "flip", at=3), Fault("read", "cut", at=3)):
        with faulty_filesystem(FaultPlan(fault)) as plan:
            store = AssetStore(f"faulty://{uuid.uuid4()}", engine=engine)
            asset = keep(store, engine)
            with pytest.raises(jobkit.AssetCorrupt, match=r"another sha256|has 3 bytes"):
                store.verify(asset)
            assert plan.fired == [fault]


def test_a_storage_that_fails_while_it_is_read_says_so(engine: sa.Engine) -> None:
    for fault in (Fault("open"), Fault("read", at=3), Fault("read", error=TimeoutError("read timed out"))):
        with faulty_filesystem(FaultPlan(fault)):
            store = AssetStore(f"faulty://{uuid.uuid4()}", engine=engine)
            asset = keep(store, engine)
            with pytest.raises(OSError, match=r"planned fault|read timed out"), store.open(asset) as file:
                file.read()
            store.verify(asset)  # the next time it answers


def test_an_object_that_cannot_be_removed_stays_recorded_and_goes_later(engine: sa.Engine) -> None:
    where = str(uuid.uuid4())
    with faulty_filesystem(FaultPlan(Fault("rm_file"))):
        store = AssetStore(f"faulty://{where}", engine=engine)
        stored = put(store)
        assert store.collect_garbage(older_than=0, dry_run=False).failed == 1
        assert list(intents(engine)) == [stored.object_key]
        with engine.begin() as connection:
            assert "planned fault" in (connection.scalar(sa.select(asset_intents.c.last_error)) or "")
            connection.execute(asset_intents.update().values(not_before=AGES_AGO))
        assert_swept_clean(store, engine, f"memory://{where}")


@pytest.mark.parametrize("error", [OSError("550 no such file"), FileNotFoundError("gone"), Exception("reply lost")])
def test_an_object_that_is_gone_counts_as_removed_however_the_storage_says_so(
    sqlite_database: Any, error: Exception
) -> None:
    with faulty_filesystem(FaultPlan(Fault("rm_file", at="after", error=error, times=None))):
        store = AssetStore(f"faulty://{uuid.uuid4()}", engine=sqlite_database.engine)
        put(store)
        report = store.collect_garbage(older_than=0, dry_run=False)
        assert (report.failed, report.abandoned) == (0, 1)


# --- the disk of this machine


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_full_disk_fails_the_job_even_when_its_renderer_swallows_the_error(
    engine: sa.Engine, storage_url: str, create: Create, monkeypatch: pytest.MonkeyPatch, swallowed: bool
) -> None:
    def renderer(ctx: RenderContext) -> Rendered | None:
        with ctx.writer("a.bin", "text/plain") as out:
            try:
                out.write(b"x" * 100_000)
            except OSError:
                if not swallowed:
                    raise
        return None

    store, job = AssetStore(storage_url), create()
    # The kernel's own words for a disk that has no room.
    monkeypatch.setattr(spool, "_private", lambda path, flags: os.open("/dev/full", os.O_RDWR))
    Runner(engine, store, only(renderer)).run_until_idle(timeout=60)
    assert seen(engine, job).error_message == "[Errno 28] No space left on device"
    assert (intents(engine), rows(engine), objects(storage_url)) == ({}, [], {})


SMALL_DISK = """
import resource, sys
import sqlalchemy as sa
import jobkit
engine, folder = sa.create_engine(sys.argv[1]), sys.argv[2]
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)
renderers = jobkit.Renderers(
    default=lambda ctx: jobkit.Rendered("a", "text/plain", b"x" * ctx.input["size"]), describe_error=str
)
resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
print(jobkit.Runner(engine, jobkit.AssetStore(folder), renderers).run_until_idle(timeout=60))
"""


def test_a_file_that_the_system_refuses_to_grow_fails_its_job_alone(
    engine: sa.Engine, database: Any, create: Create, tmp_path: Path
) -> None:
    large, small = create(input={"size": 9 << 20}), create(input={"size": 5})
    folder = tmp_path / "assets"
    command = [sys.executable, "-c", SMALL_DISK, database.url, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ran.stdout == "2\n", ran.stderr
    assert (seen(engine, large).status, seen(engine, small).status) == ("failed", "done")
    assert seen(engine, large).error_message == "[Errno 27] File too large"
    assert set(objects(folder.as_uri())) == {row.object_key for row in rows(engine)}
    assert list((folder / ".spool").iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_while_a_file_is_published_leaves_what_an_intent_names(
    engine: sa.Engine, disk: AssetStore, create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    job = create()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        Runner(engine, disk, only(lambda ctx: note())).run_until_idle(timeout=60)
    assert "Input/output error" in seen(engine, job).error_message
    assert_named(engine, (tmp_path / "assets").as_uri())
    assert (rows(engine), spooled(disk)) == ([], [])
    assert_swept_clean(disk, engine, (tmp_path / "assets").as_uri())


def test_a_file_in_the_way_of_a_folder_fails_the_job(
    engine: sa.Engine, disk: AssetStore, create: Create, tmp_path: Path
) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "acme").write_bytes(b"in the way")
    job = create()
    Runner(engine, disk, only(lambda ctx: note())).run_until_idle(timeout=60)
    assert "acme" in seen(engine, job).error_message
    assert (rows(engine), spooled(disk)) == ([], [])


# --- a storage that does not answer


@pytest.mark.parametrize("operation", ["put_file", "info"])
def test_a_storage_that_never_answers_holds_neither_the_other_jobs_nor_stop(
    engine: sa.Engine, create: Create, operation: str
) -> None:
    where, answers = str(uuid.uuid4()), threading.Event()
    fault = Fault(operation, "wait", until=lambda: answers.wait(60), times=2)
    with faulty_filesystem(FaultPlan(fault)) as plan:
        store = AssetStore(f"faulty://{where}")
        runner = Runner(engine, store, only(lambda ctx: note()), poll_interval=0.05, concurrency=2)
        runner.start()
        try:
            stuck = [create(), create()]
            until(lambda: len(plan.fired) == 2)
            others = [create() for _ in range(20)]
            until(lambda: all(seen(engine, job).status == "done" for job in others))
            began = time.monotonic()
            runner.stop(timeout=0.2)
            assert time.monotonic() - began < 30
            assert [seen(engine, job).status for job in stuck] == ["queued", "queued"]
        finally:
            answers.set()
            runner.stop()
        until(lambda: spooled(store) == [])  # both uploads came to their end, and changed nothing
        assert len(rows(engine)) == len(others)
        assert_named(engine, f"memory://{where}")
        assert_swept_clean(store, engine, f"memory://{where}")
