"""The board itself: every bug on it can still be planted, and is still a program."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import jobkit
from tests.board.bugs import BUGS
from tests.board.mutant import Bug, Edit

PACKAGE = Path(jobkit.__file__).parent
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_is_in_one_place_compiles_and_names_tests_that_exist(bug: Bug) -> None:
    for edit in bug.edits:
        text = edit.place(PACKAGE).read_text(encoding="utf-8")
        changed = edit.changed(text)
        assert changed != text
        compile(changed, bug.name, "exec")
    assert bug.tests
    assert [test for test in bug.tests if not exists(test)] == []


def exists(test: str) -> bool:
    file, _, function = test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def test_there_are_enough_bugs_and_each_has_a_name_of_its_own() -> None:
    assert len(BUGS) >= 25
    assert [name for name, count in Counter(bug.name for bug in BUGS).items() if count > 1] == []


def test_a_bug_that_is_nowhere_or_in_two_places_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1\ny = 1\n")
    assert Edit("one.py", "x = 1", "x = 2").place(tmp_path) == tmp_path / "one.py"
    for old in ("z = 1", " = 1"):
        with pytest.raises(LookupError):
            Edit("one.py", old, "").place(tmp_path)
