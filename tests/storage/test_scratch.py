"""Unfinished files: those of living processes stay, those of dead ones go, whoever died and however."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from jobkit import AssetStore, ConfigurationError
from jobkit.storage import scratch
from jobkit.storage.scratch import ABANDONED, Scratch
from tests.support.files import put

# Half of a file and a renderer's folder are there when it says so; the rest comes when it is told to go on.
WRITER = """
import os, sys
from jobkit import AssetStore
store = AssetStore(sys.argv[1])
if sys.argv[2:] == ["fork"]:
    store.spool_folder()
    if os.fork():
        sys.stdin.readline()
work = store.spool_folder() / "work-1" / "deep"
work.mkdir(parents=True)
(work / "page").write_bytes(b"x")
with store.writer("acme", original_filename="a", content_type="text/plain") as out:
    out.write(b"half")
    print(os.getpid(), store.spool_folder().name, flush=True)
    sys.stdin.readline()
    out.write(b" whole")
print(out.stored.byte_size, flush=True)
"""


@contextmanager
def writer(url: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A process in the midst of a file, its pid, and the name of its folder."""
    command = [sys.executable, "-c", WRITER, url, *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            pid, name = process.stdout.readline().split()
            yield process, int(pid), name
        finally:
            process.kill()


def left(base: Path) -> set[str]:
    return {path.name for path in base.iterdir()}


def make(base: Path, name: str, *, age: float) -> None:
    """What a process left behind, ``age`` seconds ago."""
    (base / name / "work").mkdir(parents=True)
    (base / name / "work" / "half.part").write_bytes(b"x")
    then = time.time() - age
    for path in (*(base / name).rglob("*"), base / name):
        os.utime(path, (then, then))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def mine(base: Path) -> Scratch:
    return Scratch(lambda: base)


@pytest.fixture(params=["disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A storage, and the folder that its processes share for unfinished files."""
    if request.param == "disk":
        return (tmp_path / "assets").as_uri(), tmp_path / "assets" / ".spool"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return "memory://scratch", tmp_path / f"jobkit-spool-{os.getuid()}"


# --- who died


def test_what_a_killed_process_left_goes_at_the_next_ones_first_file_and_a_living_ones_file_is_finished(
    place: tuple[str, Path],
) -> None:
    url, base = place
    with writer(url) as (dead, _, lost), writer(url) as (alive, _, kept):
        dead.kill()
        dead.wait()
        assert left(base) == {lost, kept}
        store = AssetStore(url)
        put(store)
        assert left(base) == {kept, store.spool_folder().name}
        assert alive.communicate("\n", timeout=60)[0] == "10\n"
    assert kept in left(base)  # its working folder was never removed, as if it had died
    put(AssetStore(url))
    assert kept not in left(base)


def test_a_sweep_for_garbage_removes_them_too_and_a_dry_run_does_not(tmp_path: Path, sqlite_database: Any) -> None:
    store = AssetStore(tmp_path / "assets", engine=sqlite_database.engine)
    put(store)
    with writer(str(tmp_path / "assets")) as (process, _, lost):
        process.kill()
        process.wait()
        store.collect_garbage()
        assert lost in left(tmp_path / "assets" / ".spool")
        store.collect_garbage(dry_run=False)
        assert lost not in left(tmp_path / "assets" / ".spool")


def test_a_forked_child_has_a_folder_of_its_own_and_holds_nothing_of_its_dead_parents(base: Path) -> None:
    with writer(str(base.parent), "fork") as (parent, child, name):
        base = base.parent / ".spool"
        of_parent = {entry for entry in left(base) if not entry.startswith(name)}
        assert (len(of_parent), len(left(base))) == (1, 2)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        try:
            assert Scratch(lambda: base).sweep() == 1
            assert left(base) == {name}
        finally:
            os.kill(child, signal.SIGKILL)


FORKING = """
import os, sys
from jobkit import AssetStore
store = AssetStore(sys.argv[1])
folder = store.spool_folder()
child = os.fork()
if child == 0:
    assert store.spool_folder() != folder
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
print(store.spool_folder() == folder, len(os.listdir(folder.parent)))
"""


def test_the_end_of_a_forked_child_takes_what_is_its_own_and_nothing_of_its_parents(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKING, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (ran.stdout, ran.stderr) == ("True 1\n", "")
    assert left(tmp_path / ".spool") == set()


def test_a_process_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    code = f"import jobkit; s = jobkit.AssetStore({str(tmp_path)!r}); print(s.spool_folder().is_dir())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert (ran.stdout, ran.stderr) == ("True\n", "")
    assert left(tmp_path / ".spool") == set()


# --- what cannot be known


@pytest.mark.parametrize(("age", "stays"), [(0, True), (ABANDONED - 3600, True), (ABANDONED + 3600, False)])
def test_what_another_machine_left_goes_after_a_week_of_silence(
    mine: Scratch, base: Path, age: float, stays: bool
) -> None:
    make(base, "elsewhere.1", age=age)
    assert mine.sweep() == (not stays)
    assert left(base) == ({"elsewhere.1"} if stays else set())


def test_one_young_file_deep_within_keeps_another_machines_folder(mine: Scratch, base: Path) -> None:
    make(base, "elsewhere.1", age=ABANDONED * 2)
    os.utime(base / "elsewhere.1" / "work" / "half.part")
    assert mine.sweep() == 0


def test_what_is_locked_stays_however_old_and_wherever_from(mine: Scratch, base: Path) -> None:
    make(base, "elsewhere.1", age=ABANDONED * 2)
    descriptor = os.open(base / "elsewhere.1", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert mine.sweep() == 0
    os.close(descriptor)
    assert mine.sweep() == 1


def test_files_of_earlier_versions_go_after_a_week(mine: Scratch, base: Path) -> None:
    base.mkdir()
    for name, age in (("old.part", ABANDONED + 60), ("new.part", 60)):
        (base / name).write_bytes(b"x")
        os.utime(base / name, (time.time() - age,) * 2)
    assert mine.sweep() == 1
    assert left(base) == {"new.part"}


def test_a_file_system_without_locks_is_used_and_nothing_young_is_removed_from_it(
    mine: Scratch, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with writer(str(base.parent)) as (process, _, lost):
        process.kill()
        process.wait()
    monkeypatch.setattr(scratch.fcntl, "flock", refuse)
    here = Scratch(lambda: base.parent / ".spool")
    (here.folder() / "a.part").write_bytes(b"x")
    assert {lost, here.folder().name} <= left(base.parent / ".spool")


def test_nothing_outside_is_removed_through_a_link(mine: Scratch, base: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    make(outside, "kept", age=ABANDONED * 2)
    base.mkdir()
    (base / "elsewhere.1").symlink_to(outside)
    assert mine.sweep() == 0
    make(base, "elsewhere.2", age=0)
    (base / "elsewhere.2" / "work" / "link").symlink_to(outside)
    (base / "elsewhere.2").rename(base / f"{scratch._machine()}.2")
    assert mine.sweep() == 1
    assert (outside / "kept" / "work" / "half.part").exists()


# --- while it is in use


def test_threads_that_begin_together_share_one_folder(mine: Scratch, base: Path) -> None:
    barrier = threading.Barrier(16)

    def begin(_: int) -> Path:
        barrier.wait(60)
        return mine.folder()

    with ThreadPoolExecutor(16) as pool:
        folders = set(pool.map(begin, range(16)))
    assert [folder.name for folder in folders] == list(left(base))


RACER = """
import os, sys
from pathlib import Path
from jobkit.storage.scratch import Scratch
for number in range(150):
    scratch = Scratch(lambda: Path(sys.argv[1]))
    file = scratch.folder() / "half.part"
    file.write_bytes(b"x")
    scratch.sweep()
    assert file.read_bytes() == b"x"
    file.unlink()
    del scratch
"""


def test_processes_that_begin_sweep_and_end_all_at_once_lose_nothing(base: Path) -> None:
    command = [sys.executable, "-c", RACER, str(base)]
    racers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    told = [racer.communicate(timeout=120)[1] for racer in racers]
    assert told == ["", "", "", ""]
    assert left(base) == set()


def test_a_sweep_between_the_making_of_a_folder_and_its_locking_costs_only_another_try(
    mine: Scratch, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, swept = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not swept:
            swept.append(Scratch(lambda: base).sweep())
        lock(descriptor, operation)

    monkeypatch.setattr(scratch.fcntl, "flock", late)
    folder = mine.folder()
    assert swept == [1]
    assert left(base) == {folder.name}
    assert Scratch(lambda: base).sweep() == 0


@pytest.mark.parametrize(
    "harm",
    [
        lambda held: held.folder.rmdir(),
        lambda held: (held.folder.rename(held.folder.with_name("x")), held.folder.mkdir()),
        lambda held: os.close(held.descriptor),
    ],
    ids=["removed", "replaced", "descriptor closed"],
)
def test_a_folder_that_is_no_longer_held_is_followed_by_another(
    mine: Scratch, base: Path, harm: Callable[[Any], object]
) -> None:
    first, held = mine.folder(), mine._held
    assert held is not None
    harm(held)
    second = mine.folder()
    assert second != first
    (second / "a.part").write_bytes(b"x")
    Scratch(lambda: base).sweep()
    assert left(second) == {"a.part"}
    assert mine.folder() == second


def test_a_descriptor_that_has_become_another_files_is_not_closed(mine: Scratch, tmp_path: Path) -> None:
    mine.folder()
    held = mine._held
    assert held is not None
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    os.dup2(other, held.descriptor)
    held.release()
    assert os.write(held.descriptor, b"still open") == 10
    for descriptor in (other, held.descriptor):
        os.close(descriptor)


def test_a_store_that_is_dropped_keeps_no_descriptor_and_no_folder(tmp_path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        assert AssetStore(tmp_path / "assets").spool_folder().is_dir()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert left(tmp_path / "assets" / ".spool") == set()


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / ".spool").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=r"\.spool is a symbolic link"):
        put(AssetStore(tmp_path / "assets"))
    assert left(tmp_path / "elsewhere") == set()


def test_a_storage_that_is_only_read_makes_no_folder(tmp_path: Path, engine: sa.Engine) -> None:
    store = AssetStore(tmp_path / "assets", engine=engine)
    store.collect_garbage(dry_run=False)
    assert not (tmp_path / "assets").exists()
