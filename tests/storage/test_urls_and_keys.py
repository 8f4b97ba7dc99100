"""Storages: what a URL names, when an object is visible, and that nothing leads out of the root."""

from __future__ import annotations

import asyncio
import errno
import importlib
import io
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from jobkit.errors import AssetError, AssetKeyRefused, ConfigurationError
from jobkit.storage.base import Storage, Upload, byte_range
from jobkit.storage.local import LocalStorage
from jobkit.storage.opening import open_storage
from jobkit.storage.remote import FsspecStorage

REGISTRY = importlib.import_module("fsspec.registry")  # fsspec.registry is the mapping in it
KEY = "acme/generated/2026/03/01/0198c0de-report.txt"


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "root")


@pytest.fixture
def storage(storage_url: str) -> Storage:
    return open_storage(f"{storage_url}/prefix", None)


def put(storage: Storage, content: bytes, key: str = KEY) -> None:
    source = storage.spool_folder() / f"{uuid.uuid4()}.part"
    source.write_bytes(content)
    for failure in storage.publish([Upload(source, key, "text/plain")]).values():
        raise failure
    assert not source.exists()


def read(storage: Storage, key: str = KEY) -> bytes:
    with storage.open(key) as file:
        return file.read()


# --- what a URL names


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("/srv/assets", "/srv/assets"),
        ("/srv/my assets/100%41", "/srv/my assets/100%41"),
        ("file:///srv/my%20assets", "/srv/my assets"),
        ("file:///srv/my assets", "/srv/my assets"),
        ("FILE:///srv/a", "/srv/a"),
        ("local:///srv/a", "/srv/a"),
        ("file:/srv/a", "/srv/a"),
        ("file://localhost/srv/a", "/srv/a"),
        ("file:///srv/a%23b%3Fc%25", "/srv/a#b?c%"),
        ("file:///srv/../srv/a/", "/srv/a"),
        (Path("/srv/a::b"), "/srv/a::b"),
        (Path("/srv/s3:a"), "/srv/s3:a"),
        ("assets/here", "CWD/assets/here"),
        ("./a:b", "CWD/a:b"),
        (Path("assets"), "CWD/assets"),
    ],
    ids=repr,
)
def test_a_path_or_file_url_names_a_folder(url: Any, folder: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage(url, None)
    monkeypatch.chdir("/")
    assert isinstance(storage, LocalStorage)
    assert storage.provider == "local_disk"
    assert str(storage.root) == folder.replace("CWD", str(tmp_path))


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("simplecache::s3://bucket", None, "chains protocols with '::'"),
        ("zip://a.zip::file:///srv", None, "chains protocols with '::'"),
        ("file://assets", None, "file://assets names a host"),
        ("file://server/share", None, "file://server names a host"),
        ("file://", None, "needs a folder"),
        ("", None, "needs a folder"),
        ("file:///srv/a?b", None, "%3F"),
        ("file:///srv/a#b", None, "%23"),
        ("file:///srv/a", {"auto_mkdir": True}, "takes no storage options, got auto_mkdir"),
        ("nope://x", None, "storage nope:// is not known to fsspec"),
        ("no_pe://x", None, "storage no_pe:// is not known to fsspec"),
        ("s3:bucket/prefix", None, "begins with s3://"),
        ("memory:x", None, "begins with memory://"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_storage(url, options)


def test_a_driver_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**REGISTRY.known_implementations["s3"], "class": "not_installed_s3fs.S3FileSystem"}
    monkeypatch.setitem(REGISTRY.known_implementations, "missing", known)
    with pytest.raises(ConfigurationError, match="storage missing:// needs another package: Install s3fs"):
        open_storage("missing://bucket", None)


def test_an_object_store_needs_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY._registry, "s3", MemoryFileSystem)
    with pytest.raises(ConfigurationError, match="s3://bucket/prefix"):
        open_storage("s3:///", None)
    assert open_storage("S3://bucket", None).provider == "s3"


SECRET = "hunter2secret"


class Locked(MemoryFileSystem):
    """A filesystem whose driver refuses to start, and says with what."""

    protocol = "locked"
    cachable = False

    def __init__(self, **options: Any) -> None:
        raise ValueError(f"cannot log in with {options}")


@pytest.mark.parametrize(
    "url",
    [f"locked://u:{SECRET}@host/x", f"locked://u:{SECRET}/a@host/x", f"locked://u:{SECRET}#a@host/x?{SECRET}"],
)
def test_secrets_are_in_no_repr_and_no_message(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(REGISTRY._registry, "locked", Locked)
    storage = open_storage(url, {"key": "me", "secret": SECRET})
    assert repr(storage) == "locked://host/x"
    with pytest.raises(ConfigurationError, match="cannot be set up, options key, secret: ValueError") as refused:
        storage.open(KEY)
    assert SECRET not in str(refused.value)
    assert refused.value.__suppress_context__


# --- publishing


def test_what_is_published_is_read_back_and_removed_alone(storage: Storage) -> None:
    other = KEY.replace("report", "other")
    put(storage, b"content")
    put(storage, b"other", other)
    assert read(storage) == b"content"
    storage.remove(KEY)
    storage.remove(KEY)
    with pytest.raises(FileNotFoundError):
        storage.open(KEY)
    assert read(storage, other) == b"other"


def test_an_object_is_visible_only_when_it_is_whole(storage: Storage) -> None:
    content = os.urandom(1 << 20) * 48
    seen: set[int] = set()
    stop = threading.Event()

    def observe() -> None:
        while not stop.is_set():
            try:
                with storage.open(KEY) as file:
                    seen.add(file.seek(0, io.SEEK_END))
            except FileNotFoundError:
                seen.add(-1)

    observer = threading.Thread(target=observe)
    observer.start()
    try:
        put(storage, content)
        assert len(read(storage)) == len(content)
    finally:
        stop.set()
        observer.join(60)
    assert seen <= {-1, len(content)}
    assert -1 in seen


def test_bytes_and_names_are_on_the_disk_before_a_local_object_is_visible_and_when_publish_returns(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = local.spool_folder() / "x.part"
    source.write_bytes(b"content")
    target = local.root / KEY
    steps: list[tuple[str, str]] = []
    sync, replace = os.fsync, os.replace

    def spy_sync(descriptor: int) -> None:
        steps.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def spy_replace(old: Any, new: Any, *, dst_dir_fd: int) -> None:
        steps.append(("rename", os.path.join(os.path.realpath(f"/proc/self/fd/{dst_dir_fd}"), new)))
        replace(old, new, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(os, "replace", spy_replace)
    assert local.publish([Upload(source, KEY, "text/plain")]) == {}
    made = [str(folder) for folder in list(target.parents)[: len(KEY.split("/"))][::-1]]
    assert steps == [
        *[("sync", folder) for folder in made[:-1]],
        ("sync", str(source)),
        ("rename", str(target)),
        ("sync", made[-1]),
    ]
    assert not source.exists()


def uploads(storage: LocalStorage, *keys: str) -> list[Upload]:
    made = []
    for key in keys:
        path = storage.spool_folder() / f"{uuid.uuid4()}.part"
        path.write_bytes(key.encode())
        made.append(Upload(path, key, "text/plain"))
    return made


def test_a_system_that_takes_no_hints_stores_files_all_the_same(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, start: int, length: int, advice: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    made = uploads(local, "acme/1", "acme/2")
    assert local.publish(made) == {}
    assert [read(local, upload.key) for upload in made] == [b"acme/1", b"acme/2"]


def test_files_that_are_published_together_are_on_the_disk_before_their_names_and_share_the_folders_flush(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (local.root / "acme").mkdir(parents=True, mode=0o700)
    made = uploads(local, *(f"acme/{number}" for number in range(40)))
    flushed: list[str] = []
    named: list[str] = []
    most = 0
    sync, replace = os.fsync, os.replace

    def spy_sync(descriptor: int) -> None:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))
        flushed.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def spy_replace(old: Any, new: str, *, dst_dir_fd: int) -> None:
        assert str(old) in flushed
        named.append(new)
        replace(old, new, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(os, "replace", spy_replace)
    before = len(os.listdir("/proc/self/fd"))
    assert local.publish(made) == {}
    assert named == [str(number) for number in range(40)]
    assert flushed == [*(str(upload.path) for upload in made), str(local.root / "acme")]
    assert most - before <= 35  # however many there are, not all are open at once
    assert [read(local, upload.key) for upload in made] == [upload.key.encode() for upload in made]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_file_that_cannot_be_published_fails_alone(
    call: str, local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = uploads(local, "acme/a", "acme/b", "other/c")
    original, bad = getattr(os, call), made[1].path

    def failing(what: Any, *others: Any, **options: Any) -> Any:
        if str(bad) == (os.path.realpath(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)):
            raise OSError("no room")
        return original(what, *others, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        failures = local.publish(made)
    assert [(key, str(error)) for key, error in failures.items()] == [("acme/b", "no room")]
    assert [path.is_file() for path, _, _ in made] == [False, True, False]
    assert (read(local, "acme/a"), read(local, "other/c")) == (b"acme/a", b"other/c")
    assert local.size("acme/b") == 0


def test_where_a_folder_cannot_be_flushed_all_that_went_there_has_failed(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = uploads(local, "acme/a", "other/b", "acme/c")
    (local.root / "acme").mkdir(parents=True)
    sync = os.fsync

    def failing(descriptor: int) -> None:
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == str(local.root / "acme"):
            raise OSError("the disk is gone")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    failures = local.publish(made)
    assert {key: str(error) for key, error in failures.items()} == dict.fromkeys(
        ["acme/a", "acme/c"], "the disk is gone"
    )
    assert read(local, "other/b") == b"other/b"


def test_after_a_file_that_a_remote_storage_does_not_take_none_is_tried(tmp_path: Path) -> None:
    calls: list[str] = []

    class Full(MemoryFileSystem):
        protocol = "full"

        def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
            calls.append(rpath.rpartition("/")[2])
            if rpath.endswith("b"):
                raise asyncio.CancelledError
            super().put_file(lpath, rpath, **options)

    REGISTRY.register_implementation("full", Full, clobber=True)
    storage = FsspecStorage("full://somewhere", {})
    made = []
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
        made.append(Upload(tmp_path / name, f"acme/{name}", "text/plain"))
    failures = storage.publish(made)
    assert list(failures) == ["acme/b", "acme/c"]
    assert len(calls) == 2
    assert [upload.path.is_file() for upload in made] == [False, True, True]


def test_a_local_object_and_its_folders_are_private(local: LocalStorage) -> None:
    put(local, b"content")
    assert (local.root / KEY).parent.stat().st_mode & 0o077 == 0


def test_a_storage_that_kept_less_than_it_was_given_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cut(MemoryFileSystem):
        protocol = "cut"

        def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
            self.pipe_file(rpath, Path(lpath).read_bytes()[:-1])

    monkeypatch.setitem(REGISTRY._registry, "cut", Cut)
    storage = open_storage(f"cut://{uuid.uuid4()}", None)
    with pytest.raises(AssetError, match="kept 6 of 7 bytes"):
        put(storage, b"content")


class Recording(MemoryFileSystem):
    """Writes down every method that is called on it from outside fsspec."""

    protocol = "recording"
    cachable = False
    calls: list[str] = []  # noqa: RUF012

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if (
            callable(found)
            and not name.startswith("__")
            and caller
            in ("jobkit.storage.base", "jobkit.storage.local", "jobkit.storage.opening", "jobkit.storage.remote")
        ):
            Recording.calls.append(name)
        return found


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(REGISTRY._registry, "recording", Recording)
    Recording.calls.clear()
    return Recording.calls


def test_only_single_literal_keys_are_ever_asked_of_a_filesystem(recording: list[str]) -> None:
    storage = open_storage(f"recording://{uuid.uuid4()}", None)
    put(storage, b"content")
    assert read(storage) == b"content"
    storage.remove(KEY)
    storage.remove(KEY)
    assert recording == ["put_file", "info", "open", "rm_file", "rm_file"]


def test_a_filesystem_is_made_on_first_use_once_and_without_shared_or_cached_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []

    class Counted(MemoryFileSystem):
        protocol = "counted"

        def __init__(self, **options: Any) -> None:
            made.append(options)
            super().__init__(**options)

    monkeypatch.setitem(REGISTRY._registry, "counted", Counted)
    url = f"counted://{uuid.uuid4()}"
    first, second = open_storage(url, {"flag": 1}), open_storage(url, {"flag": 1})
    assert made == []
    put(first, b"content")
    assert read(first) == b"content"
    assert read(second) == b"content"
    assert made == [{"flag": 1, "use_listings_cache": False}] * 2


def test_a_forked_child_makes_a_filesystem_of_its_own(storage: Storage) -> None:
    put(storage, b"parent")
    filesystem = storage._filesystem()[0] if isinstance(storage, FsspecStorage) else None
    child = os.fork()
    if not child:
        try:
            put(storage, b"child", KEY + "2")
            assert read(storage) == b"parent"
            assert read(storage, KEY + "2") == b"child"
            if isinstance(storage, FsspecStorage):
                assert storage._filesystem()[0] is not filesystem
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if isinstance(storage, FsspecStorage):
        assert storage._filesystem()[0] is filesystem


def test_the_spool_folder_of_a_remote_storage_must_be_our_own(tmp_path: Path) -> None:
    (tmp_path / f"jobkit-spool-{os.getuid()}").symlink_to("/var")
    code = "import jobkit; jobkit.AssetStore('memory://x').spool_folder()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "set TMPDIR to a folder of your own" in run.stderr


# --- nothing leads out of the root


@pytest.mark.parametrize("key", ["../x", "acme/../../x", "acme/../..", "x"])
@pytest.mark.parametrize("method", ["open", "remove", "publish"])
def test_a_local_storage_refuses_a_key_that_leaves_its_root(method: str, key: str, local: LocalStorage) -> None:
    outside = local.root.parent / "x"
    local.root.mkdir()
    outside.write_bytes(b"outside")
    with pytest.raises(AssetKeyRefused, match="leaves the storage root"):
        put(local, b"evil", key) if method == "publish" else getattr(local, method)(key)
    assert outside.read_bytes() == b"outside"


@pytest.mark.parametrize("depth", range(1, 6))
@pytest.mark.parametrize("method", ["open", "remove", "publish"])
def test_a_symbolic_link_to_a_folder_outside_is_not_followed(method: str, depth: int, local: LocalStorage) -> None:
    segments = KEY.split("/")
    outside = local.root.parent / "outside"
    secret = outside.joinpath(*segments[depth:])
    if method != "publish":
        secret.parent.mkdir(parents=True)
        secret.write_bytes(b"secret")
    else:
        outside.mkdir()
    link = local.root.joinpath(*segments[:depth])
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(AssetKeyRefused, match="leaves the storage root"):
        put(local, b"evil") if method == "publish" else getattr(local, method)(KEY)
    assert sorted(outside.rglob("*")) == before


def test_a_symbolic_link_to_a_file_outside_is_neither_read_nor_written(local: LocalStorage) -> None:
    secret = local.root.parent / "secret"
    secret.write_bytes(b"secret")
    link = local.root / KEY
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    with pytest.raises(AssetKeyRefused, match="symbolic link"):
        local.open(KEY)
    put(local, b"content")
    assert (read(local), secret.read_bytes()) == (b"content", b"secret")
    link.unlink()
    link.symlink_to(secret)
    local.remove(KEY)
    assert (link.is_symlink(), secret.read_bytes()) == (False, b"secret")


def test_a_folder_that_was_used_before_and_is_led_outside_since_is_not_followed(local: LocalStorage) -> None:
    put(local, b"content")
    company, outside = local.root / KEY.split("/", maxsplit=1)[0], local.root.parent / "outside"
    company.rename(outside)
    company.symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(AssetKeyRefused, match="leaves the storage root"):
        put(local, b"evil")
    assert sorted(outside.rglob("*")) == before
    assert (outside.joinpath(*KEY.split("/")[1:])).read_bytes() == b"content"


def test_a_root_that_is_a_symbolic_link_may_be_led_elsewhere(local: LocalStorage, tmp_path: Path) -> None:
    for disk in ("disk1", "disk2"):
        (tmp_path / disk).mkdir()
        local.root.unlink(missing_ok=True)
        local.root.symlink_to(tmp_path / disk)
        put(local, disk.encode())
        assert (tmp_path / disk / KEY).read_bytes() == disk.encode()


def test_the_root_itself_may_be_a_symbolic_link(local: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "disk2").mkdir()
    local.root.symlink_to(tmp_path / "disk2")
    put(local, b"content")
    assert read(local) == b"content"


# --- reading a part


@given(st.binary(max_size=40), st.data())
def test_a_window_behaves_like_a_file_of_just_those_bytes(content: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    window, model = byte_range(io.BytesIO(content), start, end), io.BytesIO(content[start:end])
    steps = st.lists(st.tuples(st.sampled_from(["read", "set", "here", "end"]), st.integers(-50, 50)), max_size=12)
    for step, number in data.draw(steps):
        assert window.tell() == model.tell()
        if step == "read":
            assert window.read(number if number >= 0 else -1) == model.read(number if number >= 0 else -1)
            continue
        whence = {"set": 0, "here": 1, "end": 2}[step]
        target = number + (0, model.tell(), end - start)[whence]
        if target < 0:
            with pytest.raises(ValueError, match="before the first byte"):
                window.seek(number, whence)
        else:
            assert window.seek(number, whence) == model.seek(target)
    window.close()


def test_closing_a_window_closes_the_file_under_it() -> None:
    file = io.BytesIO(b"content")
    window = byte_range(file, 1, 3)
    window.close()
    window.close()
    assert file.closed
    with pytest.raises(ValueError, match="closed"):
        window.read()


@pytest.mark.parametrize("call", [lambda f: f.write(b"x"), lambda f: f.truncate(0)])
def test_a_window_cannot_be_written(call: Callable[[Any], Any]) -> None:
    with byte_range(io.BytesIO(b"content"), 0, 3) as window, pytest.raises(io.UnsupportedOperation):
        call(window)
