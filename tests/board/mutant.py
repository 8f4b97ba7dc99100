"""A private copy of the package, with one bug in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# What says that a mutant is no program any more, rather than a wrong one.
CRASHED = re.compile(
    r"SyntaxError|ImportError|ModuleNotFoundError|NameError|UnboundLocalError|IndentationError|no such column"
    r"|syntax error at|near \"|UndefinedColumn|UndefinedParameter"
)
DEADLINE = 300.0


class Edit(NamedTuple):
    """``old`` becomes ``new``. ``where``: a file or folder of the package, in which ``old`` is exactly once."""

    where: str
    old: str
    new: str

    def place(self, package: Path) -> Path:
        """The file to change; ``LookupError`` unless there is exactly one place."""
        within = package / self.where
        files = sorted(within.rglob("*.py")) if within.is_dir() else [within]
        counts = {file: file.read_text(encoding="utf-8").count(self.old) for file in files if file.exists()}
        if sum(counts.values()) != 1:
            raise LookupError(f"{self.old!r} is {sum(counts.values())} times in {self.where}")
        return next(file for file, count in counts.items() if count)

    def changed(self, text: str) -> str:
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Bug:
    """``tests``: each of them, by file and function, must fail. ``only``: of which database, where it is one's own."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    only: str = ""


class Outcome(NamedTuple):
    """``blind``: tests that should have failed and did not. ``trouble``: why the mutant does not count."""

    bug: Bug
    seconds: float
    blind: list[str]
    trouble: str = ""

    @property
    def killed(self) -> bool:
        return not self.blind and not self.trouble


class Copy:
    """The package in a folder of its own, from which tests import it."""

    def __init__(self, folder: Path, postgres: str) -> None:
        self._folder = folder
        self.package = folder / "jobkit"
        shutil.copytree(ROOT / "src" / "jobkit", self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "JOBKIT_TEST_POSTGRES_URL": postgres,
            "JOBKIT_TEST_MACHINE": "100x50",
            "JOBKIT_TEST_MACHINE_SHRINK": "no",
        }

    def judge(self, bug: Bug) -> Outcome:
        """Plant it, run its tests, take it out again."""
        began = time.monotonic()
        try:
            with self._planted(bug):
                self._import(bug)
                results = self.run(bug.tests, bug.only)
        except (LookupError, RuntimeError) as error:
            return Outcome(bug, time.monotonic() - began, [], str(error))
        blind = [test for test in bug.tests if not any(r.failed for r in results if r.test == test)]
        crashed = next((found for r in results if (found := CRASHED.search(r.failed))), None)
        trouble = f"it crashes: {crashed.group()}" if crashed else ""
        return Outcome(bug, time.monotonic() - began, blind, trouble)

    def run(self, tests: tuple[str, ...], only: str = "") -> list[Result]:
        """What became of the tests; ``RuntimeError`` when they could not be run."""
        report = self._folder / "report.xml"
        report.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.board.once",
            f"--junitxml={report}",
            *tests,
        ]
        command += ["-k", f"not {'postgresql' if only == 'sqlite' else 'sqlite'}"] if only else []
        ran = self._call(command)
        if ran.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(f"pytest ended with {ran.returncode}: {ran.stdout[-500:]}{ran.stderr[-500:]}")
        return [Result.read(case) for case in ET.parse(report).iter("testcase")]

    def _import(self, bug: Bug) -> None:
        """``RuntimeError`` unless the changed modules can be imported, from this copy and no other."""
        files = {edit.place(ROOT / "src" / "jobkit").relative_to(ROOT / "src" / "jobkit") for edit in bug.edits}
        names = ["jobkit." + ".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
        code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
        ran = self._call([sys.executable, "-c", code])
        if ran.returncode:
            raise RuntimeError(f"the mutant cannot be imported: {ran.stderr.strip().splitlines()[-1]}")
        if not all(Path(line).is_relative_to(self.package) for line in ran.stdout.splitlines()):
            raise RuntimeError(f"{ran.stdout.strip()} was imported, not the copy")

    @contextmanager
    def _planted(self, bug: Bug) -> Iterator[None]:
        texts: dict[Path, str] = {}
        try:
            for edit in bug.edits:
                file = edit.place(self.package)
                text = file.read_text(encoding="utf-8")
                texts.setdefault(file, text)
                file.write_text(edit.changed(text), encoding="utf-8")
            yield
        finally:
            for file, text in texts.items():
                file.write_text(text, encoding="utf-8")

    def _call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=DEADLINE, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end after {DEADLINE:g} s") from None


class Result(NamedTuple):
    """A test, named by file and function; ``failed`` is what it said when its call failed; ``broken`` when its setup
    or teardown did.
    """

    test: str
    failed: str
    broken: str

    @classmethod
    def read(cls, case: ET.Element) -> Result:
        def said(kind: str) -> str:
            return "".join(f"{found.get('message')}\n{found.text}" for found in case.iter(kind))

        file = case.get("classname", "").replace(".", "/") + ".py"
        return cls(f"{file}::{case.get('name', '').partition('[')[0]}", said("failure"), said("error"))
