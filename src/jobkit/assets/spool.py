"""A file before it is stored: written to local disk, counted and hashed, and removed unless it is published."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobkit.assets.names import object_key
from jobkit.base.ids import new_id
from jobkit.base.text import storable
from jobkit.errors import AssetEmpty, AssetError, AssetTooLarge
from jobkit.storage.base import Storage, Upload
from jobkit.types import Body, StoredObject

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("jobkit")

CHUNK = 1 << 20
# Bytes that are hashed and then written at once: they stay in the processor's cache between the two.
_PIECE = 1 << 19


class Spool(io.RawIOBase):
    """A private (mode 0600), seekable file to write one output into. Used by one thread at a time.

    A write beyond ``limit`` bytes raises ``AssetTooLarge``. After a failed write every further write and ``seal`` raise
    its error again, so that no cut file is stored when a renderer swallows it.
    """

    #: The stored object, once the ``with`` block of ``AssetStore.writer`` has ended.
    stored: StoredObject | None = None

    def __init__(self, folder: Path, name: str, *, filename: str | None, limit: int | float, limit_source: str) -> None:
        super().__init__()
        self.path = folder / f"{name}.part"
        self.filename = filename
        self._limit, self._limit_source = limit, limit_source
        self._hash: Any = hashlib.sha256()
        self._hashed = 0
        self._refusal: BaseException | None = None
        self._file = io.FileIO(self.path, "x+", opener=_private)
        self._gone = False
        #: Whether a storage has moved the file away.
        self.released = False
        self._position = self.size = 0

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        """Append or overwrite at the current position. All of ``data`` is written."""
        view = _view(data)
        position = self._position
        if not view:
            self._check(self.size)
            return 0
        self._check(position + len(view))
        written = 0
        try:
            in_order = position == self._hashed
            if not in_order:
                self._hashed = -1  # written out of order: ``seal`` hashes the file
            while written < len(view):
                piece = view[written : written + _PIECE]
                if in_order:
                    self._hash.update(piece)
                    self._hashed += len(piece)
                while piece:
                    count = self._file.write(piece)
                    written += count
                    self._position += count
                    piece = piece[count:]
            self.size = max(self.size, position + written)
        except BaseException as error:  # a full disk, a signal: whoever swallows it must not store a cut file
            self._refusal = error
            raise
        return written

    def readinto(self, buffer: Any, /) -> int:
        count = self._file.readinto(buffer)
        self._position += count
        return count

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    def truncate(self, size: int | None = None, /) -> int:
        self._check(self._position if size is None else size)
        self._hashed = -1
        self.size = self._file.truncate(size)
        return self.size

    def fill(self, body: Body) -> None:
        """Write all bytes of ``body``. ``TypeError`` when it does not consist of bytes."""
        with closing(chunks(body)) as pieces:
            for piece in pieces:
                self.write(piece)

    @property
    def refused(self) -> bool:
        """Whether a write has failed: over the limit, disk full, interrupted."""
        return self._refusal is not None

    def seal(self) -> str:
        """The sha256 of the whole file, in hex; the file may be closed. ``AssetEmpty`` when it has no bytes; the error
        of a failed write.
        """
        if self._refusal is not None:
            raise self._refusal
        if self.size == 0:
            raise AssetEmpty(self.filename)
        if (found := os.stat(self.path).st_size) != self.size:
            raise AssetError(f"{self.filename or 'file'!r} has {found} bytes on disk, {self.size} were written")
        if self._hashed != self.size:
            with open(self.path, "rb", buffering=0) as file:
                self._hash = hashlib.file_digest(file, "sha256")
            self._hashed = self.size
        digest: str = self._hash.hexdigest()
        return digest

    def close(self) -> None:
        """Close the file, which stays on disk for ``publish`` or ``discard``."""
        if not self.closed:
            self._file.close()
        super().close()

    def release(self) -> None:
        """Mark the file as moved away by a storage: ``discard`` removes nothing."""
        self._gone = self.released = True

    def discard(self) -> None:
        """Close and remove the file. A file that cannot be removed goes with the folder of this process."""
        self.close()
        if not self._gone:
            self._gone = True
            try:
                self.path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("%s could not be removed, and stays until this process has ended: %s", self.path, error)

    def _check(self, size: int) -> None:
        if self._refusal is None and size > self._limit:
            self._refusal = AssetTooLarge(self.filename, self._limit, self._limit_source)
        if self._refusal is not None:
            raise self._refusal


def chunks(body: Body) -> Generator[bytes | memoryview]:
    """``body`` in pieces. It is bytes-like, a path, a binary file (not closed) or an iterable of bytes."""
    if isinstance(body, bytes | bytearray | memoryview):
        view = _view(body)
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]
    elif isinstance(body, os.PathLike):
        with open(body, "rb", buffering=0) as file:
            yield from _read(file)
    elif isinstance(cast("object", body), str):
        raise TypeError("body is text: encode it, or pass a pathlib.Path to name a file")
    elif hasattr(body, "read"):
        yield from _read(body)
    elif isinstance(body, Iterable):
        for chunk in body:
            yield _bytes(chunk, "body yields")
    else:
        raise TypeError(f"body must be bytes, a path, a binary file or an iterable of bytes, not {type(body).__name__}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read(file: Any) -> Iterator[bytes]:
    while len(chunk := _bytes(file.read(CHUNK), "body's read() returns")):
        yield chunk


def _view(data: Any) -> memoryview:
    view = memoryview(data)
    if not view.nbytes:
        return memoryview(b"")
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


def _bytes(chunk: object, what: str) -> Any:
    if not isinstance(chunk, bytes | bytearray | memoryview):
        raise TypeError(f"{what} {type(chunk).__name__}, not bytes")
    return chunk


# Media type of RFC 9110 section 8.3.1. Parameters are only checked for control characters.
_CONTENT_TYPE = re.compile(r"([A-Za-z0-9!#$%&'*+.^_`|~-]+/[A-Za-z0-9!#$%&'*+.^_`|~-]+)([ \t]*;[\t\x20-\x7e]*)?")


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest size of a file in bytes, and the setting it comes from, for messages."""

    max_bytes: int | float
    source: str


class StagedFile:
    """A file with its key that will be stored. Nothing of it is in the storage before ``publish``."""

    def __init__(
        self,
        storage: Storage,
        company_id: str,
        *,
        namespace: str,
        filename: str | None,
        content_type: str,
        limit: Limit,
        at: datetime,
    ) -> None:
        if filename is not None:
            storable(filename, "original_filename", blank=True, limit=1_024, controls=False)
        self.company_id = company_id
        self.filename = filename
        self.content_type = _checked_type(content_type)
        storable(namespace, "namespace", limit=255)
        unique = new_id()
        self.key = object_key(company_id, namespace, filename, unique=unique, at=at)
        self._storage = storage
        self.spool = Spool(
            storage.spool_folder(), unique.hex, filename=filename, limit=limit.max_bytes, limit_source=limit.source
        )

    def seal(self, *, recorded: bool) -> StoredObject:
        """Close the spool file and describe the object to be stored. ``AssetEmpty``; the error of a failed write.

        ``recorded``: whether the key is recorded as an intent.
        """
        sha256 = self.spool.seal()
        self.spool.close()
        return StoredObject(
            provider=self._storage.provider,
            object_key=self.key,
            content_type=self.content_type,
            byte_size=self.spool.size,
            sha256=sha256,
            original_filename=self.filename,
            recorded=recorded,
        )

    @property
    def stored(self) -> bool:
        """Whether ``publish`` has stored it."""
        return self.spool.released

    def publish(self) -> None:
        """Store the sealed file durably under its key. The spool file is gone afterwards, also on errors."""
        try:
            for failure in publish([self]).values():
                raise failure
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the spool file. A published object without a row is left to garbage collection."""
        self.spool.discard()


def publish(drafts: Sequence[StagedFile]) -> dict[str, BaseException]:
    """Store sealed files of one storage, each durably under its key. The exceptions of files that were not stored, by
    key; their spool files stay, to be published again or discarded.
    """
    uploads = [Upload(draft.spool.path, draft.key, draft.content_type) for draft in drafts]
    failures = drafts[0]._storage.publish(uploads)
    for draft in drafts:
        if draft.key not in failures:
            draft.spool.release()
    return failures


def _checked_type(content_type: str) -> str:
    cleaned = storable(content_type, "content_type", limit=255).strip()
    match = _CONTENT_TYPE.fullmatch(cleaned)
    if match is None:
        raise ValueError(f"content_type {cleaned!r:.80} is not a media type such as 'application/pdf'")
    return match[1].lower() + (match[2] or "")  # parameter values may be case-sensitive
