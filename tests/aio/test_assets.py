"""``AsyncAssetStore``: rows in the host's asynchronous transaction, bytes in threads that hold up no loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

import jobkit
from jobkit import AssetCorrupt, AssetEmpty, AssetNotFound, AssetStore, ConfigurationError
from jobkit.aio import AsyncAssetStore, AsyncJobStore
from jobkit.aio.stores import _of_bytes
from jobkit.storage.local import LocalStorage
from tests.support.asynchronous import Lane
from tests.support.files import COMPANY, intents, objects, rows

LARGE = bytes(range(256)) * 20_000
FILE: dict[str, Any] = {"original_filename": "a.txt", "content_type": "text/plain"}


@pytest.fixture
def store(lane: Lane, tmp_path: Path) -> AssetStore:
    return AssetStore(tmp_path / "assets", engine=lane.engine)


@pytest.fixture
def assets(store: AssetStore) -> AsyncAssetStore:
    return AsyncAssetStore(store)


def test_rows_go_with_the_hosts_transaction_and_bytes_with_their_rows(
    lane: Lane, assets: AsyncAssetStore, tmp_path: Path
) -> None:
    async def story() -> None:
        stored = await assets.put_file(COMPANY, **FILE, body=b"first")
        async with AsyncSession(lane.async_engine) as session:
            await assets.create(session, COMPANY, stored, source_task_id=None)
            await session.rollback()
            assert (rows(lane.engine), intents(lane.engine)) == ([], {stored.object_key: "pending"})
            job = await AsyncJobStore(session).create(COMPANY, job_type="note")
            first = await assets.create(session, COMPANY, stored, source_task_id="t", job_id=job.id)
            await session.commit()
            assert (rows(lane.engine), intents(lane.engine)) == ([first], {})
            assert await assets.get_by_id(session, str(first.id), company_id=COMPANY) == first
            assert await assets.get_by_id(session, first.id, company_id="beta") is None
            assert await assets.list_by_job(session, job.id) == [first]
            assert await assets.list_by_company(session, COMPANY, before=first) == []
            assert await assets.list_by_company(session, COMPANY) == [first]
            with pytest.raises(AssetNotFound):
                await assets.create(session, COMPANY, stored, source_task_id=None)
            await session.rollback()
            async with session.begin_nested() as savepoint:
                await assets.delete(session, first)
                await savepoint.rollback()
            assert rows(lane.engine) == [first]
            await assets.delete(session, first)
            await session.commit()
        assert intents(lane.engine) == {stored.object_key: "tombstone"}
        assert (await assets.collect_garbage(older_than=0, dry_run=False)).deleted == 1

    lane.run(story)
    assert objects((tmp_path / "assets").as_uri()) == {}


def test_bytes_are_read_verified_and_streamed_in_ranges(lane: Lane, assets: AsyncAssetStore, tmp_path: Path) -> None:
    async def story() -> None:
        async with assets.writer(COMPANY, **FILE) as out:
            out.write(LARGE)
        assert out.stored is not None
        async with AsyncSession(lane.async_engine) as session, session.begin():
            asset = await assets.create(session, COMPANY, out.stored, source_task_id=None)
        await assets.verify(asset)
        with await assets.open(asset, start=3, end=5) as file:
            assert file.read() == LARGE[3:5]
        assert b"".join([piece async for piece in assets.stream(asset)]) == LARGE
        assert b"".join([piece async for piece in assets.stream(asset, start=7, end=2_000_000)]) == LARGE[7:2_000_000]
        with pytest.raises(jobkit.AssetUrlUnavailable):
            await assets.url(asset, expires_in=60)
        for path in (tmp_path / "assets").rglob("*a.txt"):
            path.write_bytes(b"other")
        with pytest.raises(AssetCorrupt):
            await assets.verify(asset)

    lane.run(story)


@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError])
def test_a_writer_whose_block_raises_stores_nothing(
    lane: Lane, assets: AsyncAssetStore, tmp_path: Path, error: type[BaseException]
) -> None:
    async def story() -> None:
        async with assets.writer(COMPANY, **FILE) as out:
            out.write(b"half")
            raise error

    with pytest.raises(error):
        asyncio.run(story())
    assert (objects((tmp_path / "assets").as_uri()), intents(lane.engine)) == ({}, {})
    assert [path for path in tmp_path.rglob("*") if "a.txt" in path.name] == []


def test_an_empty_file_is_refused_when_the_block_ends(lane: Lane, assets: AsyncAssetStore) -> None:
    async def story() -> None:
        async with assets.writer(COMPANY, **FILE):
            pass

    with pytest.raises(AssetEmpty):
        asyncio.run(story())
    assert intents(lane.engine) == {}


# --- threads


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The first call of a method stops half way: whether it did, and what lets it go on."""
    entered, go = threading.Event(), threading.Event()
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert go.wait(60)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    try:
        yield entered, go
    finally:
        go.set()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0)


@pytest.mark.parametrize("way", ["put_file", "writer"])
def test_the_loop_goes_on_while_a_file_is_stored_and_a_cancelled_task_leaves_it_to_the_sweep(
    lane: Lane, assets: AsyncAssetStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    async def put() -> None:
        if way == "put_file":
            await assets.put_file(COMPANY, **FILE, body=b"content")
        else:
            async with assets.writer(COMPANY, **FILE) as out:
                out.write(b"content")

    async def story() -> None:
        with held(monkeypatch, LocalStorage, "publish") as (entered, go):
            task = asyncio.create_task(put())
            await until(entered.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert objects((tmp_path / "assets").as_uri()) == {}
            go.set()
            await until(lambda: bool(objects((tmp_path / "assets").as_uri())))

    asyncio.run(story())
    [key] = objects((tmp_path / "assets").as_uri())
    assert intents(lane.engine) == {key: "pending"}


def test_a_file_whose_opening_was_cancelled_is_closed(
    lane: Lane, store: AssetStore, assets: AsyncAssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[BinaryIO] = []
    original = AssetStore.open

    def remember(*args: Any, **kwargs: Any) -> BinaryIO:
        opened.append(original(*args, **kwargs))
        return opened[0]

    async def story() -> None:
        stored = await assets.put_file(COMPANY, **FILE, body=b"content")
        async with AsyncSession(lane.async_engine) as session, session.begin():
            asset = await assets.create(session, COMPANY, stored, source_task_id=None)
        with held(monkeypatch, LocalStorage, "open") as (entered, go):
            task = asyncio.create_task(assets.open(asset))
            await until(entered.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go.set()
            await until(lambda: bool(opened) and opened[0].closed)

    monkeypatch.setattr(AsyncAssetStore, "open", _of_bytes(remember))
    lane.run(story)


def test_a_stream_that_is_left_or_cancelled_closes_its_file_after_the_read(
    lane: Lane, assets: AsyncAssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go = threading.Event(), threading.Event()
    files: list[Slow] = []

    class Slow:
        """A file whose second read takes until it is told to end."""

        def __init__(self, file: BinaryIO) -> None:
            self.file, self.reads, self.order = file, 0, list[str]()
            files.append(self)

        def read(self, size: int) -> bytes:
            self.reads += 1
            if self.reads == 2:
                reading.set()
                assert go.wait(60)
            self.order.append("read")
            return self.file.read(size)

        def close(self) -> None:
            self.order.append("close")
            self.file.close()

    original = AssetStore.open
    opened = _of_bytes(lambda store, *args, **kwargs: Slow(original(store, *args, **kwargs)))
    monkeypatch.setattr(AsyncAssetStore, "open", opened)

    async def consume(asset: jobkit.Asset) -> None:
        async for _ in assets.stream(asset):
            pass

    async def story() -> None:
        stored = await assets.put_file(COMPANY, **FILE, body=LARGE)
        async with AsyncSession(lane.async_engine) as session, session.begin():
            asset = await assets.create(session, COMPANY, stored, source_task_id=None)
        async with aclosing(assets.stream(asset)) as pieces:
            await anext(pieces)
        assert files[0].order == ["read", "close"]
        task = asyncio.create_task(consume(asset))
        await until(reading.is_set)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert files[1].order == ["read", "read", "close"]

    lane.run(story)


# --- SQLite's one writer


def test_a_task_that_has_written_is_told_instead_of_waiting_for_itself(lane: Lane, assets: AsyncAssetStore) -> None:
    async def story() -> None:
        async with AsyncSession(lane.async_engine) as session:
            await AsyncJobStore(session).create(COMPANY, job_type="note")
            if lane.driver != "aiosqlite":
                await assets.put_file(COMPANY, **FILE, body=b"content")
                return
            for call in (
                lambda: assets.put_file(COMPANY, **FILE, body=b"content"),
                lambda: assets.collect_garbage(older_than=0, dry_run=False),
                assets.writer(COMPANY, **FILE).__aenter__,
            ):
                with pytest.raises(ConfigurationError, match="before the first write"):
                    await call()
            await session.commit()
            await assets.put_file(COMPANY, **FILE, body=b"content")

    lane.run(story)


def test_another_task_waits_for_the_one_that_has_written(lane: Lane, assets: AsyncAssetStore) -> None:
    async def story() -> None:
        async with AsyncSession(lane.async_engine) as session:
            await AsyncJobStore(session).create(COMPANY, job_type="note")
            putting = asyncio.create_task(assets.put_file(COMPANY, **FILE, body=b"content"))
            await asyncio.sleep(0)
            await session.commit()
            await putting

    lane.run(story)
    assert list(intents(lane.engine).values()) == ["pending"]


def test_a_transaction_that_a_task_left_behind_does_not_count_against_the_next(
    lane: Lane, assets: AsyncAssetStore
) -> None:
    async def write() -> sa.Row[Any] | None:
        async with AsyncSession(lane.async_engine) as session, session.begin():
            await AsyncJobStore(session).create(COMPANY, job_type="note")
        return None

    async def story() -> None:
        await write()
        await assets.put_file(COMPANY, **FILE, body=b"content")
        await asyncio.create_task(write())
        await assets.put_file(COMPANY, **FILE, body=b"content")

    lane.run(story)
