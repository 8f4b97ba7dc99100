"""A folder of this machine as a storage: files are flushed to disk, then renamed to their key."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from jobkit.errors import AssetKeyRefused, AssetUrlUnavailable
from jobkit.storage.base import Upload
from jobkit.storage.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LOCAL = "local_disk"
# So many bytes of small files share what the disk does for them; a larger file is worth a thread of its own.
BATCH_BYTES = 1 << 18
# How many files are open at once while they are flushed.
_OPEN = 32
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class LocalStorage:
    """A folder of this machine: files are flushed to disk, then renamed to their key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = "\0"  # what no path begins with
        self.provider = LOCAL
        self.batch_bytes = BATCH_BYTES
        self.scratch = Scratch(lambda: root / ".spool")

    def __repr__(self) -> str:
        return f"{self.root.as_uri()}"

    def spool_folder(self) -> Path:
        return self.scratch.folder()

    def publish(self, uploads: Sequence[Upload]) -> dict[str, BaseException]:
        failures: dict[str, BaseException] = {}
        for path, there in _by_folder(uploads).items():
            try:
                with self._folder(self._path(path)) as folder:
                    failures |= _move(there, folder)
                    os.fsync(folder)
            except Exception as error:  # nobody knows what of the folder is on the disk
                failures |= {upload.key: error for upload in there}
        return failures

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        self._inside(path.parent)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if path.is_symlink():
                raise AssetKeyRefused(f"object {key!r} is a symbolic link") from error
            raise
        try:
            return os.fdopen(descriptor, "rb")
        except OSError:  # a folder: Python has not taken the descriptor over
            os.close(descriptor)
            raise

    def size(self, key: str) -> int | None:
        try:
            return os.lstat(self._path(key)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def remove(self, key: str) -> None:
        path = self._path(key)
        self._inside(path.parent)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()

    def url(self, key: str, *, expires_in: int, content_type: str, disposition: str) -> str:
        raise AssetUrlUnavailable(self.provider)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*key.split("/"))

    @contextlib.contextmanager
    def _folder(self, path: Path) -> Iterator[int]:
        """The folder ``path`` open, made when it is missing, and within the root whatever happens to its name."""
        try:
            descriptor = os.open(path, _FOLDER)
        except FileNotFoundError:
            self._inside(path)
            _make_folders(self.root, path)
            descriptor = os.open(path, _FOLDER)
        try:
            self._inside(path, descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _inside(self, folder: Path, descriptor: int | None = None) -> None:
        # A symbolic link planted within the root must not lead out of it.
        real = _real(folder, descriptor)
        if not real.startswith(self._real_root):  # the root itself may be a link, and lead elsewhere than before
            self._real_root = os.path.realpath(self.root).rstrip(os.sep) + os.sep
            if not real.startswith(self._real_root):
                raise AssetKeyRefused(f"the folder {folder.name!r} of an object leaves the storage root")


def _by_folder(uploads: Sequence[Upload]) -> dict[str, list[Upload]]:
    """By the folders of their keys."""
    found: dict[str, list[Upload]] = {}
    for upload in uploads:
        found.setdefault(upload.key.rpartition("/")[0], []).append(upload)
    return found


def _move(uploads: Sequence[Upload], folder: int) -> dict[str, BaseException]:
    """Flush files, then let each take its name in an open folder. Those that could not, by their keys."""
    failures: dict[str, BaseException] = {}
    for start in range(0, len(uploads), _OPEN):
        with contextlib.ExitStack() as opened:
            failures |= _move_some(uploads[start : start + _OPEN], folder, opened)
    return failures


def _move_some(uploads: Sequence[Upload], folder: int, opened: contextlib.ExitStack) -> dict[str, BaseException]:
    failures: dict[str, BaseException] = {}
    files: list[tuple[Upload, int]] = []
    for upload in uploads:
        try:
            files.append((upload, os.open(upload.path, os.O_RDONLY | os.O_CLOEXEC)))
            opened.callback(os.close, files[-1][1])
        except Exception as error:
            failures[upload.key] = error
    if len(files) > 1:
        for _, file in files:
            _begin_to_flush(file)
    for upload, file in files:
        try:
            os.fsync(file)
            os.replace(upload.path, upload.key.rpartition("/")[2], dst_dir_fd=folder)
        except Exception as error:
            failures[upload.key] = error
    return failures


def _begin_to_flush(file: int) -> None:
    """Let the kernel begin to write a file. Flushed one after the other from nothing, each would wait for the disk; so
    the first waits for all of them.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # only a hint
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _make_folders(root: Path, folder: Path) -> None:
    """Make what is missing between ``root`` and ``folder``, each flushed into its parent so that it survives power
    loss.
    """
    missing = []
    while not folder.is_dir() and folder != root.parent:
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with _opened(folder, _FOLDER) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _real(folder: Path, descriptor: int | None) -> str:
    """Where a folder really is. Of an open one Linux says it at once; else each part of the path is looked at."""
    if descriptor is not None:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{descriptor}")
    return os.path.realpath(folder)
