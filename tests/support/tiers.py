"""Two tiers: every test, and the quick ones, which is all but those marked ``slow``.

The marker is given by measure. ``.ci/dev.py test --measure`` runs everything and writes ``tests/slow.txt``: the tests
that took longest, all cases of a test together, until the rest takes no more than ``BUDGET``. What is not in the list
is quick, a new test too. ``APART`` is slow whatever it takes.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest

LIST = Path(__file__).parents[1] / "slow.txt"
OPTION = "--measure-tiers"
# Seconds of all quick tests together, one after the other; they run two at a time.
BUDGET = 100.0
# Chaos, processes that are killed, documents that start servers, and whatever needs a browser.
APART = (
    "tests/faults/test_chaos.py",
    "tests/faults/test_planted_bugs.py",
    "tests/documents/test_browser.py",
    "tests/documents/test_examples.py",
    "tests/documents/test_fastapi_example.py",
    "tests/sse/test_browser.py",
)


def slow() -> set[str]:
    """The tests of the list, each as ``path::test``."""
    return set(LIST.read_text("utf-8").splitlines())


def name_of(nodeid: str) -> str:
    """A test without the parameters of its case."""
    return nodeid.partition("[")[0]


class Tiers:
    """A plugin: marks the slow tests, and writes the list anew when that was asked for."""

    def __init__(self) -> None:
        self._setups: dict[str, list[float]] = defaultdict(list)
        self._rest: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        listed = slow()
        for item in items:
            if name_of(item.nodeid) in listed or item.nodeid.startswith(APART):
                item.add_marker("slow")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = name_of(report.nodeid)
        if report.when == "setup":
            self._setups[name].append(report.duration)
        else:
            self._rest[name] += report.duration

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        asked = session.config.getoption(OPTION) and not hasattr(session.config, "workerinput")
        if asked and exitstatus == pytest.ExitCode.OK:
            LIST.write_text("".join(f"{name}\n" for name in self._slowest()), encoding="utf-8")

    def _slowest(self) -> list[str]:
        """The names for the list. The first of many cases may wait for a server of all: so the median counts."""
        took = {n: median(s) * len(s) + self._rest[n] for n, s in self._setups.items() if not n.startswith(APART)}
        found, total = [], sum(took.values())
        for name in sorted(took, key=lambda name: -took[name]):
            if total <= BUDGET:
                break
            found.append(name)
            total -= took[name]
        return sorted(found)
