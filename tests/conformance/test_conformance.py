"""The suites that ship, over every storage and every database; and that they see a storage that cheats."""

from __future__ import annotations

import importlib
import io
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy.orm import Session

from jobkit import AssetCorrupt, AssetStore
from jobkit.testing.conformance import AssetStoreConformance, JobStoreConformance
from jobkit.testing.conformance.assets import Location, make_store, put
from tests.support.databases import Database
from tests.support.s3 import S3Server, options

REGISTRY = importlib.import_module("fsspec.registry")  # fsspec.registry is the mapping in it
EVERY = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@EVERY
class TestJobs(JobStoreConformance):
    @pytest.fixture
    def engine(self, database: Database) -> sa.Engine:
        return database.engine


class OnEveryDatabase(AssetStoreConformance):
    @pytest.fixture
    def engine(self, database: Database) -> sa.Engine:
        return database.engine


@EVERY
class TestFolder(OnEveryDatabase):
    @pytest.fixture
    def location(self, tmp_path: Path) -> Location:
        return str(tmp_path / "assets"), {}


@EVERY
class TestMemory(OnEveryDatabase):
    @pytest.fixture
    def location(self) -> Location:
        return f"memory://{uuid.uuid4()}", {}


@EVERY
class TestMoto(OnEveryDatabase):
    @pytest.fixture
    def location(self, moto: S3Server) -> Location:
        return f"s3://{moto.bucket}/{uuid.uuid4()}", options(moto)


@EVERY
class TestRclone(OnEveryDatabase):
    @pytest.fixture
    def location(self, rclone: S3Server) -> Location:
        return f"s3://{rclone.bucket}/{uuid.uuid4()}", options(rclone)


class TestAsItShips(AssetStoreConformance):
    """With the database that the suite brings."""

    @pytest.fixture
    def location(self, tmp_path: Path) -> Location:
        return (tmp_path / "assets").as_uri(), {}


# --- a storage that cheats is seen


class Honest(MemoryFileSystem):
    protocol = "cheat"
    cachable = False

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return self.read_from(path) if mode == "rb" else super().open(path, mode, **options)

    def read_from(self, path: str) -> Any:
        return io.BytesIO(self.cat_file(path))

    def cat_file(self, path: str, **_: Any) -> bytes:
        self.info(path)
        content: bytes = self.store[self._strip_protocol(path)].getvalue()
        return content


class Grows(Honest):
    """Shows a file while it is being sent."""

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        content = Path(lpath).read_bytes()
        self.pipe_file(rpath, content[: 1 << 20])
        threading.Event().wait(0.5)  # long enough for anyone who looks
        self.pipe_file(rpath, content)


class Forgets(Honest):
    """Does not remove."""

    def rm_file(self, path: str) -> None:
        self.info(path)


class Globs(Honest):
    """Removes whatever begins alike."""

    def rm_file(self, path: str) -> None:
        begin = self._strip_protocol(path).rpartition("/")[0]
        for name in [name for name in self.store if name.startswith(begin)]:
            del self.store[name]


class Remembers(Honest):
    """Answers from a cache of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cache: dict[str, bytes] = {}

    def read_from(self, path: str) -> Any:
        if path not in self.cache:
            self.cache[path] = self.cat_file(path)
        return io.BytesIO(self.cache[path])


class Shares(Honest):
    """Gives every reader the same position."""

    def read_from(self, path: str) -> Any:
        self.info(path)
        return self.store[self._strip_protocol(path)]


class Flips(Honest):
    """Changes a byte on its way."""

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, bytes([Path(lpath).read_bytes()[0] ^ 1]) + Path(lpath).read_bytes()[1:])


Case = Callable[[AssetStore, sa.Engine, Location, Any], object]
SUITE = AssetStoreConformance()
CHEATS: dict[type[Honest], Case] = {
    Grows: lambda store, engine, place, keep: SUITE.test_an_object_is_visible_only_when_it_is_whole(store, engine),
    Forgets: lambda store, engine, place, keep: SUITE.test_exactly_what_was_deleted_goes(store, engine, keep),
    Globs: lambda store, engine, place, keep: SUITE.test_exactly_what_was_deleted_goes(store, engine, keep),
    Remembers: SUITE.test_another_store_sees_at_once_what_was_stored_and_removed,
    Shares: lambda store, engine, place, keep: SUITE.test_readers_do_not_disturb_each_other(store, keep),
    Flips: lambda store, engine, place, keep: SUITE.test_what_is_put_is_got_as_its_row_says(store, keep),
}


@pytest.mark.parametrize("cheat", [Honest, *CHEATS], ids=lambda cheat: cheat.__name__)
def test_the_suite_sees_a_storage_that_cheats(
    cheat: type[Honest], sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REGISTRY._registry, "cheat", cheat)
    engine = sqlite_database.engine
    place = f"cheat://{uuid.uuid4()}", {}
    store = make_store(engine, place)

    def keep(body: Any = b"content", **options: Any) -> Any:
        stored = put(store, body, **options)
        with Session(engine) as session, session.begin():
            return store.create(session, "acme", stored, source_task_id=None)

    if cheat is Honest:  # each of these tests can succeed
        for case in CHEATS.values():
            case(store, engine, place, keep)
        return
    with pytest.raises((AssertionError, AssetCorrupt, pytest.fail.Exception)):
        CHEATS[cheat](store, engine, place, keep)
