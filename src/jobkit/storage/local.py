"""A local folder as a storage."""

from __future__ import annotations

import contextlib
import os
import stat
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
# Files open at once while they are flushed.
_OPEN = 32
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class LocalStorage:
    """A local folder: files are flushed to disk, then renamed to their key."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = "\0"  # not resolved yet: no path starts with this
        self.provider = LOCAL
        self.batch_bytes = BATCH_BYTES
        self.scratch = Scratch(lambda: root / ".spool")

    def __repr__(self) -> str:
        return self.root.as_uri()

    def spool_folder(self) -> Path:
        return self.scratch.folder()

    def publish(self, uploads: Sequence[Upload]) -> dict[str, BaseException]:
        failures: dict[str, BaseException] = {}
        for path, there in _by_folder(uploads).items():
            try:
                with self._folder(self._path(path)) as folder:
                    failures |= _move(there, folder)
                    os.fsync(folder)
            except Exception as error:  # which of its files are on the disk is unknown
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
        except OSError:  # a folder: fdopen has not taken the descriptor over
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
        """A descriptor of the folder ``path``, created when missing. It stays this folder, within the root, even when
        the path is replaced meanwhile.
        """
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
        # A symbolic link within the root must not lead out of it.
        real = _real(folder, descriptor)
        if not real.startswith(self._real_root):  # the root may be a link that was changed
            self._real_root = os.path.realpath(self.root).rstrip(os.sep) + os.sep
            if not real.startswith(self._real_root):
                raise AssetKeyRefused(f"the folder {folder.name!r} of an object leaves the storage root")


def _by_folder(uploads: Sequence[Upload]) -> dict[str, list[Upload]]:
    """Uploads by the folder of their keys."""
    found: dict[str, list[Upload]] = {}
    for upload in uploads:
        found.setdefault(upload.key.rpartition("/")[0], []).append(upload)
    return found


def _move(uploads: Sequence[Upload], folder: int) -> dict[str, BaseException]:
    """Flush files, then rename each into an open folder. The exceptions of those that failed, by key."""
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
            # An earlier call may have moved it, and failed afterwards: only the folder remains to be flushed.
            if not (isinstance(error, FileNotFoundError) and _is_there(upload, folder)):
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


def _is_there(upload: Upload, folder: int) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISREG(os.stat(upload.key.rpartition("/")[2], dir_fd=folder, follow_symlinks=False).st_mode)
    return False


def _begin_to_flush(file: int) -> None:
    """Start writing a file to disk without waiting. When several are flushed after this, the first waits for all of
    them; else each would wait for the disk.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # only a hint
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _make_folders(root: Path, folder: Path) -> None:
    """Create the missing folders from ``root`` to ``folder``, each flushed into its parent to survive power loss."""
    missing = []
    while not folder.is_dir() and folder != root.parent:
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, _FOLDER)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _real(folder: Path, descriptor: int | None) -> str:
    """The path of a folder without symbolic links. Linux knows that of a descriptor; else each part is resolved."""
    if descriptor is not None:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{descriptor}")
    return os.path.realpath(folder)
