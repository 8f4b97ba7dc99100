"""How much memory each process of a run needed, and that it was not too much."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# A test process that grows beyond this, in MB, keeps what it should have let go of. The aim is 600.
LIMIT = 1400
# A test that raises the peak by more than this, in MB, is named in the summary.
STEP = 40
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
STATUS = Path("/proc/self/status")


def peak() -> int | None:
    """The most memory this process has had, in MB; None where the system does not say. Not ``ru_maxrss``, which counts
    what a parent had before ``exec``."""
    if not STATUS.exists():
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text("ascii", "replace"), re.MULTILINE)
    return int(found[1]) // 1024 if found else None


def return_large_blocks() -> None:
    """Have glibc give every large block back to the system when it is freed.

    By itself it stops that after the first one: the size from which blocks are mapped one by one grows to that of the
    largest that was freed, and later ones leave holes in a heap that stays.
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_THRESHOLD, 256 << 10), (M_TRIM_THRESHOLD, 256 << 10), (M_ARENA_MAX, 2)):
            mallopt(parameter, value)


class Peaks:
    """A plugin: workers tell their peak to the process that controls them, which fails the run if one is too high."""

    def __init__(self) -> None:
        self._peaks: dict[str, int] = {}
        self._before = peak() or 0
        self._steps: list[str] = []

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """In a worker, or without any: whether this test raised the peak."""
        now = peak() or 0
        if now - self._before > STEP:
            self._steps.append(f"{self._before} to {now} MB: {nodeid}")
            self._before = now

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        told = getattr(node, "workeroutput", {}).get("peak")
        if told is not None:
            self._peaks[node.gateway.id] = told
            self._steps += getattr(node, "workeroutput", {})["steps"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        own = peak()
        output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["peak"], output["steps"] = own, self._steps
        elif own is not None:
            self._peaks["this process"] = own
            if self._too_high() and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for step in self._steps:
            terminalreporter.write_line(f"peak memory: {step}")
        told = ", ".join(f"{name} {megabytes} MB" for name, megabytes in sorted(self._peaks.items()))
        if high := self._too_high():
            terminalreporter.write_line(f"peak memory: {told}; above {LIMIT} MB: {', '.join(high)}", red=True)
        elif len(self._peaks) > 1:
            terminalreporter.write_line(f"peak memory: {told}")

    def _too_high(self) -> list[str]:
        return [name for name, megabytes in sorted(self._peaks.items()) if megabytes > LIMIT]
