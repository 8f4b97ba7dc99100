"""The suite for a storage: its URL, with the driver, options and server behind it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import migrations
from jobkit.assets.store import AssetStore
from jobkit.db.sqlite import configure_sqlite
from jobkit.errors import AssetCorrupt, AssetEmpty, AssetKeyRefused, AssetTooLarge, AssetUrlUnavailable
from jobkit.jobs.store import JobStore
from jobkit.rendering.renderers import Renderers
from jobkit.runner.runner import Runner
from jobkit.tables import asset_intents
from jobkit.types import Asset, JobStatus, Rendered, StoredObject

Location = tuple[str, Mapping[str, Any]]
Keep = Callable[..., Asset]

COMPANY = "acme"
NAMES = ["x[1].bin", "*", "?", "#", "%2e%2e", "a b&c=d", "日本.png", "a..png", "../../x", "con", "n" * 255]


class AssetStoreConformance:
    """Override ``location``: the URL and options of a storage that is empty for each test.

    Override ``engine`` to use a database other than an SQLite file; it must have jobkit's tables.
    """

    @pytest.fixture
    def location(self) -> Location:
        raise NotImplementedError("give the URL and the storage options of an empty place")

    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[sa.Engine]:
        engine = sa.create_engine(f"sqlite:///{tmp_path}/conformance.db")
        configure_sqlite(engine, synchronous="NORMAL")
        migrations.upgrade(engine)
        yield engine
        engine.dispose()

    @pytest.fixture
    def assets(self, engine: sa.Engine, location: Location) -> AssetStore:
        return make_store(engine, location)

    @pytest.fixture
    def keep(self, assets: AssetStore, engine: sa.Engine) -> Keep:
        """Store a body and give it its row."""

        def keep(body: Any = b"content", company: str = COMPANY, **options: Any) -> Asset:
            stored = put(assets, body, company, **options)
            with Session(engine) as session, session.begin():
                return assets.create(session, company, stored, source_task_id=None)

        return keep

    # --- what is put can be got

    def test_what_is_put_is_got_as_its_row_says(self, assets: AssetStore, keep: Keep) -> None:
        for size in (1, 4_096, 100_000, (1 << 20) + 1):
            body = os.urandom(size)
            asset = keep(body)
            assert (asset.byte_size, asset.sha256) == (size, hashlib.sha256(body).hexdigest())
            compare(read(assets, asset), body)
            assets.verify(asset)

    def test_every_kind_of_body_is_stored(self, assets: AssetStore, keep: Keep, tmp_path: Path) -> None:
        (tmp_path / "body").write_bytes(b"content")
        for body in (
            b"content",
            bytearray(b"content"),
            tmp_path / "body",
            io.BytesIO(b"content"),
            iter([b"con", b"tent"]),
        ):
            assert read(assets, keep(body)) == b"content"

    def test_a_file_of_many_parts_is_stored_whole(self, assets: AssetStore, keep: Keep) -> None:
        asset = keep(bytes([number]) * (1 << 20) for number in range(40))
        assets.verify(asset)
        with assets.open(asset, start=(39 << 20) - 1, end=(39 << 20) + 1) as file:
            assert file.read() == bytes([38, 39])

    def test_hostile_names_work_and_are_refused_to_other_companies(self, assets: AssetStore, keep: Keep) -> None:
        made = [keep(name.encode(), name, original_filename=name, namespace=name) for name in NAMES]
        for name, asset in zip(NAMES, made, strict=True):
            assert read(assets, asset) == name.encode()
            for other in NAMES:
                if other != name:
                    with pytest.raises(AssetKeyRefused):
                        assets.open(dataclasses.replace(asset, company_id=other))
        for key in ("../secret", "/etc/passwd", "acme/../../x", "acme/*", "acme/x\0"):
            with pytest.raises(AssetKeyRefused):
                assets.open(dataclasses.replace(made[0], company_id=COMPANY, object_key=key))

    def test_a_range_is_cut_to_the_asset(self, assets: AssetStore, keep: Keep) -> None:
        asset = keep(b"0123456789")
        for start, end, expected in ((3, 5, b"34"), (None, 2, b"01"), (8, 99, b"89"), (10, None, b""), (99, 100, b"")):
            with assets.open(asset, start=start, end=end) as file:
                assert file.read() == expected
                file.seek(0)
                assert b"".join(iter(lambda: file.read(1), b"")) == expected

    def test_readers_do_not_disturb_each_other(self, assets: AssetStore, keep: Keep) -> None:
        content = os.urandom(300_000)
        asset = keep(content)
        with assets.open(asset) as one, assets.open(asset, start=100_000) as two:
            assert (one.read(2), two.read(2)) == (content[:2], content[100_000:100_002])
            compare(one.read(150_000), content[2:150_002])
            compare(two.read(), content[100_002:])
            one.close()
            two.seek(0)
            assert two.read(5) == content[100_000:100_005]

    # --- only whole files, and only those with a row

    def test_an_object_is_visible_only_when_it_is_whole(self, assets: AssetStore, engine: sa.Engine) -> None:
        size, seen, stop = 24 << 20, set(), threading.Event()

        def observe() -> None:
            while not stop.is_set():
                for key in recorded(engine):
                    try:
                        with assets.storage.open(key) as file:
                            seen.add(file.seek(0, io.SEEK_END))
                    except FileNotFoundError:
                        seen.add(-1)

        observer = threading.Thread(target=observe)
        observer.start()
        try:
            put(assets, (os.urandom(1 << 20) for _ in range(size >> 20)))
        finally:
            stop.set()
            observer.join(60)
        assert seen <= {-1, size}

    def test_a_body_that_fails_stores_nothing(self, engine: sa.Engine, location: Location) -> None:
        store = make_store(engine, location, max_bytes=1_000)

        def broken() -> Iterator[bytes]:
            yield b"half"
            raise RuntimeError("the source broke")

        for body, error in (
            (b"", AssetEmpty),
            (b"x" * 1_001, AssetTooLarge),
            (broken(), RuntimeError),
            ("x", TypeError),
        ):
            with pytest.raises(error):
                put(store, body)
        assert recorded(engine) == {}
        assert put(store, b"x" * 1_000).byte_size == 1_000

    def test_names_are_used_once(self, assets: AssetStore, keep: Keep) -> None:
        one, two = keep(b"one"), keep(b"two")
        assert one.object_key != two.object_key
        assert (read(assets, one), read(assets, two)) == (b"one", b"two")

    def test_a_rolled_back_row_leaves_an_object_that_the_sweep_takes(
        self, assets: AssetStore, engine: sa.Engine, keep: Keep
    ) -> None:
        asset, stored = keep(b"kept"), put(assets, b"lost")
        with Session(engine) as session:
            assets.create(session, COMPANY, stored, source_task_id=None)
            session.rollback()
        assert assets.collect_garbage(older_than=0, dry_run=False).abandoned == 1
        with pytest.raises(FileNotFoundError):
            assets.storage.open(stored.object_key)
        assert read(assets, asset) == b"kept"

    # --- removing

    def test_exactly_what_was_deleted_goes(self, assets: AssetStore, engine: sa.Engine, keep: Keep) -> None:
        kept = [keep(name.encode(), original_filename=name) for name in ("a", "ab", "a*")]
        gone = keep(b"gone", original_filename="a")
        with Session(engine) as session, session.begin():
            assets.delete(session, gone)
        report = assets.collect_garbage(older_than=0, dry_run=False)
        assert (report.deleted, report.failed) == (1, 0)
        with pytest.raises(AssetCorrupt, match="no object"):
            assets.verify(gone)
        for asset in kept:
            assets.verify(asset)

    def test_removing_what_is_not_there_is_no_error(self, assets: AssetStore) -> None:
        stored = put(assets)
        assets.storage.remove(stored.object_key)
        assets.storage.remove(stored.object_key)

    def test_another_store_sees_at_once_what_was_stored_and_removed(
        self, assets: AssetStore, engine: sa.Engine, location: Location, keep: Keep
    ) -> None:
        other, earlier = make_store(engine, location), keep(b"earlier")
        assert read(other, earlier) == b"earlier"
        asset = keep(b"later")  # where the other one may have looked already
        assert read(other, asset) == b"later"
        assets.storage.remove(asset.object_key)
        with pytest.raises(AssetCorrupt, match="no object"):
            other.verify(asset)

    # --- in use

    def test_threads_share_one_store(self, engine: sa.Engine, location: Location) -> None:
        store = make_store(engine, location)

        def work(number: int) -> None:
            body = f"{number} ".encode() * 1_000
            stored = put(store, body)
            with store.storage.open(stored.object_key) as file:
                compare(file.read(), body)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(24)))

    def test_a_job_becomes_files(self, assets: AssetStore, engine: sa.Engine) -> None:
        with Session(engine) as session, session.begin():
            job = JobStore(session).create(COMPANY, job_type="pair")
        renderers = Renderers(default=lambda ctx: [Rendered(name, "text/plain", name.encode()) for name in ("a", "b")])
        assert Runner(engine, assets, renderers).run_until_idle(timeout=60) == 1
        with Session(engine) as session:
            found = JobStore(session).get_by_id(job.id)
            files = assets.list_by_job(session, job.id, company_id=COMPANY)
        assert found is not None
        assert (found.status, found.error_message) == (JobStatus.DONE, None)
        assert [read(assets, asset) for asset in files] == [b"a", b"b"]
        assert recorded(engine) == {}

    def test_a_url_is_given_or_refused_as_unavailable(self, assets: AssetStore, keep: Keep) -> None:
        try:
            url = assets.url(keep(), expires_in=60)
        except AssetUrlUnavailable:
            return
        assert "://" in url


def make_store(engine: sa.Engine, location: Location, **options: Any) -> AssetStore:
    url, storage_options = location
    return AssetStore(url, engine=engine, storage_options=storage_options, **options)


def put(store: AssetStore, body: Any = b"content", company: str = COMPANY, **options: Any) -> StoredObject:
    options = {"original_filename": "a.txt", "content_type": "text/plain", **options}
    return store.put_file(company, body=body, **options)


def read(store: AssetStore, asset: Asset) -> bytes:
    with store.open(asset) as file:
        return file.read()


def compare(found: bytes, expected: bytes) -> None:
    """Fail, in one line, unless they are equal: pytest's own comparison of long bytes takes minutes where it shows
    everything, as on CI.
    """
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        first = next((number for number, (one, other) in pairs if one != other), min(len(found), len(expected)))
        pytest.fail(f"{len(found):,} bytes were read, {len(expected):,} were stored; byte {first:,} is another")


def recorded(engine: sa.Engine) -> dict[str, str]:
    """Every recorded key, with the state of its record."""
    with engine.connect() as connection:
        found = connection.execute(sa.select(asset_intents.c.object_key, asset_intents.c.state))
        return {row.object_key: row.state for row in found}
