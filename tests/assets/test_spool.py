"""A file while it is being made: counted, hashed and limited as it is written, whatever it is written from."""

from __future__ import annotations

import array
import csv
import hashlib
import io
import itertools
import os
import resource
import stat
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobkit.assets.spool import CHUNK, Spool
from jobkit.errors import AssetEmpty, AssetError, AssetTooLarge
from tests.support.names import named

NewSpool = Callable[..., Spool]


@pytest.fixture
def new(tmp_path: Path) -> Iterator[NewSpool]:
    made: list[Spool] = []

    def new(limit: int | float = float("inf")) -> Spool:
        made.append(Spool(tmp_path, f"s{len(made)}", filename="a.bin", limit=limit, limit_source="a test"))
        return made[-1]

    yield new
    for spool in made:
        spool.discard()
    assert list(tmp_path.glob("*.part")) == []


def assert_whole(spool: Spool, content: bytes) -> None:
    assert spool.seal() == hashlib.sha256(content).hexdigest()
    assert spool.size == len(content)
    assert spool.path.read_bytes() == content


class Trickle(io.RawIOBase):
    """A file that gives one byte at a time."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._content.readinto(memoryview(buffer)[:1])


def path_of(content: bytes, folder: Path) -> Path:
    path = folder / "body.bin"
    path.write_bytes(content)
    return path


BIG = os.urandom(1 << 10) * 2_500  # two and a half chunks
BODIES: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda content, _: content,
    "bytearray": lambda content, _: bytearray(content),
    "memoryview": lambda content, _: memoryview(content),
    "a strided memoryview": lambda content, _: memoryview(b"".join(bytes([b, 0]) for b in content))[::2],
    "a memoryview of numbers": lambda content, _: memoryview(array.array("H", content * 2)),
    "path": path_of,
    "binary file": lambda content, folder: open(path_of(content, folder), "rb"),  # noqa: SIM115
    "BytesIO": lambda content, _: io.BytesIO(content),
    "a file that trickles": lambda content, _: Trickle(content[:500]),
    "list": lambda content, _: [content[:3], b"", content[3:]],
    "generator": lambda content, _: (content[i : i + 7919] for i in range(0, len(content), 7919)),
    "iterator of other buffers": lambda content, _: iter([bytearray(content[:9]), memoryview(content[9:])]),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("content", [b"x", b"whole content", BIG], ids=["one byte", "small", "big"])
def test_any_kind_of_body_is_written_whole(kind: str, content: bytes, new: NewSpool, tmp_path: Path) -> None:
    body = BODIES[kind](content, tmp_path)
    expected = content
    if kind == "a file that trickles":
        expected = content[:500]
    elif kind == "a memoryview of numbers":
        expected = body.tobytes()
    spool = new()
    spool.fill(body)
    assert_whole(spool, expected)
    if hasattr(body, "closed"):
        assert not body.closed
        body.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("text", "body is text: encode it"),
        (io.StringIO("text"), r"body's read\(\) returns str, not bytes"),
        (io.StringIO(""), r"body's read\(\) returns str, not bytes"),
        (iter(["text"]), "body yields str, not bytes"),
        ([b"ok", 7], "body yields int, not bytes"),
        ({"a": 1}, "body yields str, not bytes"),
        ([None], "body yields NoneType, not bytes"),
        (array.array("I", [1]), "body yields int, not bytes"),
        (None, "not NoneType"),
        (7, "not int"),
        (object(), "not object"),
    ],
    ids=named,
)
def test_a_body_that_is_not_bytes_is_refused_with_what_it_is(body: Any, message: str, new: NewSpool) -> None:
    with pytest.raises(TypeError, match=message):
        new().fill(body)


def test_a_file_that_has_nothing_yet_is_not_taken_for_its_end(new: NewSpool) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, b"half")
    with (
        open(writing, "wb"),
        open(reading, "rb", buffering=0) as body,
        pytest.raises(TypeError, match="returns NoneType"),
    ):
        new().fill(body)


@pytest.mark.parametrize("body", [b"", bytearray(), [], [b"", b""], io.BytesIO(), iter(())], ids=named)
def test_an_empty_body_is_refused_by_name(body: Any, new: NewSpool) -> None:
    spool = new()
    spool.fill(body)
    with pytest.raises(AssetEmpty, match=r"'a\.bin' is empty"):
        spool.seal()


def test_exactly_the_limit_passes_and_one_more_byte_does_not(new: NewSpool) -> None:
    fits = new(limit=CHUNK)
    fits.fill(b"x" * CHUNK)
    assert_whole(fits, b"x" * CHUNK)
    over = new(limit=CHUNK)
    with pytest.raises(AssetTooLarge, match=rf"'a\.bin' is larger than the limit of {CHUNK} bytes \(a test\)"):
        over.fill(b"x" * (CHUNK + 1))


@pytest.mark.parametrize(("size", "fits"), [(1, True), (2, False)])
def test_a_limit_with_a_fraction_admits_its_whole_part(size: int, fits: bool, new: NewSpool) -> None:
    spool = new(limit=1.5)
    if fits:
        spool.fill(b"x" * size)
    else:
        with pytest.raises(AssetTooLarge):
            spool.fill(b"x" * size)


def test_an_infinite_body_ends_at_the_limit_with_flat_memory(new: NewSpool) -> None:
    spool = new(limit=200 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(AssetTooLarge):
            spool.fill(b"\0" * CHUNK for _ in itertools.count())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert spool.path.stat().st_size <= 200 << 20


def cut_and_seal(spool: Spool) -> None:
    spool.seek(0)
    spool.truncate()
    spool.seal()


@pytest.mark.parametrize("after", [lambda s: s.write(b"6"), lambda s: s.write(b""), Spool.seal, cut_and_seal])
def test_a_swallowed_refusal_comes_back(after: Callable[[Spool], Any], new: NewSpool) -> None:
    spool = new(limit=10)
    spool.write(b"12345")
    with pytest.raises(AssetTooLarge) as first:
        spool.write(b"6" * 6)
    with pytest.raises(AssetTooLarge) as again:
        after(spool)
    assert again.value is first.value
    assert spool.refused


@pytest.mark.parametrize("grow", [lambda s: s.truncate(11), lambda s: (s.seek(11), s.truncate())], ids=["size", "here"])
def test_truncate_cannot_grow_a_file_past_its_limit(grow: Callable[[Spool], Any], new: NewSpool) -> None:
    spool = new(limit=10)
    spool.write(b"x")
    with pytest.raises(AssetTooLarge):
        grow(spool)
    assert spool.path.stat().st_size == 1


def test_a_hole_counts_towards_the_limit(new: NewSpool) -> None:
    spool = new(limit=10)
    spool.seek(10)
    with pytest.raises(AssetTooLarge):
        spool.write(b"x")


def test_a_full_disk_that_is_swallowed_ships_nothing(new: NewSpool) -> None:
    spool = new()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            spool.write(b"x" * 1_500)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OSError, match="File too large") as again:
        spool.seal()
    assert again.value is full.value


class Interrupted:
    """A file whose first write is interrupted, as by a signal, before or after its bytes are on disk."""

    def __init__(self, file: Any, when: str) -> None:
        self._file, self._when = file, when

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, piece: Any) -> int:
        when, self._when = self._when, ""
        written: int = 0 if when == "before" else self._file.write(piece)
        if when:
            raise KeyboardInterrupt(when)
        return written


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_write_that_is_swallowed_ships_nothing(new: NewSpool, when: str) -> None:
    spool = new()
    spool.write(b"x")
    spool._file = Interrupted(spool._file, when)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt, match=when):
        spool.write(b"1234")
    for go_on in (lambda: spool.write(b"more"), spool.seal):
        with pytest.raises(KeyboardInterrupt, match=when):
            go_on()
    assert spool.refused


def test_a_file_that_was_changed_by_others_is_not_sealed(new: NewSpool) -> None:
    spool = new()
    spool.write(b"1234")
    with open(spool.path, "ab") as file:
        file.write(b"more")
    with pytest.raises(AssetError, match=r"^'a\.bin' has 8 bytes on disk, 4 were written$"):
        spool.seal()


def test_the_file_is_private(new: NewSpool) -> None:
    assert stat.S_IMODE(new().path.stat().st_mode) == 0o600


def test_a_name_that_is_taken_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "taken.part").write_bytes(b"someone else's")
    with pytest.raises(FileExistsError):
        Spool(tmp_path, "taken", filename=None, limit=1, limit_source="a test")
    assert (tmp_path / "taken.part").read_bytes() == b"someone else's"


Step = tuple[str, Any]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.binary(max_size=40)),
        st.tuples(st.just("seek"), st.integers(0, 60)),
        st.tuples(st.just("end"), st.just(0)),
        st.tuples(st.just("truncate"), st.none() | st.integers(0, 60)),
        st.tuples(st.just("read"), st.integers(0, 20)),
    ),
    max_size=15,
)


@given(STEPS, st.booleans())
@example([("write", b"abcd"), ("seek", 2), ("write", b"efgh"), ("seek", 8), ("write", b"x")], False)
@example([("seek", 1), ("write", b"")], False)
def test_it_behaves_like_a_file_and_its_hash_is_that_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step], closed: bool
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    spool = Spool(folder, "s", filename=None, limit=1_000, limit_source="a test")
    with open(folder / "model", "w+b", buffering=0) as model:
        for file in (spool, model):
            for step, value in steps:
                if step == "write":
                    file.write(value)
                elif step == "seek":
                    file.seek(value)
                elif step == "end":
                    file.seek(0, 2)
                elif step == "truncate":
                    file.truncate(value)
                else:
                    file.read(value)
        assert spool.tell() == model.tell()
    content = (folder / "model").read_bytes()
    if closed:
        spool.close()
    if content:
        assert_whole(spool, content)
    else:
        with pytest.raises(AssetEmpty):
            spool.seal()
    spool.discard()


def test_libraries_write_into_it_as_into_any_file(new: NewSpool) -> None:
    archive = new()
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("a.txt", "a" * 5_000)
        with out.open("b.txt", "w") as entry:
            entry.write(b"b")
    archive.close()
    assert archive.seal() == hashlib.sha256(archive.path.read_bytes()).hexdigest()
    with zipfile.ZipFile(archive.path) as back:
        assert back.read("a.txt") == b"a" * 5_000
        assert back.testzip() is None
    table = new()
    with io.TextIOWrapper(table, encoding="utf-8", newline="") as text:
        csv.writer(text).writerows([["é", 1], ["b", 2]])
    assert_whole(table, "é,1\r\nb,2\r\n".encode())


@pytest.mark.parametrize("at_most", [None, 1, 300_000], ids=["whole", "byte by byte", "in parts"])
def test_one_large_write_is_whole_however_much_the_system_takes_at_a_time(at_most: int | None, new: NewSpool) -> None:
    content = os.urandom(3_001) * (5 if at_most == 1 else 500)
    spool = new()
    if at_most is not None:
        spool._file.close()
        spool._file = Reluctant(spool.path, at_most)
    assert spool.write(content) == len(content)
    assert_whole(spool, content)
    spool.seek(1_000)
    assert spool.write(content) == len(content)
    assert_whole(spool, content[:1_000] + content)


class Reluctant(io.FileIO):
    """A file that takes no more than ``at_most`` bytes of a write, as a system may."""

    def __init__(self, path: Path, at_most: int) -> None:
        super().__init__(path, "w+")
        self._at_most = at_most

    def write(self, data: Any, /) -> int:
        return super().write(memoryview(data)[: self._at_most])
