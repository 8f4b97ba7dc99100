"""Any fsspec filesystem as a storage. It is asked for single, literal keys only: no listing, no glob."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from jobkit.errors import AssetError, AssetUrlUnavailable, ConfigurationError
from jobkit.storage.base import Upload
from jobkit.storage.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Bytes. The default of s3fs, ten parts of 50 MiB at a time, takes a gigabyte of memory for a file of 500 MiB.
_PART = 8 << 20
_PARTS_AT_ONCE = 4
PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+._-]+):(//)?")
_S3 = ("s3", "s3a")
# Object stores: an object is visible only when it is whole. Their paths begin with the bucket; without one, a company's
# prefix would be taken for it.
BUCKETS = (*_S3, "gs", "gcs", "az", "abfs", "abfss")
# A connection of these serves one thread at a time: each thread has its own.
_ONE_THREAD = ("ftp",)
# Suffix while a file is stored, where files grow under their name. ``remove`` removes it too: an intent covers both.
_UNFINISHED = ".part"
# Timeout of an upload: PATIENCE seconds, and one more for each SLOWEST bytes.
PATIENCE = 600.0
SLOWEST = 64 << 10
# Seconds. AWS refuses signatures of version 4 that are valid for longer.
_LONGEST_URL = 7 * 24 * 3600


class FsspecStorage:
    """An fsspec filesystem, opened on first use in each process, without fsspec's caches of instances and listings."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.protocol = self.provider = url.partition("://")[0].lower()
        self.batch_bytes = 0
        self._url, self._options = url, dict(options)
        self._of_process, self._of_thread = SimpleNamespace(), threading.local()
        self.scratch = Scratch(lambda: Path(tempfile.gettempdir()) / f"jobkit-spool-{os.getuid()}")

    def __repr__(self) -> str:
        # Not by urlsplit, which takes a password with "/" or "#" in it for a part of the host.
        return f"{self.protocol}://{self._url.partition('://')[2].rpartition('@')[2].partition('?')[0]}"

    def spool_folder(self) -> Path:
        return self.scratch.folder()

    def publish(self, uploads: Sequence[Upload]) -> dict[str, BaseException]:
        for place, upload in enumerate(uploads):
            try:
                self._publish(*upload)
                upload.path.unlink(missing_ok=True)
            except BaseException as error:  # fsspec runs an event loop: CancelledError is no Exception
                # Give up on the others: a server that is silent would be waited for once per file.
                return {missed.key: error for missed in uploads[place:]}
        return {}

    def _publish(self, source: Path, key: str, content_type: str) -> None:
        filesystem, root = self._filesystem()
        path, size = f"{root}/{key}", source.stat().st_size
        if self.protocol == "memory":
            filesystem.pipe_file(path, source.read_bytes())  # put_file of fsspec's memory shows unfinished files
        elif self.protocol in _S3:
            parts = {"chunksize": _PART, "max_concurrency": _PARTS_AT_ONCE}
            _send(filesystem, source, path, **parts, ContentType=content_type)
        elif self._renames(filesystem):
            _make_remote_folders(filesystem, path.rpartition("/")[0])
            _send(filesystem, source, path + _UNFINISHED)
            filesystem.mv(path + _UNFINISHED, path)
        else:
            _send(filesystem, source, path)
        if (stored := filesystem.info(path)["size"]) != size:
            raise AssetError(f"the storage kept {stored} of {size} bytes")

    def open(self, key: str) -> BinaryIO:
        # Another thread may read the file than the one that opens it: it gets a connection of its own.
        filesystem, root = self._open_filesystem() if self.protocol in _ONE_THREAD else self._filesystem()
        if self.protocol == "memory":  # all files that its open() returns share one position
            return io.BytesIO(filesystem.cat_file(f"{root}/{key}"))
        # s3fs reads 50 MiB ahead by default.
        options = {"block_size": _PART} if self.protocol in _S3 else {}
        return cast("BinaryIO", filesystem.open(f"{root}/{key}", "rb", **options))

    def size(self, key: str) -> int | None:
        return None

    def remove(self, key: str) -> None:
        filesystem, root = self._filesystem()
        for path in (f"{root}/{key}", f"{root}/{key}{_UNFINISHED}")[: 1 + self._renames(filesystem)]:
            _remove(filesystem, path)

    def url(self, key: str, *, expires_in: int, content_type: str, disposition: str) -> str:
        if self.protocol not in _S3:
            raise AssetUrlUnavailable(self.provider)
        if expires_in > _LONGEST_URL:
            raise ValueError(f"expires_in is {expires_in} seconds; S3 signs for {_LONGEST_URL} (7 days) at most")
        filesystem, root = self._filesystem()
        headers = {"ResponseContentType": content_type, "ResponseContentDisposition": disposition}
        return str(filesystem.sign(f"{root}/{key}", expiration=expires_in, **headers))

    def _renames(self, filesystem: Any) -> bool:
        """Whether files grow under their name here, and can be renamed. The ``mv`` that others inherit copies the file,
        so that the copy would grow as well.
        """
        import fsspec

        inherited = fsspec.AbstractFileSystem.mv
        return self.protocol not in (*BUCKETS, "memory") and type(filesystem).mv is not inherited

    def _filesystem(self) -> tuple[Any, str]:
        holder: Any = self._of_thread if self.protocol in _ONE_THREAD else self._of_process
        opened: tuple[int, Any, str] | None = getattr(holder, "opened", None)
        if opened is None or opened[0] != os.getpid():
            opened = os.getpid(), *self._open_filesystem()
            # No lock: a forked child would find it held by a thread of its parent. The filesystem set first is used.
            former = getattr(holder, "opened", None)
            if former is None or former[0] != os.getpid():
                holder.opened = opened
            else:
                opened = former
        return opened[1], opened[2]

    def _open_filesystem(self) -> tuple[Any, str]:
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False, **self._options}
        if self.protocol in _S3:
            # Older signatures last for a day at most, and most servers refuse them.
            options["config_kwargs"] = {"signature_version": "s3v4", **(options.get("config_kwargs") or {})}
        try:
            filesystem, root = fsspec.core.url_to_fs(self._url, **options)
        except Exception as error:
            # Neither the driver's message nor its traceback: they may contain a password.
            names = ", ".join(sorted(self._options)) or "none"
            raise ConfigurationError(
                f"the driver of {self!r} cannot be set up, options {names}: {type(error).__name__}"
            ) from None
        return filesystem, str(root).rstrip("/")


def _send(filesystem: Any, source: Path, path: str, **options: Any) -> None:
    """Store a file, with a timeout by its size: the HTTP clients of s3fs and others have none while they send, and
    would wait for a silent server for ever.
    """
    size = source.stat().st_size
    patience, began = PATIENCE + size / SLOWEST, time.monotonic()
    if getattr(filesystem, "async_impl", False):
        options["timeout"] = patience
    try:
        filesystem.put_file(os.fspath(source), path, **options)
    except TimeoutError as error:
        if time.monotonic() - began < patience:
            raise
        raise AssetError(f"the storage did not take {size} bytes within {patience:.0f} seconds") from error


def _make_remote_folders(filesystem: Any, folder: str) -> None:
    """Create the missing parts of ``folder``. When two processes create one at once, the second is refused and tries
    again, a level deeper. Errors are left to ``put_file``.
    """
    for _ in range(folder.count("/") + 1):
        try:
            filesystem.makedirs(folder, exist_ok=True)
        except (TimeoutError, ConnectionError, EOFError):
            break
        except Exception:
            continue
        break


def _remove(filesystem: Any, path: str) -> None:
    try:
        filesystem.rm_file(path)
    except FileNotFoundError:
        pass
    except Exception:
        with contextlib.suppress(FileNotFoundError):  # FTP raises another error for a missing file
            filesystem.info(path)
            raise
