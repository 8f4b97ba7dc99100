"""The shape of the package, held by a test: layers, sizes, what an import costs, what a wheel contains."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import jobkit
from jobkit.base.libraries import PRIVATE_NAMES

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "jobkit"
MODULES = sorted(SOURCE.rglob("*.py"))
TOP_LEVEL = {
    *(".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "docs", "examples", "pyproject.toml", "src", "tests")
}
WINGS = sorted(path for path in SOURCE.iterdir() if (path / "__init__.py").exists())
# Wings whose ``__init__.py`` has public names; the others' says in one sentence what the wing is.
FACES = {"aio", "cli", "contrib", "demo", "migrations", "sse", "testing"}
# Public functions, whose parameters are promised: they may have more than eight, and two may have the same.
PROMISED = {"JobStore.create", "Runner.submit", "astream", "stream"}
# Begin with an underscore and are documented all the same: named tuples, SQLAlchemy's rows, ``os``.
DOCUMENTED = {"_asdict", "_exit", "_make", "_mapping", "_replace"}
LIBRARY_NAMES = {name.rpartition(".")[2] for name in PRIVATE_NAMES}
SAME_LINES = 6


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


def qualified(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions by their name, a method's with its class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from qualified(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
            yield from qualified(node)
        else:
            yield from qualified(node, prefix)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All that a caller may pass."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *([given.vararg] if given.vararg else []), *given.kwonlyargs]
    every += [given.kwarg] if given.kwarg else []
    return every[1:] if every and every[0].arg in ("self", "cls") else every


def problems(path: Path, text: str) -> list[str]:
    """Everything about one module that would keep it from being read at once."""
    tree, name = ast.parse(text), path.relative_to(SOURCE).as_posix()
    found = [f"{name} has {text.count(chr(10))} lines"] if text.count("\n") > 450 else []
    found += [f"{name}: {f.name} has {code_lines(f)} lines" for f in functions(tree) if code_lines(f) > 60]
    found += [
        f"{name}: {full_name} has {len(parameters(f))} parameters"
        for full_name, f in qualified(tree)
        if len(parameters(f)) > 8 and full_name not in PROMISED
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = [f for f in node.body if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
            public = [f for f in methods if not f.name.startswith("_")]
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
        ('"""x"""\ndef f(a, b, c, d, *e, g, h, i, **j): ...\n', "f has 9 parameters"),
        ('"""x"""\nclass C:\n    def f(self, a, b, c, d, e, *, g, h, i, j): ...\n', "C.f has 9 parameters"),
        ("x = 1\n", "does not say what it is"),
        ('"""x"""\nimport jobkit\n', "imports the package root"),
        ('"""x"""\nfrom jobkit import JobStore\n', "imports the package root"),
    ],
)
def test_the_shape_checks_see_what_they_are_for(text: str, complaint: str) -> None:
    assert any(complaint in problem for problem in problems(SOURCE / "new.py", text))


def sources() -> dict[str, str]:
    """The text of each module, by its path below the package."""
    return {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in MODULES}


def defined_names(tree: ast.AST) -> set[str]:
    """What a module defines: its functions, classes and variables, and the attributes it gives to its objects."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            found.add(node.attr)
    return found


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def foreign_private_names(modules: Mapping[str, str]) -> list[str]:
    """Private names used in a module that does not define them. A subclass may use those of its class."""
    trees = {name: ast.parse(text) for name, text in modules.items()}
    defined = {name: defined_names(tree) for name, tree in trees.items()}
    anywhere = set().union(*defined.values())
    found = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                known = anywhere if of_self(node) else defined[module]
                names = [node.attr] if node.attr not in known else []
            elif isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names if f"{node.module}.{alias.name}" not in modules_of(modules)]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in GETTERS:
                names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [
                f"{module}: {name}"
                for name in names
                if is_private(name) and name not in DOCUMENTED and name not in LIBRARY_NAMES
            ]
    return found


GETTERS = {"getattr", "hasattr", "setattr", "delattr"}


def modules_of(modules: Mapping[str, str]) -> set[str]:
    """Their dotted names. A module may be private to its folder: then only import-linter's contracts matter."""
    return {f"jobkit.{name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}" for name in modules}


def code_of(text: str) -> Iterator[tuple[int, str]]:
    """Each line that counts as code, with its number: no blank line, comment, import, lone punctuation; no field of a
    class, which declares data that another class may have too; and nothing of the parameters of promised functions.
    """
    tree = ast.parse(text)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert node.end_lineno is not None
            skipped |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.ClassDef):
            skipped |= {field.lineno for field in node.body if isinstance(field, ast.AnnAssign) and field.value is None}
    for name, function in qualified(tree):
        if name in PROMISED:
            skipped |= set(range(function.lineno, function.body[0].lineno))
    for number, line in enumerate(text.splitlines(), 1):
        code = " ".join(line.split())
        if number not in skipped and re.search(r"\w", code) and not code.startswith("#"):
            yield number, code


def repeated(modules: Mapping[str, str]) -> list[str]:
    """Six lines of code in a row that stand in two places; of a longer run, its first six."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    followed: set[tuple[str, ...]] = set()
    for module, text in modules.items():
        if module.startswith("migrations/versions/"):
            continue  # frozen: it says what the tables were
        lines = list(code_of(text))
        before: tuple[str, ...] = ()
        for first in range(len(lines) - SAME_LINES + 1):
            run = tuple(code for _, code in lines[first : first + SAME_LINES])
            if before in places and len(places[before]) > 1 and run in places:
                followed.add(run)
            places[run].append(f"{module}:{lines[first][0]}")
            before = run
    return [" ~ ".join(where) for run, where in places.items() if len(where) > 1 and run not in followed]


def cycle(modules: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, wherever the import stands; none when there is none."""
    known = modules_of(modules)
    graph: dict[str, set[str]] = {}
    for module, text in modules.items():
        (own,) = modules_of({module: text})
        graph[own] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                graph[own] |= {alias.name for alias in node.names} & known
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    graph[own] |= {inner if inner in known else str(node.module)} & known
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_private_name_is_used_outside_of_its_module() -> None:
    assert foreign_private_names(sources()) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from jobkit.one import _x", "_x"),
        ("from jobkit import one\none._x", "_x"),
        ("def f(thing):\n    return thing._held", "_held"),
        ("def f(thing):\n    return getattr(thing, '_held', None)", "_held"),
        ("class C(Other):\n    def f(self):\n        return self._unknown", "_unknown"),
    ],
)
def test_a_private_name_of_another_module_is_seen(text: str, name: str) -> None:
    one = "_x = 1\nclass One:\n    def __init__(self):\n        self._held = 1\n"
    assert foreign_private_names({"one.py": one, "two.py": text}) == [f"two.py: {name}"]


def test_own_private_names_and_those_of_a_base_class_are_no_problem() -> None:
    one = "_x = 1\nclass One:\n    def __init__(self, other):\n        self._held = other._held\n"
    two = "class Two(One):\n    def f(self):\n        return self._held\n"
    assert foreign_private_names({"one.py": one, "two.py": two}) == []


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_a_library_still_has_the_private_name_that_is_used(name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    module, _, kind = owner.partition(":")
    found = import_module(module)
    if kind:
        found = getattr(found, kind)
    in_its_init = re.search(rf"\bself\.{attribute}\b[^=\n]*=", inspect.getsource(found))
    assert hasattr(found, attribute) or in_its_init


def test_a_private_name_of_a_library_that_is_not_used_is_not_listed() -> None:
    text = "".join(sources()[name] for name in sources() if name != "base/libraries.py")
    assert [name for name in sorted(LIBRARY_NAMES) if not re.search(rf"\b{name}\b", text)] == []


def test_no_six_lines_are_written_twice() -> None:
    assert repeated(sources()) == []


def test_repeated_lines_are_seen_and_imports_comments_and_blank_lines_do_not_count() -> None:
    lines = [f"x{number} = {number}" for number in range(7)]
    spread = "import os\n" + "\n\n".join(f"# {line}\n{line}" for line in lines)
    assert repeated({"a.py": "\n".join(lines), "b.py": spread}) == ["a.py:1 ~ b.py:3"]
    assert repeated({"a.py": "\n".join(lines[:5]), "b.py": spread}) == []
    imports = "from a import (\n" + ",\n".join("abcdefgh") + ",\n)\n"
    assert repeated({"a.py": imports, "b.py": imports}) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycle(sources()) == []
    assert cycle({"a.py": "from jobkit.b import x", "b.py": "def f():\n    import jobkit.a"}) != []
    assert cycle({"a.py": "from jobkit import b", "b.py": "x = 1"}) == []


def test_the_package_without_renderers_and_tools_for_tests_has_a_size_that_can_be_read() -> None:
    counted = {name: text for name, text in sources().items() if not name.startswith(("contrib/", "testing/"))}
    assert sum(text.count("\n") for text in counted.values()) <= 13_600


def test_the_top_has_few_files_and_so_has_every_folder() -> None:
    files = [path for path in SOURCE.iterdir() if path.is_file()]
    assert len(files) <= 8, sorted(path.name for path in files)
    inside = Counter(path.parent.relative_to(SOURCE).as_posix() for path in MODULES if path.name != "__init__.py")
    del inside["migrations/versions"]  # one for each revision
    assert {folder: count for folder, count in inside.items() if count > 9} == {}


@pytest.mark.parametrize("wing", [path for path in WINGS if path.name not in FACES], ids=lambda path: str(path.name))
def test_a_wing_says_in_one_sentence_what_it_is_and_loads_nothing(wing: Path) -> None:
    tree = ast.parse((wing / "__init__.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert len(tree.body) == 1
    assert docstring is not None
    assert docstring.endswith(".")
    assert docstring.count(".") == 1


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
