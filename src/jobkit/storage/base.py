"""An upload: a finished file on its way into a storage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, cast

from jobkit.storage.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Sequence


class Upload(NamedTuple):
    """A finished file on local disk, and where it shall be stored."""

    path: Path
    key: str
    content_type: str


class Storage(Protocol):
    """One place for objects. ``publish`` shows an object only when it is whole. Safe to share by threads."""

    provider: str

    scratch: Scratch

    #: Up to how many bytes of files one thread stores together in less time than several, each by itself.
    batch_bytes: int

    def spool_folder(self) -> Path:
        """A private local folder to make files in, from which ``publish`` is cheapest."""

    def publish(self, uploads: Sequence[Upload]) -> dict[str, BaseException]:
        """Store each file durably under its key; what was stored is no longer at its path. Each that was not, by its
        key, with the reason.
        """

    def open(self, key: str) -> BinaryIO:
        """The object as a seekable binary file; ``FileNotFoundError``."""

    def size(self, key: str) -> int | None:
        """How many bytes the object has, 0 when there is none; None when that would take a request."""

    def remove(self, key: str) -> None:
        """Remove exactly this object, or what ``publish`` left of it; nothing happens when there is none."""

    def url(self, key: str, *, expires_in: int, content_type: str, disposition: str) -> str:
        """Where anyone can get the object for ``expires_in`` seconds, with these headers; ``AssetUrlUnavailable``."""


def limited(file: BinaryIO, start: int, end: int) -> BinaryIO:
    """``file`` from ``start`` up to ``end``, as a buffered binary file of its own; closing it closes ``file``."""
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
