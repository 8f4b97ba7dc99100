"""Storages where a file grows under its name while it is sent: FTP, SFTP, SMB. Nobody sees one before it is whole."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore
from jobkit.storage.base import Upload
from jobkit.storage.opening import open_storage
from jobkit.storage.remote import FsspecStorage
from tests.support.files import keep

REGISTRY = importlib.import_module("fsspec.registry")  # fsspec.registry is the mapping in it
KEY = "acme/generated/2026/03/01/0198c0de-report.txt"


def put(storage: Any, content: bytes, key: str = KEY) -> None:
    source = storage.spool_folder() / f"{uuid.uuid4()}.part"
    source.write_bytes(content)
    try:
        for failure in storage.publish([Upload(source, key, "text/plain")]).values():
            raise failure
    finally:
        source.unlink(missing_ok=True)


def read(storage: FsspecStorage, key: str = KEY) -> bytes:
    with storage.open(key) as file:
        return file.read()


class Growing(MemoryFileSystem):
    """As FTP and SFTP: a file is there, and grows, while it is being sent; it can be renamed."""

    protocol = "growing"
    cut = False

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        content = Path(lpath).read_bytes()
        self.pipe_file(rpath, content[:3])
        if Growing.cut:
            raise ConnectionResetError("cut off")
        self.pipe_file(rpath, content)

    def mv(self, path1: str, path2: str) -> None:
        self.store[self._strip_protocol(path2)] = self.store.pop(self._strip_protocol(path1))


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> FsspecStorage:
    monkeypatch.setitem(REGISTRY._registry, "growing", Growing)
    monkeypatch.setattr(Growing, "cut", False)
    storage = open_storage(f"growing://{uuid.uuid4()}", None)
    assert isinstance(storage, FsspecStorage)
    return storage


def test_where_files_grow_one_is_stored_beside_its_key_and_renamed(growing: FsspecStorage) -> None:
    put(growing, b"content")
    put(growing, b"another", KEY + "2")
    filesystem, root = growing._filesystem()
    assert sorted(filesystem.find(root)) == [f"{root}/{KEY}", f"{root}/{KEY}2"]
    assert read(growing) == b"content"
    growing.remove(KEY)
    assert sorted(filesystem.find(root)) == [f"{root}/{KEY}2"]


def test_what_was_cut_off_where_files_grow_is_not_under_its_key_and_goes_with_it(growing: FsspecStorage) -> None:
    Growing.cut = True
    with pytest.raises(ConnectionResetError):
        put(growing, b"content")
    filesystem, root = growing._filesystem()
    assert sorted(filesystem.find(root)) == [f"{root}/{KEY}.part"]
    with pytest.raises(FileNotFoundError):
        growing.open(KEY)
    growing.remove(KEY)
    assert filesystem.find(root) == []


# --- a real FTP server


@pytest.fixture(scope="module")
def ftp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("ftp")
    command = [sys.executable, "-W", "ignore", "-m", "pyftpdlib", "-i", "127.0.0.1", "-p", "0", "-w", "-d", str(folder)]
    server = subprocess.Popen([*command, "-u", "me", "-P", "hunter2secret"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    with server.stderr as log:
        told = next(
            (found for line in log if (found := re.search(r"starting FTP server on 127.0.0.1:(\d+)", line))), None
        )
        assert told is not None
        threading.Thread(target=log.read, daemon=True).start()
        yield f"ftp://me:hunter2secret@127.0.0.1:{told[1]}", folder
        server.terminate()
        server.wait(60)


@pytest.fixture
def ftp(ftp_server: tuple[str, Path]) -> tuple[str, Path]:
    """The URL of an empty storage on an FTP server, and the folder that is served there."""
    name = str(uuid.uuid4())
    return f"{ftp_server[0]}/{name}", ftp_server[1] / name


def test_an_ftp_server_is_a_storage(ftp: tuple[str, Path], engine: sa.Engine) -> None:
    url, folder = ftp
    store = AssetStore(url, engine=engine)
    assert (store.provider, "hunter2secret" in repr(store)) == ("ftp", False)
    content = bytes(range(256)) * 4_000
    asset, gone = keep(store, engine, content), keep(store, engine)
    store.verify(asset)
    with store.open(asset, start=500_000, end=500_003) as file:
        assert file.read() == content[500_000:500_003]
    put(store.storage, b"never got a row", "acme/x/lost")
    with Session(engine) as session, session.begin():
        store.delete(session, gone)
    report = store.collect_garbage(older_than=0, dry_run=False)
    assert (report.deleted, report.failed) == (1, 0)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {asset.object_key, "acme/x/lost"}
    with pytest.raises(jobkit.AssetCorrupt, match="no object"):
        store.open(gone)


def test_an_ftp_store_may_be_shared_by_threads(ftp: tuple[str, Path], engine: sa.Engine) -> None:
    store = AssetStore(ftp[0], engine=engine)
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(lambda number: keep(store, engine, b"%d" % number * 10_000), range(12)))
        list(pool.map(store.verify, kept))
