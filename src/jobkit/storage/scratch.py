"""A private folder of this process for unfinished files; those of dead processes are removed.

A process holds a lock on its folder (``flock``) while it lives, and however it ends, the kernel releases it. So a
folder that can be locked belongs to a dead process, whatever pids and containers there are. This says nothing about
another machine, since network file systems keep such locks local or have none: a folder of another machine is removed
only when nothing in it has changed for a week.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobkit.base.forks import reset_in_children
from jobkit.base.ids import new_id
from jobkit.errors import ConfigurationError

logger = logging.getLogger("jobkit")

# Seconds without a change after which a folder of another machine counts as abandoned.
ABANDONED = 7 * 24 * 3600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Scratch:
    """A folder within ``base()``, created on first use and again in each forked child. Threads may share it."""

    def __init__(self, base: Callable[[], Path]) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._held: _Held | None = None
        reset_in_children(self)

    def folder(self) -> Path:
        """A folder that only this object uses. When it is created, the folders of dead processes are removed.

        ``ConfigurationError`` when ``base`` belongs to another user or is a symbolic link.
        """
        held = self._held
        if held is None or not held.stands():
            with self._lock:
                held = self._held
                if held is None or not held.stands():
                    self._held = held = self._make()
                    weakref.finalize(self, held.release)
                    self.sweep()
        return held.folder

    def sweep(self) -> int:
        """Remove the folders of dead processes; their number. One that cannot be removed is left to the next call."""
        base, count = self._base(), 0
        with suppress(OSError):
            for folder in base.iterdir():
                with suppress(OSError):
                    count += _settle(folder)
        if count:
            logger.info("removed the unfinished files of %d dead processes from %s", count, base)
        return count

    def _make(self) -> _Held:
        base = self._base()
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if base.is_symlink() or base.stat().st_uid != os.getuid():
            raise ConfigurationError(
                f"{base} is a symbolic link or belongs to someone else: remove it; or set TMPDIR to a folder of your "
                "own, where it is in the one for temporary files"
            )
        while (held := _hold(base / f"{_machine()}.{new_id().hex}")) is None:
            pass
        return held

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        if self._held is not None and self._held.holds():
            os.close(self._held.descriptor)  # only a copy: the parent's lock stays
        self._held = None


@dataclass(frozen=True, slots=True)
class _Held:
    """A folder of this process, and the descriptor that locks it."""

    folder: Path
    descriptor: int
    inode: tuple[int, int] | None
    pid: int

    def stands(self) -> bool:
        """Whether the folder exists and is locked still. A cleaner of temporary files may have removed it, or the
        process has closed all descriptors to become a daemon, or has forked without Python's knowledge.
        """
        return self.pid == os.getpid() and self.inode == _inode(self.folder) and self.holds()

    def holds(self) -> bool:
        """Whether the descriptor is still the folder's."""
        return self.inode == _inode(self.descriptor)

    def release(self) -> None:
        """Remove the folder if it is empty, and release the lock. Files in it are removed by the next process."""
        if self.pid != os.getpid():
            return
        with suppress(OSError):
            self.folder.rmdir()
        if self.holds():
            os.close(self.descriptor)


def _hold(folder: Path) -> _Held | None:
    """Create and lock a folder. None when another process removed it before it was locked."""
    folder.mkdir(mode=0o700)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a file system without locks: its age decides
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    held = _Held(folder, descriptor, _inode(descriptor), os.getpid())
    if held.stands():
        return held
    held.release()
    return None


def _settle(path: Path) -> bool:
    """Remove a file or folder of the base when its process is known or presumed to be dead."""
    if path.is_symlink() or not path.is_dir():
        return _idle(path) > ABANDONED and _remove(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            proved = path.name.startswith(f"{_machine()}.")
        except BlockingIOError:
            return False
        except OSError:
            proved = False
        return (proved or _idle(path) > ABANDONED) and _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not os.path.lexists(path)


def _idle(path: Path) -> float:
    """Seconds since the last change in ``path``, infinite when it does not exist."""
    found = [path, *path.rglob("*")]
    times = [os.lstat(one).st_mtime for one in found if os.path.lexists(one)]
    return time.time() - max(times, default=-float("inf"))


def _inode(file: Path | int) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _machine() -> str:
    """The same for all processes whose locks one kernel keeps: its boot id, else a hash of the host name."""
    try:
        return _BOOT_ID.read_text().strip().replace("-", "")
    except OSError:
        return hashlib.sha256(platform.node().encode()).hexdigest()[:32]
