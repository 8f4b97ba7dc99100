"""AssetStore: bytes in a storage, rows in the caller's transaction, and an intent for every object without a row."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import tempfile
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore
from jobkit.tables import content_jobs
from tests.support.files import COMPANY, intents, keep, objects, put, rows


@pytest.fixture(autouse=True)
def spool_here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool folder of this test alone, also for storages that have no folder."""
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine")  # first: a database server must not start in here
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def assert_nothing_left(store: AssetStore, engine: sa.Engine, url: str) -> None:
    assert (objects(url), intents(engine), rows(engine)) == ({}, {}, [])
    assert list(store.spool_folder().iterdir()) == []


# --- putting


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    company=st.text(min_size=1, max_size=255).filter(lambda text: text.strip() and "\0" not in text),
    filename=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), max_size=300),
    namespace=st.text(min_size=1, max_size=255).filter(lambda text: text.strip() and "\0" not in text),
    body=st.binary(min_size=1, max_size=100),
)
@example(company="../x", filename="..", namespace="../..", body=b"x")
@example(company="a/b", filename="/etc/passwd", namespace="/etc", body=b"x")
@example(company="*", filename="a*?[b].txt", namespace="*", body=b"x")
@example(company=".spool", filename="a..png", namespace=".spool", body=b"x")
@example(company="x" * 255, filename="f" * 300, namespace="n" * 255, body=b"x")
@example(company="🏭", filename="日本.png", namespace="é", body=b"x")
def test_whatever_can_be_put_can_be_got_by_its_company_alone(
    assets: AssetStore,
    engine: sa.Engine,
    storage_url: str,
    company: str,
    filename: str | None,
    namespace: str,
    body: bytes,
) -> None:
    other = company + "2" if len(company) < 255 else "2"
    stored = put(assets, body, company, original_filename=filename, namespace=namespace)
    with Session(engine) as session, session.begin():
        with pytest.raises(jobkit.AssetKeyRefused):
            assets.create(session, other, stored, source_task_id=None)
        asset = assets.create(session, company, stored, source_task_id=None)
    with Session(engine) as session:
        assert assets.get_by_id(session, asset.id, company_id=company) == asset
        assert assets.get_by_id(session, asset.id, company_id=other) is None
    assert (asset.company_id, asset.original_filename, asset.byte_size) == (company, filename, len(body))
    assert assets.open(asset).read() == body
    assets.verify(asset)
    assert objects(storage_url)[asset.object_key] == body
    stolen = dataclasses.replace(asset, company_id=other)
    for use in (assets.open, assets.verify):
        with pytest.raises(jobkit.AssetKeyRefused, match="does not belong"):
            use(stolen)


@pytest.mark.parametrize("company", [17, uuid.UUID(int=5), "17 "], ids=repr)
def test_a_company_is_its_string(assets: AssetStore, engine: sa.Engine, company: object) -> None:
    asset = keep(assets, engine, company=company)
    assert asset.company_id == str(company)
    with Session(engine) as session:
        assert assets.list_by_company(session, company) == [asset]
        assert assets.get_by_id(session, asset.id, company_id=str(company)) == asset


IMPOSSIBLE: list[Any] = [None, "", "  ", "a\0b", "\ud800", "x" * 256]


def test_an_impossible_company_is_refused_on_the_way_in_and_not_found_on_the_way_out(
    assets: AssetStore, engine: sa.Engine, storage_url: str
) -> None:
    for company in IMPOSSIBLE:
        with pytest.raises(ValueError, match="company_id"):
            put(assets, company=company)
    assert_nothing_left(assets, engine, storage_url)
    asset = keep(assets, engine)
    with Session(engine) as session:
        for company in (None, "", "  "):
            with pytest.raises(ValueError, match=r"company_id is (missing|blank)"):
                assets.list_by_company(session, company)  # type: ignore[arg-type]
        for company in [company for company in IMPOSSIBLE if company and company.strip()]:
            assert assets.list_by_company(session, company) == []
            assert assets.get_by_id(session, asset.id, company_id=company) is None
            with pytest.raises(jobkit.AssetNotFound):
                assets.delete(session, dataclasses.replace(asset, company_id=company))


def broken() -> Iterator[bytes]:
    yield b"x" * 1_000
    raise RuntimeError("the source broke")


BROKEN: list[tuple[Callable[[], Any], type[Exception]]] = [
    (lambda: b"", jobkit.AssetEmpty),
    (lambda: (b"x" * 999 for _ in itertools.count()), jobkit.AssetTooLarge),
    (lambda: b"x" * 10_001, jobkit.AssetTooLarge),
    (broken, RuntimeError),
    (lambda: "text", TypeError),
    (lambda: iter([b"x", "text"]), TypeError),
    (lambda: io.StringIO("text"), TypeError),
    (lambda: Path("/does/not/exist"), FileNotFoundError),
    (lambda: None, TypeError),
]


def test_a_body_that_fails_leaves_nothing(engine: sa.Engine, storage_url: str) -> None:
    store = AssetStore(storage_url, engine=engine, max_bytes=10_000)
    for body, error in BROKEN:
        with pytest.raises(error):
            put(store, body())
        assert_nothing_left(store, engine, storage_url)


def test_exactly_the_limit_is_stored_and_the_error_says_whose_limit_it_was(engine: sa.Engine, storage_url: str) -> None:
    store = AssetStore(storage_url, engine=engine, max_bytes=10)
    assert put(store, b"x" * 10).byte_size == 10
    with pytest.raises(jobkit.AssetTooLarge, match=r"'a\.txt' .* 10 bytes \(AssetStore\(max_bytes=\)\)"):
        put(store, b"x" * 11)
    assert len(objects(storage_url)) == 1


@pytest.mark.parametrize("max_bytes", [0, -1, True, 1.5, "10"])
def test_a_limit_that_is_not_a_count_is_refused(tmp_path: Path, max_bytes: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        AssetStore(tmp_path, max_bytes=max_bytes)


def test_the_key_is_recorded_in_a_commit_of_its_own_before_the_object_exists(
    assets: AssetStore, engine: sa.Engine, storage_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    publish = assets.storage.publish

    def watched(uploads: Any) -> Any:
        seen.append((intents(engine), dict(objects(storage_url))))
        return publish(uploads)

    monkeypatch.setattr(assets.storage, "publish", watched)
    stored = put(assets)
    assert seen == [({stored.object_key: "pending"}, {})]
    assert list(objects(storage_url)) == [stored.object_key]


@pytest.mark.parametrize("reached", [False, True])
def test_a_storage_that_fails_leaves_only_what_an_intent_names(
    assets: AssetStore, engine: sa.Engine, storage_url: str, monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    publish = assets.storage.publish

    def failing(*arguments: Any) -> None:
        if reached:
            publish(*arguments)
        raise OSError("the answer was lost")

    monkeypatch.setattr(assets.storage, "publish", failing)
    with pytest.raises(OSError, match="lost"):
        put(assets)
    assert list(intents(engine).values()) == ["pending"]
    assert set(objects(storage_url)) == (set(intents(engine)) if reached else set())
    assert list(assets.spool_folder().iterdir()) == []


def test_the_writer_stores_when_its_block_ends(assets: AssetStore, storage_url: str) -> None:
    with assets.writer(COMPANY, original_filename="a.csv", content_type="text/csv") as out:
        out.write(b"a,b\n")
        out.write(b"1,2\n")
        assert out.stored is None
        assert objects(storage_url) == {}
    assert out.stored is not None
    assert objects(storage_url) == {out.stored.object_key: b"a,b\n1,2\n"}


def test_a_writer_whose_block_raises_or_went_over_the_limit_stores_nothing(engine: sa.Engine, storage_url: str) -> None:
    store = AssetStore(storage_url, engine=engine, max_bytes=10)

    def write(chunk: bytes, error: type[Exception] | None) -> None:
        with store.writer(COMPANY, original_filename="a", content_type="text/csv") as out:
            try:
                out.write(chunk)
            except jobkit.AssetTooLarge:
                out.seek(0)
                out.truncate()
            if error:
                raise error("half-way")

    for chunk, error in [(b"x" * 5, RuntimeError), (b"x" * 5, StopIteration), (b"", None), (b"x" * 11, None)]:
        with pytest.raises(error or jobkit.AssetError):
            write(chunk, error)
        assert_nothing_left(store, engine, storage_url)


def test_a_large_file_is_stored_and_read_with_flat_memory(disk: AssetStore, engine: sa.Engine) -> None:
    tracemalloc.start()
    try:
        asset = keep(disk, engine, (b"x" * (1 << 20) for _ in range(64)))
        disk.verify(asset)
        with disk.open(asset) as file:
            assert sum(len(piece) for piece in iter(lambda: file.read(100_000), b"")) == 64 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("how", ["put_file", "the block of writer"])
def test_put_file_inside_a_transaction_that_has_written(assets: AssetStore, session: Session, how: str) -> None:
    read: list[bytes] = []

    def body() -> Iterator[bytes]:
        read.append(b"x")
        yield b"x"

    def act() -> None:
        if how == "put_file":
            jobkit.JobStore(session).create(COMPANY, job_type="note")
            put(assets, body())
        else:
            with assets.writer(COMPANY, original_filename="a", content_type="text/csv") as out:
                out.write(b"x")
                jobkit.JobStore(session).create(COMPANY, job_type="note")

    if session.get_bind().dialect.name == "sqlite":
        with pytest.raises(jobkit.ConfigurationError, match="call put_file before the first write"):
            act()
        assert read == []  # refused before anything was done
        session.rollback()
        put(assets)
    else:
        act()
    assert list(assets.spool_folder().iterdir()) == []


def test_put_file_inside_a_transaction_that_has_only_read(assets: AssetStore, session: Session) -> None:
    session.execute(sa.select(content_jobs)).all()
    stored = put(assets)
    assets.create(session, COMPANY, stored, source_task_id=None)
    session.commit()


def test_a_store_without_an_engine_works_and_says_once_what_it_lacks(
    engine: sa.Engine, storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = AssetStore(storage_url)
    with caplog.at_level(logging.WARNING, logger="jobkit"):
        assets = [keep(store, engine, bytes([65 + i])) for i in range(3)]
    assert [record.getMessage() for record in caplog.records] == [
        f"{store!r} has no engine: objects that a dying process leaves without a row are never removed"
    ]
    assert [store.open(asset).read() for asset in assets] == [b"A", b"B", b"C"]


def test_an_sqlite_engine_that_would_lose_guarantees_is_refused(tmp_path: Path) -> None:
    bare = sa.create_engine(f"sqlite:///{tmp_path}/bare.db")
    with pytest.raises(jobkit.ConfigurationError, match="configure_sqlite"):
        AssetStore(tmp_path, engine=bare)
    bare.dispose()


@pytest.mark.parametrize(
    "engine", ["sqlite:///app.db", create_async_engine("postgresql+psycopg://nowhere/x")], ids=type
)
def test_what_is_no_engine_is_refused(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(jobkit.ConfigurationError, match=f"needs a synchronous Engine, not {type(engine).__name__}"):
        AssetStore(tmp_path, engine=engine)


def test_the_injected_clock_dates_the_key_and_the_row(engine: sa.Engine, storage_url: str) -> None:
    at = datetime(2025, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    store = AssetStore(storage_url, engine=engine, clock=lambda: at)
    asset = keep(store, engine)
    assert asset.object_key.startswith("acme/generated/2025/12/31/")
    assert rows(engine)[0].created_at == rows(engine)[0].updated_at == at
