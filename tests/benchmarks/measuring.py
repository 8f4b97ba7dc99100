"""What benchmarks measure with, and how they tell the figures of several rounds.

Nothing of jobkit is imported here: a worker that does without it measures itself with this too.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

MIB = 1 << 20
DEADLINE = 120.0
Figures = dict[str, float]


def memory(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def until(holds: Callable[[], bool], deadline: float = DEADLINE) -> None:
    """Wait until ``holds``; ``TimeoutError`` after ``deadline`` seconds."""
    over = time.monotonic() + deadline
    while not holds():
        if time.monotonic() > over:
            raise TimeoutError(f"not within {deadline:.0f} s")
        time.sleep(0.01)


def process_cpu(pid: int) -> float:
    """CPU seconds of one process so far, user and system."""
    return _seconds(_stat(pid)[11:13])


def server_cpu(postmaster: int) -> float:
    """CPU seconds of a whole PostgreSQL server so far, with those of its processes that have ended."""
    total = _seconds(_stat(postmaster)[11:15])
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):  # it ends meanwhile
                fields = _stat(int(name))
                total += _seconds(fields[11:13]) if fields[1] == str(postmaster) else 0.0
    return total


def parent(pid: int) -> int:
    """The process that started ``pid``."""
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the program's name, which may have blanks in it: state, parent and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _seconds(ticks: Iterable[str]) -> float:
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


class Meter:
    """Rate, CPU and waits of this process, for each of so many things, and CPU of a server, from ``begin`` to ``end``.

    The first ``begin`` counts, from whatever thread.
    """

    def __init__(self, postmaster: int | None = None) -> None:
        self._postmaster = postmaster
        self._once = threading.Lock()
        self._begun: tuple[float, float, resource.struct_rusage] | None = None

    def begin(self) -> None:
        if self._begun is None:
            with self._once:
                if self._begun is None:
                    server = self._server()
                    self._begun = server, time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)

    def end(self, count: int) -> Figures:
        """What each of ``count`` cost."""
        ended, now = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        if self._begun is None:
            raise RuntimeError("nothing was begun")
        server, begun, used = self._begun
        figures = {
            "a second": count / (ended - begun),
            "CPU µs": (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / count * 1e6,
            "waits": (now.ru_nvcsw - used.ru_nvcsw) / count,
        }
        if self._postmaster is not None:
            figures["server CPU µs"] = (self._server() - server) / count * 1e6
        return figures

    def _server(self) -> float:
        return 0.0 if self._postmaster is None else server_cpu(self._postmaster)


@contextmanager
def measured(name: str, count: int, figures: Figures) -> Iterator[None]:
    """Put into ``figures`` what each of ``count`` costs that are done within the ``with``."""
    meter = Meter()
    meter.begin()
    yield
    figures |= {f"{name}, {what}": value for what, value in meter.end(count).items()}


def tell(name: str, values: Sequence[float], at_most: float | None = None) -> None:
    """Print the median of some rounds, with the least and the most, and whether the median is above what is wanted."""
    import statistics  # a worker, whose memory counts, tells nothing

    median = statistics.median(values)
    wanted = "" if at_most is None else f"   wanted {at_most:g} at most{'  MISSED' if median > at_most else ''}"
    print(f"  {name:<46} {median:10.2f}   ({min(values):.2f} to {max(values):.2f}){wanted}", flush=True)


def alternate(runs: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """The figures of each of ``runs``, in turns: who began a round ends the next one."""
    figures: dict[str, list[Figures]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            figures[name].append(runs[name]())
    return figures


def compare(rounds: Mapping[str, list[Figures]], pairs: Iterable[tuple[str, str]]) -> None:
    """Print each figure of each, and for each of ``pairs`` how many times the second one's the first one's is."""
    pairs = list(pairs)
    for figure in next(iter(rounds.values()))[0]:
        for name, each in rounds.items():
            tell(f"{name}: {figure}", [one[figure] for one in each])
        for name, base in pairs:
            ratios = [one[figure] / other[figure] for one, other in zip(rounds[name], rounds[base], strict=True)]
            tell(f"{name} / {base}: {figure}", ratios)
