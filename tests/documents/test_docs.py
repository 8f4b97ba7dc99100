"""The README and every page of docs, followed word by word: what is shown is run, what is promised is there.

Blocks of a page run in order, in one folder and one namespace. A ``python`` block whose first line names a file is
written to that file. In a ``console`` block each ``$`` line is run and what follows it is the output, ``...`` standing
for anything. Servers that a page starts run until the page ends, and must then stop clean. A block after
``<!-- needs PACKAGE -->`` must fail with a message that names the package where that is not installed.
"""

from __future__ import annotations

import ast
import doctest
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sybil import Example
from sybil.document import Document, PythonDocStringDocument
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.rest import DocTestParser

import jobkit
from jobkit import aio, errors, signals, sse, testing
from jobkit.assets.limits import VARIABLES as LIMIT_VARIABLES
from jobkit.cli import URL_VARIABLE

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON_FILES = sorted((ROOT / "src").rglob("*.py"))
REFERENCE = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs/reference").glob("*.md")))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

DEADLINE = 240.0  # of a whole pytest or chaos run, on a busy machine
FENCE = re.compile(r"^```(\S*)", re.MULTILINE)
FILE = re.compile(r"# (\S+\.(?:py|ini))\n")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
NEEDS = re.compile(r"<!-- needs (\w+) -->\n\Z")
SERVERS = {r"jobkit work (?!--help)": "working for", r"flask .*\brun\b": "Running on", r"uvicorn ": "startup complete"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Reader:
    """Someone who follows a page in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._evaluate = PythonEvaluator()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def python(self, example: Example) -> None:
        if named := FILE.match(example.parsed):
            path = self.folder / named.group(1)
            assert self.folder in path.resolve().parents
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(example.parsed, encoding="utf-8")
        elif (needed := NEEDS.search(example.document.text[: example.start])) and not find_spec(needed.group(1)):
            with pytest.raises(jobkit.ConfigurationError, match=needed.group(1)):
                self._evaluate(example)
        else:
            self._evaluate(example)

    def console(self, example: Example) -> str | None:
        for command, wanted in transcript(example.parsed):
            if complaint := self._command(command, wanted):
                return f"{command}\n{complaint}"
        return None

    def stop(self) -> None:
        """Ctrl-C in every terminal that still runs a server."""
        for command, server in self.servers:
            server.send_signal(signal.SIGINT)
            assert server.wait(DEADLINE) == 0, f"{command} ended with {server.returncode}"

    def kill(self) -> None:
        for _, server in self.servers:
            if server.poll() is None:
                server.kill()
                server.wait(DEADLINE)

    def _command(self, command: str, wanted: str) -> str | None:
        words = shlex.split(command)
        if words[0] == "cd":
            self.folder = self.folder / words[1]
            os.chdir(self.folder)
            return None
        if (elsewhere := cannot_run_here(words)) is not None:
            return elsewhere
        for pattern, sign in SERVERS.items():
            if re.match(pattern, command):
                return self._serve(command, sign)
        ran = subprocess.run(
            command, shell=True, env=self._environment(), text=True, timeout=DEADLINE, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if ran.returncode:
            return f"ended with {ran.returncode}:\n{ran.stdout}"
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if wanted and not doctest.OutputChecker().check_output(wanted, ran.stdout, flags):
            return f"should print:\n{wanted}\nprinted:\n{ran.stdout}"
        return None

    def _serve(self, command: str, sign: str) -> str | None:
        log = self.folder / f"server-{len(self.servers)}.log"
        with log.open("w") as out:
            server = subprocess.Popen(
                ["sh", "-c", f"exec {command}"], env=self._environment(), stdout=out, stderr=out,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.servers.append((command, server))
        deadline = time.monotonic() + DEADLINE
        while sign not in log.read_text("utf-8"):
            if server.poll() is not None or time.monotonic() > deadline:
                return f"does not serve:\n{log.read_text(encoding='utf-8')}"
            time.sleep(0.02)
        return None

    def _environment(self) -> dict[str, str]:
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": programs, "FLASK_RUN_PORT": str(self.port), "PYTHONUNBUFFERED": "1"}


def transcript(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block with the output shown for it."""
    assert text.startswith("$ "), f"a console block begins with a command: {text[:40]!r}"
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, wanted = part.partition("\n")
        yield command, wanted


def cannot_run_here(words: list[str]) -> str | None:
    """None for a command that can be run; else what is wrong with it, the empty text when nothing is."""
    if words[:2] == ["python3", ".ci/dev.py"]:
        told = subprocess.run([sys.executable, *words[1:2]], cwd=ROOT, capture_output=True, text=True, check=False)
        return "" if f"dev.py {words[2]}" in told.stdout else f"dev.py does not know {words[2]}"
    if words[:3] == ["python3", "-m", "venv"] or words[0] == ".":
        return ""
    if words[:2] == ["pip", "install"]:
        extras = set(",".join(re.findall(r"\[([\w,]+)\]", words[-1])).split(",")) - {""}
        missing = extras - PROJECT["optional-dependencies"].keys()
        return f"there is no extra {missing}" if missing else ""
    return None


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """In an empty folder, with nobody connected to a signal; both are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as `python` has it: the folder one is in
    modules, receivers = set(sys.modules), [(s, set(s.receivers)) for s in signals.SIGNALS.values()]
    reader = Reader(tmp_path)
    monkeypatch.setenv("UVICORN_PORT", str(reader.port))
    yield reader
    reader.kill()
    for signal_, before in receivers:
        for key in set(signal_.receivers) - before:
            signal_.disconnect(signal_.receivers[key])
    for module in set(sys.modules) - modules:
        if str(getattr(sys.modules[module], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.mark.timeout(900)  # some pages run pytest and chaos
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_can_be_followed_word_by_word(
    page: Path, reader: Reader, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "DATABASE_URL" in page.read_text("utf-8"):
        monkeypatch.setenv("DATABASE_URL", request.getfixturevalue("postgres").create_database())
    document = Document.parse(
        str(page), CodeBlockParser("python", reader.python), CodeBlockParser("console", reader.console)
    )
    document.namespace["__name__"] = "docs"
    examples = list(document.examples())
    hidden = document.text.count("<!--- invisible-code-block: python\n")
    assert len(examples) == hidden + len(re.findall(r"^```(?:python|console)$", document.text, re.MULTILINE))
    for example in examples:
        example.evaluate()
    reader.stop()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_block_of_a_page_escapes_the_tests(page: Path) -> None:
    opening = FENCE.findall(page.read_text("utf-8"))[::2]
    assert set(opening) <= {"python", "console", "text"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        target, _, heading = link.partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_every_page_is_linked_from_the_index() -> None:
    index = ROOT / "docs/index.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text("utf-8")) if "://" not in link}
    assert {page for page in PAGES if page.parent != ROOT} - linked == {index}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    for file, test in TEST.findall(page.read_text("utf-8")):
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_every_promise_names_its_tests() -> None:
    page = (ROOT / "docs/explanation/guarantees.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| *\d+ *\|", line)]
    assert len(rows) > 10
    assert [row for row in rows if not TEST.search(row)] == []


# Calls that find a row by its id, in any company unless one is named.
BY_ID = re.compile(r"(?:\.(?:get_by_id|list_by_job|cancel|retry|transition)|\bwatch)\([^()]*(?:\([^()]*\)[^()]*)*\)")


@pytest.mark.parametrize("path", [*PAGES, *sorted((ROOT / "examples").rglob("*.py"))], ids=name)
def test_every_page_and_example_names_the_company(path: Path) -> None:
    assert [call for call in BY_ID.findall(path.read_text("utf-8")) if "company" not in call.lower()] == []


def test_every_module_has_its_place_in_the_tour() -> None:
    tour = (ROOT / "docs/explanation/tour.md").read_text("utf-8")
    package = ROOT / "src/jobkit"
    modules = [path.relative_to(package) for path in package.rglob("*.py") if path.name != "__init__.py"]
    placed = {module for module in modules if any(f"`{at}`" in tour for at in [module, *folders(module)])}
    assert set(modules) - placed == set()


def folders(module: Path) -> list[str]:
    return [f"{parent}/" for parent in module.parents]


def commands() -> list[str]:
    told = subprocess.run([sys.executable, "-m", "jobkit", "--help"], capture_output=True, text=True, check=True)
    found = re.findall(r"^    (\w+) ", told.stdout, re.MULTILINE)
    assert len(found) >= 3
    return [f"jobkit {command}" for command in found]


def public() -> dict[str, list[str]]:
    methods = [
        f"{cls.__name__}.{method}"
        for cls in (jobkit.JobStore, jobkit.AssetStore, jobkit.Runner, jobkit.Relay, jobkit.Renderers)
        for method, value in vars(cls).items()
        if not method.startswith("_") and callable(value)
    ]
    return {
        "names": jobkit.__all__,
        "names of aio, sse and testing": [*aio.__all__, *sse.__all__, *testing.__all__],
        "methods": methods,
        "commands": commands(),
        "events": list(jobkit.CONTENT_JOB_EVENTS),
        "statuses": list(jobkit.CONTENT_JOB_STATUSES),
        "errors": [n for n, v in vars(errors).items() if isinstance(v, type) and v.__module__ == "jobkit.errors"],
        "extras": list(PROJECT["optional-dependencies"]),
        "tables": list(jobkit.metadata.tables),
        "columns": sorted({column.name for table in jobkit.metadata.tables.values() for column in table.columns}),
        "environment": [URL_VARIABLE, *LIMIT_VARIABLES],
    }


@pytest.mark.parametrize("kind", list(public()))
def test_the_reference_names_all_that_is_public(kind: str) -> None:
    mentioned = {word for pattern in (r"[\w.]+", r"\w+", r"jobkit [a-z]+") for word in re.findall(pattern, REFERENCE)}
    assert [word for word in public()[kind] if word not in mentioned] == []


def test_every_example_in_a_docstring_runs() -> None:
    for path in PYTHON_FILES:
        document: Any = PythonDocStringDocument.parse(str(path), DocTestParser())
        for example in document.examples():
            example.evaluate()
