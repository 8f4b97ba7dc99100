"""Asset rows live and go with the caller's transaction; an object is read only as its row says."""

from __future__ import annotations

import dataclasses
import io
import os
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy.orm import Session

import jobkit
from jobkit import Asset, AssetStore
from jobkit.tables import asset_intents
from jobkit.tables import assets as assets_table
from tests.support.files import COMPANY, intents, keep, objects, put, rows
from tests.support.s3 import environment, server_of


def undone(session: Session, change: Callable[[], object], *, nested: bool) -> None:
    """Make a change and roll it back: with its transaction, or alone, and commit what is left of that."""
    savepoint = session.begin_nested() if nested else None
    change()
    if savepoint:
        savepoint.rollback()
        session.commit()
    session.rollback()


def overwrite(url: str, asset: Asset, content: bytes | None) -> None:
    """Change an object behind the store's back; None removes it."""
    if url.startswith("memory"):
        path = f"/{url.removeprefix('memory://')}/{asset.object_key}"
        MemoryFileSystem.store.pop(path)
        if content is not None:
            MemoryFileSystem().pipe_file(path, content)
        return
    if url.startswith("s3"):
        server, prefix = server_of(url)
        server.overwrite(prefix + asset.object_key, content)
        return
    file = Path(url.removeprefix("file://")) / asset.object_key
    file.unlink() if content is None else file.write_bytes(content)


# --- create


def test_create_trades_the_intent_for_a_row_in_the_callers_transaction(
    assets: AssetStore, engine: sa.Engine, session: Session
) -> None:
    stored = put(assets)
    for nested in (False, True):
        undone(session, lambda: assets.create(session, COMPANY, stored, source_task_id=None), nested=nested)
        assert (rows(engine), intents(engine)) == ([], {stored.object_key: "pending"})
    asset = assets.create(session, COMPANY, stored, source_task_id=None)
    session.commit()
    assert (rows(engine), intents(engine)) == ([asset], {})


def test_an_object_gets_one_row_only(engine: sa.Engine, storage_url: str, session: Session) -> None:
    for store in (AssetStore(storage_url, engine=engine), AssetStore(storage_url)):
        stored = put(store)
        first = store.create(session, COMPANY, stored, source_task_id=None)
        session.commit()
        with pytest.raises(jobkit.AssetNotFound, match="has a row"):
            store.create(session, COMPANY, stored, source_task_id=None)
        session.commit()
        assert rows(engine)[-1] == first
        assert store.open(first).read() == b"content"


def test_an_object_that_the_sweep_took_gets_no_row(assets: AssetStore, engine: sa.Engine, session: Session) -> None:
    stored = put(assets)
    with engine.begin() as sweep:
        sweep.execute(asset_intents.update().values(state="collected"))
    with pytest.raises(jobkit.AssetNotFound, match="store the file again"):
        assets.create(session, COMPANY, stored, source_task_id=None)
    assert rows(engine) == []


def test_another_companys_object_is_refused_and_stays_theirs(
    assets: AssetStore, engine: sa.Engine, session: Session
) -> None:
    stored = put(assets)
    for thief in ("beta", "acme2", "Acme", "acm", "*", "acme/generated"):
        with pytest.raises(jobkit.AssetKeyRefused, match="does not belong"):
            assets.create(session, thief, stored, source_task_id=None)
    session.commit()
    assert intents(engine) == {stored.object_key: "pending"}
    assert assets.create(session, COMPANY, stored, source_task_id=None).company_id == COMPANY


def test_a_row_says_what_was_stored_and_by_whom(assets: AssetStore, engine: sa.Engine) -> None:
    agent, job_id = uuid.uuid4(), uuid.uuid4()
    before = datetime.now(UTC)
    asset = keep(
        assets,
        engine,
        source_task_id="task-1",
        created_by_agent_id=agent,
        created_by_user_id=17,
        job_id=str(job_id),
        position=3,
    )
    assert rows(engine) == [asset]
    assert (asset.provider, asset.content_type, asset.original_filename) == (assets.provider, "text/plain", "a.txt")
    assert (asset.byte_size, len(asset.sha256)) == (7, 64)
    assert (asset.source_task_id, asset.created_by_agent_id, asset.created_by_user_id) == ("task-1", str(agent), "17")
    assert (asset.job_id, asset.position) == (job_id, 3)
    assert before <= asset.created_at == asset.updated_at <= datetime.now(UTC)
    assert isinstance(asset.id, uuid.UUID)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"source_task_id": "a\0"}, ValueError),
        ({"source_task_id": 7}, TypeError),
        ({"created_by_agent_id": "a\0"}, ValueError),
        ({"created_by_user_id": "\ud800"}, ValueError),
        ({"job_id": "not a uuid"}, ValueError),
    ],
)
def test_what_a_row_cannot_hold_is_refused_by_name_and_costs_nothing(
    disk: AssetStore, engine: sa.Engine, session: Session, change: dict[str, Any], error: type[Exception]
) -> None:
    stored = put(disk)
    with pytest.raises(error, match=next(iter(change))):
        disk.create(session, COMPANY, stored, **{"source_task_id": None, **change})
    session.commit()
    assert intents(engine) == {stored.object_key: "pending"}


def test_the_source_task_has_to_be_said(disk: AssetStore, session: Session) -> None:
    with pytest.raises(TypeError, match="source_task_id"):
        disk.create(session, COMPANY, put(disk))  # type: ignore[call-arg]


# --- finding


def test_an_asset_is_found_by_its_id_and_company(disk: AssetStore, engine: sa.Engine, session: Session) -> None:
    asset = keep(disk, engine)
    for spelling in (asset.id, str(asset.id), asset.id.hex, str(asset.id).upper()):
        assert disk.get_by_id(session, spelling) == disk.get_by_id(session, spelling, company_id=COMPANY) == asset
    for unknown in (uuid.uuid4(), "", "x", "a\0", "\ud800", None, 7):
        assert disk.get_by_id(session, unknown) is None  # type: ignore[arg-type]
        assert disk.list_by_job(session, unknown) == []  # type: ignore[arg-type]
    assert disk.get_by_id(session, asset.id, company_id="beta") is None
    with engine.connect() as connection:
        assert disk.get_by_id(connection, asset.id) == asset


def test_an_id_that_is_spelled_with_dashes_in_an_sqlite_table_is_found_and_deleted(
    sqlite_database: Any, tmp_path: Path
) -> None:
    store = AssetStore(tmp_path / "assets", engine=sqlite_database.engine)
    asset = keep(store, sqlite_database.engine)
    with Session(sqlite_database.engine) as session:
        session.execute(sa.text("UPDATE assets SET id = :id"), {"id": str(asset.id)})
        assert store.get_by_id(session, asset.id) == asset
        store.delete(session, asset)
        assert store.get_by_id(session, asset.id) is None


def test_the_files_of_a_job_come_in_its_order(disk: AssetStore, engine: sa.Engine, session: Session) -> None:
    job_id = uuid.uuid4()
    made = [keep(disk, engine, job_id=job_id, position=position) for position in (2, 0, 1)]
    keep(disk, engine, job_id=uuid.uuid4())
    assert disk.list_by_job(session, str(job_id)) == [made[1], made[2], made[0]]
    assert disk.list_by_job(session, job_id, company_id="beta") == []


def test_a_companys_assets_come_newest_first_in_pages(engine: sa.Engine, tmp_path: Path, session: Session) -> None:
    ticks = iter(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n // 4) for n in range(100))
    store = AssetStore(tmp_path / "assets", engine=engine, clock=lambda: next(ticks))
    made = [keep(store, engine) for _ in range(7)][::-1]
    keep(store, engine, company="beta")
    assert store.list_by_company(session, COMPANY) == made
    # The two oldest are of one time; the one that was inserted first gets the greater id, and so comes first of them.
    assert made[-1].created_at == made[-2].created_at
    greater = dataclasses.replace(made[-1], id=uuid.UUID(int=(1 << 128) - 1))
    with engine.begin() as connection:
        connection.execute(assets_table.update().where(assets_table.c.id == made[-1].id).values(id=greater.id))
    made[-2:] = [greater, made[-2]]
    pages, last = [], None
    while page := store.list_by_company(session, COMPANY, limit=3, before=last):
        pages.append(page)
        last = page[-1] if len(pages) % 2 else str(page[-1].id)  # type: ignore[assignment]
    assert [asset for page in pages for asset in page] == made
    assert [len(page) for page in pages] == [3, 3, 1]
    assert store.list_by_company(session, COMPANY, limit=0) == []
    other = store.list_by_company(session, "beta")[0]
    for foreign in (other.id, other, uuid.uuid4(), "x"):
        with pytest.raises(jobkit.AssetNotFound, match=str(other.id if foreign is other else foreign)):
            store.list_by_company(session, COMPANY, before=foreign)
    for limit in (-1, True, "3"):
        with pytest.raises(ValueError, match="limit"):
            store.list_by_company(session, COMPANY, limit=limit)  # type: ignore[arg-type]


# --- reading


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, b"0123456789"),
        (3, None, b"3456789"),
        (None, 3, b"012"),
        (3, 5, b"34"),
        (0, 10, b"0123456789"),
        (8, 99, b"89"),
        (10, 20, b""),
        (99, None, b""),
        (5, 5, b""),
        (7, 3, b""),
    ],
)
def test_a_range_is_cut_to_the_asset(
    sqlite_database: Any, storage_url: str, start: int | None, end: int | None, expected: bytes
) -> None:
    store = AssetStore(storage_url, engine=sqlite_database.engine)
    asset = keep(store, sqlite_database.engine, b"0123456789")
    with store.open(asset, start=start, end=end) as file:
        assert isinstance(file, io.BufferedIOBase)
        assert file.read() == expected
        assert file.seek(0) == 0
        assert b"".join(iter(lambda: file.read(1), b"")) == expected


@pytest.mark.parametrize("range_", [{"start": 1.0}, {"end": "3"}, {"start": True}, {"end": float("nan")}])
def test_a_range_that_is_not_in_bytes_is_refused_by_name(
    disk: AssetStore, engine: sa.Engine, range_: dict[str, Any]
) -> None:
    asset = keep(disk, engine)
    with pytest.raises(TypeError, match=f"{next(iter(range_))} must be a number of bytes, not "):
        disk.open(asset, **range_)


@pytest.mark.parametrize("not_one", [None, uuid.UUID(int=5), "x", {}])
def test_an_id_where_an_asset_belongs_is_said(disk: AssetStore, session: Session, not_one: Any) -> None:
    for use in (
        lambda: disk.open(not_one),
        lambda: disk.verify(not_one),
        lambda: disk.url(not_one, expires_in=60),
        lambda: disk.delete(session, not_one),
    ):
        with pytest.raises(TypeError, match=f"asset must be an Asset, not {type(not_one).__name__}"):
            use()


@pytest.mark.parametrize("range_", [{"start": -1}, {"end": -1}, {"start": -5, "end": 3}])
def test_a_negative_range_is_refused(disk: AssetStore, engine: sa.Engine, range_: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        disk.open(keep(disk, engine), **range_)


def test_two_opened_files_are_independent(assets: AssetStore, engine: sa.Engine) -> None:
    content = os.urandom(300_000)  # more than a buffer holds
    asset = keep(assets, engine, content)
    with assets.open(asset) as one, assets.open(asset, start=100_000) as two:
        assert (one.read(2), two.read(2)) == (content[:2], content[100_000:100_002])
        assert one.read(150_000) == content[2:150_002]
        assert two.read(150_000) == content[100_002:250_002]
        assert one.read() == content[150_002:]
        one.close()
        two.seek(0)
        assert two.read() == content[100_000:]


def test_closing_releases_the_descriptor(disk: AssetStore, engine: sa.Engine) -> None:
    asset = keep(disk, engine)
    before = len(os.listdir("/proc/self/fd"))
    opened = [disk.open(asset) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    for file in opened:
        file.close()
    disk.verify(asset)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no object in storage"),
        (b"conten", "has 6 bytes in storage, its row says 7"),
        (b"", "has 0 bytes"),
        (b"content+", "has 8 bytes"),
        (b"CONTENT", "another sha256"),
    ],
    ids=["missing", "truncated", "emptied", "grown", "altered"],
)
def test_verify_finds_out_what_is_wrong_with_an_object(
    sqlite_database: Any, storage_url: str, content: bytes | None, message: str
) -> None:
    store = AssetStore(storage_url, engine=sqlite_database.engine)
    asset = keep(store, sqlite_database.engine)
    store.verify(asset)
    overwrite(storage_url, asset, content)
    with pytest.raises(jobkit.AssetCorrupt, match=f"asset {asset.id} .*{message}"):
        store.verify(asset)
    if content is None:
        with pytest.raises(jobkit.AssetCorrupt, match=message):
            store.open(asset)
    elif content == b"content+":
        assert store.open(asset).read() == store.open(asset, end=99).read() == b"content"


def test_a_folder_or_a_file_in_the_way_counts_as_a_missing_object(
    disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    asset = keep(disk, engine)
    file = tmp_path / "assets" / asset.object_key
    file.unlink()
    file.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(jobkit.AssetCorrupt, match="has no object"):
        disk.open(asset)
    assert len(os.listdir("/proc/self/fd")) == before
    file.rmdir()
    file.parent.rmdir()
    file.parent.write_bytes(b"in the way")
    with pytest.raises(jobkit.AssetCorrupt, match="has no object"):
        disk.open(asset)
    disk.storage.remove(asset.object_key)  # nothing is there to be removed


def test_an_object_that_goes_while_it_is_verified_is_missing(sqlite_database: Any, moto: Any, monkeypatch: Any) -> None:
    for name, value in environment(moto).items():
        monkeypatch.setenv(name, value)
    url = f"s3://{moto.bucket}/{uuid.uuid4()}"
    store = AssetStore(url, engine=sqlite_database.engine)
    asset = keep(store, sqlite_database.engine)
    opened = store.storage.open(asset.object_key)
    moto.overwrite(f"{url.rpartition('/')[2]}/{asset.object_key}", None)
    monkeypatch.setattr(store.storage, "open", lambda key: opened)
    with pytest.raises(jobkit.AssetCorrupt, match="has no object"):
        store.verify(asset)


def test_a_store_reads_only_what_its_provider_holds(engine: sa.Engine, tmp_path: Path, session: Session) -> None:
    stores = {
        "local_disk": AssetStore(tmp_path / "one", engine=engine),
        "memory": AssetStore(f"memory://{uuid.uuid4()}", engine=engine),
        "archive": AssetStore(tmp_path / "two", engine=engine, provider="archive"),
    }
    for name, store in stores.items():
        asset = keep(store, engine, name.encode())
        assert (store.provider, asset.provider, store.open(asset).read()) == (name, name, name.encode())
        for other in stores.values():
            if other is not store:
                with pytest.raises(jobkit.AssetError, match=f"{asset.id} is in storage '{name}', this store is"):
                    other.open(asset)
    twin = AssetStore(tmp_path / "elsewhere", engine=engine)
    with pytest.raises(jobkit.AssetCorrupt, match="has no object in storage 'local_disk'"):
        twin.open(keep(stores["local_disk"], engine))
    for bad in ("", " ", "a\0", "x" * 256):
        with pytest.raises(ValueError, match="provider"):
            AssetStore(tmp_path, provider=bad)


# --- deleting


def test_delete_trades_the_row_for_a_tombstone_and_leaves_the_object(
    assets: AssetStore, engine: sa.Engine, session: Session, storage_url: str
) -> None:
    asset, other = keep(assets, engine), keep(assets, engine)
    for nested in (False, True):
        undone(session, lambda: assets.delete(session, asset), nested=nested)
        assert (rows(engine), intents(engine)) == ([asset, other], {})
    assets.delete(session, asset)
    session.commit()
    assert (rows(engine), intents(engine)) == ([other], {asset.object_key: "tombstone"})
    assert set(objects(storage_url)) == {asset.object_key, other.object_key}
    with pytest.raises(jobkit.AssetNotFound, match=str(asset.id)):
        assets.delete(session, asset)
    session.commit()
    assert intents(engine) == {asset.object_key: "tombstone"}


@pytest.mark.parametrize("change", [{"company_id": "beta"}, {"id": uuid.uuid4()}], ids=["company", "id"])
def test_an_asset_that_is_not_the_rows_deletes_nothing(
    disk: AssetStore, engine: sa.Engine, session: Session, change: dict[str, Any]
) -> None:
    asset = keep(disk, engine)
    with pytest.raises(jobkit.AssetNotFound):
        disk.delete(session, dataclasses.replace(asset, **change))
    session.commit()
    assert (rows(engine), intents(engine)) == ([asset], {})


def test_what_is_deleted_is_what_the_row_names_whatever_the_caller_says(
    disk: AssetStore, engine: sa.Engine, session: Session
) -> None:
    asset, victim = keep(disk, engine), keep(disk, engine)
    disk.delete(session, dataclasses.replace(asset, object_key=victim.object_key, provider="other"))
    session.commit()
    assert (rows(engine), intents(engine)) == ([victim], {asset.object_key: "tombstone"})
    with engine.connect() as connection:
        assert connection.scalar(sa.select(asset_intents.c.provider)) == "local_disk"


def test_a_row_with_an_absurd_key_is_not_followed(disk: AssetStore, engine: sa.Engine, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    asset = keep(disk, engine)
    for key in ("../secret", "acme/../../secret", "/etc/passwd", f"acme/{'x' * 2_000}", "acme\\secret", "acme/*"):
        with engine.begin() as connection:
            connection.execute(assets_table.update().values(object_key=key))
        for use in (disk.open, disk.verify):
            with pytest.raises(jobkit.AssetKeyRefused):
                use(dataclasses.replace(asset, object_key=key))
