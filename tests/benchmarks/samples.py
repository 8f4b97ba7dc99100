"""Samples of a process over time, and whether what they count stays flat."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.large_asset import MIB, memory

PARTS = 5


class Sample(NamedTuple):
    """Figures at one time, in seconds from the first sample. A figure that was not looked at is missing."""

    at: float
    figures: Mapping[str, float]


class Limit(NamedTuple):
    """By how much a figure may grow: by no more than this part of what it was, and by no more than so many. ``least``
    is too little to count in any case.
    """

    part: float
    most: float
    least: float = 0.0

    def allows(self, before: float, after: float) -> bool:
        return after - before <= max(self.least, min(self.part * before, self.most))


class _Heap(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


_mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
if _mallinfo is not None:
    _mallinfo.restype = _Heap


class Trend(NamedTuple):
    """A figure in the second, the middle and the last fifth of the time, as medians, and the highest after the first.
    The first fifth is left out: caches fill then.
    """

    before: float
    middle: float
    after: float
    highest: float


# What is freed leaves holes, which come and go in steps of two mebibytes. What is in use tells of a leak sooner.
MEMORY = Limit(0.1, 8.0)
LIMITS = {
    "RSS, MiB": MEMORY,
    "USS, MiB": MEMORY,
    "C heap in use, MiB": Limit(0.05, 8.0),
    "descriptors": Limit(math.inf, 2),
    "threads": Limit(math.inf, 2),
    "Python blocks": Limit(0.02, 8_000),
}
# Rows come and go with each prune; a table that is never pruned doubles between the second fifth and the last.
ROWS = Limit(0.5, math.inf, 200)


def of_process(*, collected: bool) -> dict[str, float]:
    """Figures of this process; with ``collected``, after a collection of garbage, also how many blocks Python's
    allocator has given out: every small object is one. Larger ones, and what C libraries hold, are in the C heap.
    """
    found = {
        "RSS, MiB": memory("VmRSS") / MIB,
        "descriptors": float(len(os.listdir("/proc/self/fd"))),
        "threads": float(threading.active_count()),
    }
    private = _private()
    if private is not None:
        found["USS, MiB"] = private / MIB
    if _mallinfo is not None:
        heap = _mallinfo()
        found["C heap in use, MiB"] = (heap.uordblks + heap.hblkhd) / MIB
    if collected:
        gc.collect()
        found["Python blocks"] = float(sys.getallocatedblocks())
    return found


def _private() -> int | None:
    """Bytes that only this process has, where the kernel tells."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        return None
    return sum(int(line.split()[1]) * 1024 for line in rollup.read_text().splitlines() if line.startswith("Private_"))


def trend(samples: Sequence[Sample], name: str) -> Trend:
    """How a figure went. ``ValueError`` when a fifth of the time has no sample of it."""
    begun, ended = samples[0].at, samples[-1].at
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    for at, figures in samples:
        if name in figures:
            part = int((at - begun) / (ended - begun) * PARTS) if ended > begun else 0
            parts[min(part, PARTS - 1)].append(figures[name])
    if not all(parts):
        raise ValueError(f"too short: a fifth of the time has no sample of {name}")
    before, middle, after = (statistics.median(parts[number]) for number in (1, 2, 4))
    return Trend(before, middle, after, max(max(part) for part in parts[1:]))


def grown(samples: Sequence[Sample], limits: Mapping[str, Limit]) -> list[str]:
    """What grew by more than its limit between the second fifth of the time and the last; empty when all is flat."""
    found = []
    for name, limit in limits.items():
        before, _, after, _ = trend(samples, name)
        if not limit.allows(before, after):
            found.append(f"{name} grew from {before:,.1f} to {after:,.1f}")
    return found
