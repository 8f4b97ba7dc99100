"""A filesystem with planned faults, to test an app whose storage fails.

::

    plan = FaultPlan(Fault("put_file", at="after"))          # it is stored, and then the answer is lost
    with faulty_filesystem(plan, target="memory"):
        assets = jobkit.AssetStore("faulty://anywhere", engine=engine)
"""

from __future__ import annotations

import io
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from fsspec import AbstractFileSystem, get_filesystem_class
from fsspec.registry import _registry as _implementations


def _planned() -> BaseException:
    return OSError("planned fault")


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault in calls of ``operation``: a method of fsspec such as ``put_file``, ``mv``, ``info``, ``open`` or
    ``rm_file``; or ``read``, the reading of an opened file.

    ``action``: ``raise`` the ``error``; ``cut`` the data at byte ``at`` without an error; ``flip`` a bit of that byte;
    ``wait`` for ``until()`` to return, ``before`` or ``after`` the call. ``at``: ``before`` the storage is called,
    ``after`` it has returned (the reply is lost), or a number of bytes that are stored or read before the error. The
    first ``skip`` calls succeed, the next ``times`` calls fail, all of them for None.
    """

    operation: str
    action: Literal["raise", "cut", "flip", "wait"] = "raise"
    at: Literal["before", "after"] | int = "before"
    error: BaseException = field(default_factory=_planned)
    until: Callable[[], object] = lambda: None
    skip: int = 0
    times: int | None = 1


class FaultPlan:
    """The faults of a filesystem. ``calls`` lists every call as (operation, path), ``fired`` every fault that occurred.

    Threads may share a plan.
    """

    def __init__(self, *faults: Fault) -> None:
        self.faults = list(faults)
        self.calls: list[tuple[str, str]] = []
        self.fired: list[Fault] = []
        self._seen = [0] * len(faults)
        self._lock = threading.Lock()
        self._draw: Callable[[str], Fault | None] = lambda operation: None

    @classmethod
    def seeded(
        cls, seed: int, *, rate: float = 0.2, operations: tuple[str, ...] = ("put_file", "mv", "info", "rm_file")
    ) -> FaultPlan:
        """Each call of ``operations`` raises with a probability of ``rate``, at a random moment; the same ones for the
        same seed and order of calls.
        """
        plan, source = cls(), random.Random(seed)

        def draw(operation: str) -> Fault | None:
            if operation not in operations or source.random() >= rate:
                return None
            at: Any = source.choice(["before", "after", source.randrange(1_000)])
            return Fault(operation, at=at, error=OSError(f"fault {len(plan.fired)} of seed {seed}"))

        plan._draw = draw
        return plan

    def next(self, operation: str, path: str) -> Fault | None:
        """Record a call; its fault, if any."""
        with self._lock:
            self.calls.append((operation, path))
            fault = self._draw(operation)
            for number, planned in enumerate(self.faults):
                if fault is None and planned.operation == operation:
                    self._seen[number] += 1
                    count = self._seen[number] - planned.skip
                    if count >= 1 and (planned.times is None or count <= planned.times):
                        fault = planned
            if fault is not None:
                self.fired.append(fault)
            return fault


class FaultyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Passes calls on to ``target``, except where ``plan`` has a fault. fsspec does not cache it."""

    protocol = "faulty"
    cachable = False

    def __init__(self, *, plan: FaultPlan, target: AbstractFileSystem, **options: Any) -> None:
        super().__init__(**options)
        self.plan, self.target = plan, target

    def put_file(self, lpath: str, rpath: str, **options: Any) -> Any:
        def part(data: bytes) -> None:
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                self.target.put_file(file.name, rpath, **options)

        whole = lambda: self.target.put_file(lpath, rpath, **options)  # noqa: E731
        return self._perform("put_file", rpath, whole, lambda: Path(lpath).read_bytes(), part)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any:
        def part(data: bytes) -> None:
            self.target.pipe_file(path, data, **options)

        return self._perform("pipe_file", path, lambda: part(value), lambda: value, part)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        """Open for reading only; files are written with ``put_file`` and ``pipe_file``."""
        if mode != "rb":
            raise NotImplementedError(f"a faulty filesystem opens files for reading, not with mode {mode!r}")
        file = self._perform("open", path, lambda: self.target.open(path, mode, **options))
        return _Reader(file, self.plan.next("read", path))

    def _perform(
        self,
        operation: str,
        path: str,
        whole: Callable[[], Any],
        data: Callable[[], bytes] | None = None,
        send: Callable[[bytes], None] | None = None,
    ) -> Any:
        fault = self.plan.next(operation, path)
        if fault is None:
            return whole()
        if fault.action == "wait":
            result: Any = whole() if fault.at == "after" else None
            fault.until()
            return result if fault.at == "after" else whole()
        if fault.action == "raise" and (fault.at == "before" or (send is None and fault.at != "after")):
            raise fault.error
        if isinstance(fault.at, int) and data is not None and send is not None:
            result = send(_spoiled(data(), fault))
        else:
            result = whole()
        if fault.action == "raise":
            raise fault.error
        return result


def _delegated(name: str) -> Callable[..., Any]:
    def method(self: FaultyFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        call = getattr(self.target, name)
        return self._perform(name, path, lambda: call(path, *arguments, **options))

    method.__name__ = name
    return method


for _name in (
    *("info", "exists", "isfile", "isdir", "cat_file", "rm_file", "rm", "mv", "cp_file", "sign", "created", "modified"),
    *("ls", "find", "glob", "walk", "expand_path", "mkdir", "makedirs", "mkdirs"),
):
    setattr(FaultyFileSystem, _name, _delegated(_name))


class _Reader(io.RawIOBase):
    """An opened file with at most one fault in its reading."""

    def __init__(self, file: Any, fault: Fault | None) -> None:
        self._file, self._fault = file, fault

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        start, fault = self._file.tell(), self._fault
        data = self._file.read(len(buffer))
        at = fault.at if fault is not None and isinstance(fault.at, int) else 0
        if fault is not None and fault.action == "wait":
            fault.until()
        elif fault is not None and fault.action == "raise" and start + len(data) > at:
            raise fault.error
        elif fault is not None and fault.action != "raise":
            data = _spoiled(data, fault, offset=start)
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return cast("int", self._file.seek(offset, whence))

    def tell(self) -> int:
        return cast("int", self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _spoiled(data: bytes, fault: Fault, offset: int = 0) -> bytes:
    """``data``, which begins at byte ``offset`` of its file, cut or flipped by the fault."""
    place = (fault.at if isinstance(fault.at, int) else 0) - offset
    if fault.action != "flip":
        return data[: max(0, place)]
    if not 0 <= place < len(data):
        return data
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@contextmanager
def faulty_filesystem(plan: FaultPlan, *, protocol: str = "faulty", target: str = "memory") -> Iterator[FaultPlan]:
    """Within the block, a URL ``protocol://…`` opens what ``target://…`` does, with the faults of ``plan``.

    ``protocol`` may be ``target`` itself: then every store of that protocol that connects within the block has them.
    """
    driver: Any = get_filesystem_class(target)

    def meant(url: str) -> str:
        return target + "://" + url.partition("://")[2] if "://" in url else url

    class Planned(FaultyFileSystem):
        def __init__(self, **options: Any) -> None:
            super().__init__(plan=plan, target=driver(skip_instance_cache=True, **options))

        @classmethod
        def _strip_protocol(cls, path: Any) -> Any:
            return driver._strip_protocol(meant(path) if isinstance(path, str) else path)

        @staticmethod
        def _get_kwargs_from_urls(path: str) -> Any:
            return driver._get_kwargs_from_urls(meant(path))

    former = _implementations.get(protocol)
    _implementations[protocol] = Planned
    try:
        yield plan
    finally:
        if former is None:
            del _implementations[protocol]
        else:
            _implementations[protocol] = former
