"""The shape of the package, held by a test: layers, sizes, what an import costs, what a wheel contains."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import jobkit

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "jobkit"
MODULES = sorted(SOURCE.rglob("*.py"))
TOP_LEVEL = {
    *(".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "docs", "examples", "pyproject.toml", "src", "tests")
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert node.end_lineno is not None
    first = node.body[0]
    docstring = 0
    if ast.get_docstring(node) is not None:
        assert first.end_lineno is not None
        docstring = first.end_lineno - first.lineno + 1
    return node.end_lineno - node.lineno + 1 - docstring


def problems(path: Path, text: str) -> list[str]:
    """Everything about one module that would keep it from being read at once."""
    tree, name = ast.parse(text), path.relative_to(SOURCE).as_posix()
    found = [f"{name} has {text.count(chr(10))} lines"] if text.count("\n") > 450 else []
    found += [f"{name}: {f.name} has {code_lines(f)} lines" for f in functions(tree) if code_lines(f) > 60]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            public = [f for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
            found += [f"{name}: {node.name} has {len(public)} public methods"] if len(public) > 20 else []
    if path.name != "__init__.py" and ast.get_docstring(tree) is None:
        found.append(f"{name} does not say what it is")
    if path != SOURCE / "__init__.py" and any(from_root(node) for node in ast.walk(tree)):
        found.append(f"{name} imports the package root")
    return found


def from_root(node: ast.AST) -> bool:
    """Whether an import reaches for names that only the package root has."""
    if isinstance(node, ast.Import):
        return any(alias.name == "jobkit" for alias in node.names)
    if not isinstance(node, ast.ImportFrom) or node.module != "jobkit":
        return False
    return any(not (SOURCE / a.name).is_dir() and not (SOURCE / f"{a.name}.py").exists() for a in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_every_module_can_be_read_at_once(path: Path) -> None:
    assert problems(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('"""x"""\n' + "x = 1\n" * 450, "451 lines"),
        ('"""x"""\ndef f():\n' + "    x = 1\n" * 60, "f has 61 lines"),
        ('"""x"""\nclass C:\n' + "".join(f"    def m{n}(self): ...\n" for n in range(21)), "21 public methods"),
        ("x = 1\n", "does not say what it is"),
        ('"""x"""\nimport jobkit\n', "imports the package root"),
        ('"""x"""\nfrom jobkit import JobStore\n', "imports the package root"),
    ],
)
def test_the_shape_checks_see_what_they_are_for(text: str, complaint: str) -> None:
    assert any(complaint in problem for problem in problems(SOURCE / "new.py", text))


def test_imports_go_downwards_only() -> None:
    ran = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout


def test_an_import_loads_no_web_framework_no_driver_no_renderer_and_not_yet_alembic_or_fsspec() -> None:
    unwanted = ("alembic", "fsspec", "flask", "werkzeug", "psycopg", "typst", "markdown_it", "s3fs", "sqlalchemy.orm")
    code = f"import sys, jobkit; print([name for name in {unwanted!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_runtime_dependencies_are_four() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = sorted(requirement.split(">")[0] for requirement in project["dependencies"])
    assert names == ["alembic", "blinker", "fsspec", "sqlalchemy"]


def test_public_names_exist_and_nothing_else_is_public() -> None:
    assert [name for name in jobkit.__all__ if not hasattr(jobkit, name)] == []
    public = {name for name in vars(jobkit) if not name.startswith("_")}
    submodules = {path.stem for path in SOURCE.glob("*.py")} | {path.name for path in SOURCE.iterdir() if path.is_dir()}
    assert public - submodules == set(jobkit.__all__) - submodules


def test_the_changelog_is_headed_by_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert jobkit.__version__ in changelog.split("\n## ")[1].split("\n")[0]


def test_the_top_level_of_the_repository_is_fixed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        assert {name.split("/")[0] for name in listed.stdout.splitlines()} <= TOP_LEVEL


def test_no_pinned_file_names_a_registry() -> None:
    pins = sorted((ROOT / ".ci" / "requirements").glob("*.txt"))
    assert [pin.name for pin in pins] == ["demo.txt", "test.txt", "uv.txt"]
    for pin in pins:
        text = pin.read_text()
        assert "--hash=sha256:" in text
        assert "://" not in text
