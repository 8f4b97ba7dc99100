"""What a storage does, and a range of bytes of a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, cast

from jobkit.storage.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Sequence


class Upload(NamedTuple):
    """A finished file on local disk, and the key to store it under."""

    path: Path
    key: str
    content_type: str


class Storage(Protocol):
    """Objects by key. An object is visible only when it is whole. Threads may share a storage."""

    provider: str
    scratch: Scratch

    #: Up to how many bytes of files one thread stores together in less time than several, each by itself.
    batch_bytes: int

    def spool_folder(self) -> Path:
        """A private local folder for unfinished files, on the storage's own disk if it has one."""

    def publish(self, uploads: Sequence[Upload]) -> dict[str, BaseException]:
        """Store each file durably under its key, and remove it from its path. The exceptions of files that were not
        stored, by key.
        """

    def open(self, key: str) -> BinaryIO:
        """The object as a seekable binary file. ``FileNotFoundError`` when there is none."""

    def size(self, key: str) -> int | None:
        """The object's size in bytes, 0 when there is none; None where asking would take a request."""

    def remove(self, key: str) -> None:
        """Remove the object, or what an interrupted ``publish`` left of it. No error when there is none."""

    def url(self, key: str, *, expires_in: int, content_type: str, disposition: str) -> str:
        """A URL that gives anyone the object with these headers for ``expires_in`` seconds. ``AssetUrlUnavailable``
        where the storage signs none.
        """


def byte_range(file: BinaryIO, start: int, end: int) -> BinaryIO:
    """The bytes ``[start, end)`` of ``file`` as a buffered binary file; closing it closes ``file``."""
    return cast("BinaryIO", io.BufferedReader(_Window(file, start, end), buffer_size=1 << 16))


class _Window(io.RawIOBase):
    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._start, self._end = file, start, end
        self._position = start
        self._moved = start > 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        wanted = min(len(buffer), self._end - self._position)
        if wanted <= 0:
            return 0
        if self._moved:
            self._file.seek(self._position)
            self._moved = False
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"whence must be 0, 1 or 2, not {whence!r}")
        position = (self._start, self._position, self._end)[whence] + offset
        if position < self._start:
            raise ValueError(f"cannot seek before the first byte, to {position - self._start}")
        self._position, self._moved = position, True
        return position - self._start

    def tell(self) -> int:
        return self._position - self._start

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
