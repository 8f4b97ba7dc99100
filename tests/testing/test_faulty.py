"""The faulty filesystem does what its plan says, and only to those who ask for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from jobkit.testing import Fault, FaultPlan, faulty_filesystem
from tests.support.names import named


def test_a_plan_spares_strikes_and_records(tmp_path: Path) -> None:
    plan = FaultPlan(Fault("put_file", skip=1, times=2), Fault("cat_file", "wait", at="before", times=None))
    source = tmp_path / "x"
    source.write_bytes(b"content")
    with faulty_filesystem(plan, target="file"):
        filesystem, root = fsspec.core.url_to_fs(f"faulty://{tmp_path}/target")
        for number, fails in enumerate([False, True, True, False]):
            try:
                filesystem.put_file(str(source), f"{root}-{number}")
                assert not fails
            except OSError:
                assert fails
        assert filesystem.cat_file(f"{root}-3") == b"content"
    assert sorted(path.name for path in tmp_path.glob("target*")) == ["target-0", "target-3"]
    assert [name for name, _ in plan.calls] == ["put_file"] * 4 + ["cat_file"]
    assert [fault.operation for fault in plan.fired] == ["put_file", "put_file", "cat_file"]
    with pytest.raises(ValueError, match="faulty"):
        fsspec.get_filesystem_class("faulty")


@pytest.mark.parametrize(("at", "there"), [("before", False), ("after", True)])
def test_a_call_waits_before_or_after_it_is_done(at: Any, there: bool, tmp_path: Path) -> None:
    found: list[bool] = []
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"content")
    plan = FaultPlan(Fault("put_file", "wait", at=at, until=lambda: found.append(target.exists())))
    with faulty_filesystem(plan, target="file"):
        fsspec.core.url_to_fs(f"faulty://{tmp_path}")[0].put_file(str(source), str(target))
    assert found == [there]
    assert target.read_bytes() == b"content"


def test_the_same_seed_draws_the_same_faults() -> None:
    def drawn(seed: int) -> list[Any]:
        plan = FaultPlan.seeded(seed)
        return [fault and (fault.at, str(fault.error)) for fault in (plan.next("mv", "x") for _ in range(100))]

    assert drawn(7) == drawn(7) != drawn(8)


def test_an_app_that_does_not_ask_for_it_never_loads_it() -> None:
    code = "import sys, jobkit; print([name for name in sys.modules if 'testing' in name or name == 'pytest'])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


CONTENT = b"0123456789"


@pytest.mark.parametrize(
    ("fault", "kept", "fails"),
    [
        (Fault("pipe_file"), None, True),
        (Fault("pipe_file", at=0), b"", True),
        (Fault("pipe_file", at=4), b"0123", True),
        (Fault("pipe_file", at="after"), CONTENT, True),
        (Fault("pipe_file", "cut", at=4), b"0123", False),
        (Fault("pipe_file", "flip", at=4), b"0123556789", False),
        (Fault("pipe_file", "wait"), CONTENT, False),
        (Fault("put_file", "flip", at=4), CONTENT, False),
    ],
    ids=named,
)
def test_what_a_fault_leaves(fault: Fault, kept: bytes | None, fails: bool, tmp_path: Path) -> None:
    with faulty_filesystem(FaultPlan(fault), target="file"):
        filesystem, path = fsspec.core.url_to_fs(f"faulty://{tmp_path}/file")
        if fails:
            with pytest.raises(OSError, match="planned fault"):
                filesystem.pipe_file(path, CONTENT)
        else:
            filesystem.pipe_file(path, CONTENT)
    assert (tmp_path / "file").exists() == (kept is not None)
    assert kept is None or (tmp_path / "file").read_bytes() == kept


@pytest.mark.parametrize(
    ("fault", "read"),
    [
        (Fault("read", at=4), None),
        (Fault("read", "cut", at=4), b"0123"),
        (Fault("read", "flip", at=4), b"0123556789"),
        (Fault("read", "flip", at=40), CONTENT),
        (Fault("read", "wait"), CONTENT),
    ],
    ids=named,
)
def test_what_a_fault_lets_be_read(fault: Fault, read: bytes | None, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with faulty_filesystem(FaultPlan(fault), target="file"):
        filesystem, path = fsspec.core.url_to_fs(f"faulty://{tmp_path}/file")
        with filesystem.open(path) as hit, filesystem.open(path) as spared:
            if read is None:
                with pytest.raises(OSError, match="planned fault"):
                    hit.read()
            else:
                assert b"".join(iter(lambda: hit.read(3), b"")) == read
            assert spared.read() == CONTENT


def test_the_real_filesystem_of_the_protocol_can_be_hit_and_is_back_afterwards() -> None:
    before = fsspec.get_filesystem_class("memory")
    with faulty_filesystem(FaultPlan(Fault("pipe_file")), protocol="memory", target="memory"):
        filesystem, path = fsspec.core.url_to_fs("memory://x/y")
        with pytest.raises(OSError, match="planned fault"):
            filesystem.pipe_file(path, b"x")
        with pytest.raises(NotImplementedError):
            filesystem.open(path, "wb")
    assert fsspec.get_filesystem_class("memory") is before
