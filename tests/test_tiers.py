"""The list of slow tests names tests that exist, and a run that measures writes the slowest of them into it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.support import tiers
from tests.support.tiers import APART, BUDGET, LIST, Tiers, slow

ROOT = Path(__file__).parents[1]


def test_what_is_slow_exists() -> None:
    assert [name for name in sorted({*slow(), *APART}) if not exists(name)] == []


def exists(name: str) -> bool:
    file, *test = name.split("::")
    files = [ROOT / file]
    if test and "__" in test[0]:  # the asynchronous drivers run the tests of jobs, by the name ``test__file``
        test[0], files = test[0].partition("__")[0], sorted((ROOT / "tests/jobs").glob("*.py"))
    # Of a class only its own name: it may inherit its tests.
    return (ROOT / file).is_file() and (not test or any(test[0] in names(path) for path in files))


@cache
def names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_list_is_sorted() -> None:
    lines = LIST.read_text("utf-8").splitlines()
    assert lines == sorted(set(lines))


def report(nodeid: str, when: str, seconds: float) -> pytest.TestReport:
    location = (nodeid, None, nodeid)
    return pytest.TestReport(nodeid, location, {}, "passed", None, when, duration=seconds)  # type: ignore[arg-type]


def test_the_slowest_are_listed_until_the_rest_fits_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Tiers()
    for case in ("a", "b", "c"):
        found.pytest_runtest_logreport(report(f"t.py::many[{case}]", "setup", 50.0 if case == "a" else 0.1))
        found.pytest_runtest_logreport(report(f"t.py::many[{case}]", "call", BUDGET / 6))
    for name, seconds in (("t.py::one", BUDGET * 0.7), ("t.py::quick", 0.1)):
        found.pytest_runtest_logreport(report(name, "setup", 0.0))
        found.pytest_runtest_logreport(report(name, "call", seconds))
    assert found._slowest() == ["t.py::one"]
    monkeypatch.setattr(tiers, "BUDGET", 1.0)
    assert found._slowest() == ["t.py::many", "t.py::one"]
