#!/usr/bin/env python3
"""Everything a clone needs, in one command each, with nothing but Python 3.11 or newer:

    python3 .ci/dev.py demo [ARGS]    make a PDF on an SQLite file and a folder; ARGS go to ``jobkit demo``
    python3 .ci/dev.py test           all checks and tests
    python3 .ci/dev.py test --quick   all checks and the quick tests, in about a minute: before each commit
    python3 .ci/dev.py test --measure as without it; also writes tests/slow.txt anew, which says what is not quick
    python3 .ci/dev.py test ARGS      pytest alone, which gets ARGS
    python3 .ci/dev.py lock           pin the newest releases that fit together anew

The environment is ``.venv`` beside this folder. Every package comes in the version and with the hash that
``.ci/requirements`` names. A command that finds its environment up to date starts at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / ".ci" / "requirements"
ENVIRONMENT = ROOT / ".venv"
BIN = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
OLDEST = (3, 11)

# What is pinned, each a superset of the one before: the installer, what the demo needs, what the tests need.
EXTRAS = {"demo": "pdf", "test": "test"}
# Most tests wait for something most of the time, so two at once help even on one core. Each process has servers of its
# own, so more than four would mostly start servers.
PARALLEL = ["-n", str(min(4, max(2, os.cpu_count() or 2))), "--dist", "worksteal"]
BUILD = "hatchling>=1.26\neditables>=0.5\n"


def main() -> int:
    if sys.version_info < OLDEST:
        print(f"jobkit needs Python {'.'.join(map(str, OLDEST))} or newer; this is {sys.version.split()[0]}")
        return 1
    command, arguments = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if command == "demo":
        prepare("demo")
        return run(BIN / "jobkit", "demo", *arguments)
    if command == "test":
        prepare("test")
        prepare_programs()
        return test(arguments)
    if command == "lock":
        prepare("test")
        return lock()
    print(__doc__)
    return 0 if command in ("help", "-h", "--help") else 2


def test(arguments: list[str]) -> int:
    settle()
    which: list[str] = []
    if arguments == ["--quick"]:
        which = ["-m", "not slow"]
    elif arguments == ["--measure"]:
        which = ["--measure-tiers"]
    elif arguments:
        return run(BIN / "python", "-m", "pytest", *arguments)
    steps: list[tuple[str, list[Any]]] = [
        ("style", [BIN / "ruff", "check", "."]),
        ("format", [BIN / "ruff", "format", "--check", "."]),
        ("types", [BIN / "mypy"]),
        ("layers", [BIN / "lint-imports"]),
        ("tests", [BIN / "python", "-m", "pytest", "-q", "--durations=10", *PARALLEL, *which]),
    ]
    for name, step in steps:
        say(f"{name}: {' '.join([step[0].name, *map(str, step[1:])])}")
        if status := run(*step):
            say(f"{name}: failed")
            return status
    say("all checks and tests passed")
    return 0


# --- the environment


def prepare(kind: str) -> None:
    """Make ``.venv`` hold what ``kind`` needs; nothing happens when it does."""
    stamp, wanted = ENVIRONMENT / f"jobkit-{kind}.stamp", fingerprint(kind)
    if stamp.exists() and stamp.read_text() == wanted and (BIN / "jobkit").exists():
        return
    start = time.monotonic()
    if not works(BIN / "python", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"):
        say(f"making {ENVIRONMENT.relative_to(ROOT)} with Python {sys.version.split()[0]}")
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        make_environment()
    install(kind)
    stamp.write_text(wanted)
    say(f"ready after {time.monotonic() - start:.1f} s")


def fingerprint(kind: str) -> str:
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", REQUIREMENTS / f"{kind}.txt"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_environment() -> None:
    if works(sys.executable, "-c", "import ensurepip"):
        must([sys.executable, "-m", "venv", ENVIRONMENT])
    else:  # Debian's python3 without python3-venv: the pip outside serves
        must([sys.executable, "-m", "venv", "--without-pip", ENVIRONMENT])


def install(kind: str) -> None:
    """Install what ``kind`` needs with uv, which is several times as fast, or else with pip."""
    python, uv = BIN / "python", BIN / "uv"
    if works(python, "-m", "pip", "--version"):
        pip = [python, "-m", "pip", "install"]
    else:
        pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    pip += ["-q", "--disable-pip-version-check"]
    if not uv.exists():
        run(*pip, "--require-hashes", "-r", REQUIREMENTS / "uv.txt")
    # The machine's certificates, because a proxy may have added its own; pip brings some where the machine has none.
    installers = {"uv": [uv, "pip", "install", "-q", "--system-certs", "--python", python], "pip": pip}
    for name, installer in installers.items():
        if name == "uv" and not works(uv, "--version"):
            continue
        say(f"installing what the {kind} needs, with {name}")
        pinned = run(*installer, "--require-hashes", "-r", REQUIREMENTS / f"{kind}.txt")
        if not (pinned or run(*installer, "--no-deps", "--no-build-isolation", "-e", ROOT)):
            return
    say("the packages could not be installed; the messages above say why")
    raise SystemExit(1)


# --- programs that have no wheel

APT_LIMIT = 600.0  # seconds, for about 120 MB
APT = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=3", "-o", "Acquire::http::Timeout=60"]


def prepare_programs() -> None:
    """Have a Chromium and a PgBouncer, where they can be installed. Who may not install them goes without the tests
    that need them; where Chromium's installation fails, those that need it fail.
    """
    sys.path.insert(0, str(ROOT))
    from tests.support import chromium

    browser = chromium.unwanted() or chromium.find()
    missing = [*([] if browser else ["chromium"]), *([] if shutil.which("pgbouncer") else ["pgbouncer"])]
    if not missing:
        return
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        say(f"{' and '.join(missing)} cannot be installed here; the tests that need them are left out")
        if not browser:
            say(chromium.HELP)
            os.environ["JOBKIT_TEST_NO_BROWSER"] = "1"
        return
    say(f"installing {' and '.join(missing)} with apt-get, for the tests that need them; once, about a minute")
    told = apt("update")
    for program in missing:
        for _ in range(2):  # another installation may be under way
            told += apt("install", "-y", "--no-install-recommends", program)
            if chromium.find() if program == "chromium" else shutil.which(program):
                break
        else:
            say(f"apt-get did not install {program}: {told.strip()[-2000:]}")


def apt(*command: str) -> str:
    """What apt-get had to say. One that takes too long is ended softly: a kill would leave half a package."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([*APT, *command], env=environment, text=True, errors="replace", **pipes) as running:
        try:
            return running.communicate(timeout=APT_LIMIT)[0]
        except subprocess.TimeoutExpired:
            running.terminate()
            return running.communicate()[0] + f"\n{' '.join(command)} took longer than {APT_LIMIT:.0f} s"


# --- pins


def lock() -> int:
    """Write ``.ci/requirements``: names, versions, hashes; no address of any registry."""
    compile_ = [BIN / "uv", "pip", "compile", "-q", "--universal", "--python-version", "3.11", "--upgrade"]
    compile_ += ["--generate-hashes", "--no-header", "--no-annotate"]
    REQUIREMENTS.mkdir(exist_ok=True)
    jobs = [("uv", ["-"], "uv\n")]
    jobs += [(kind, ["pyproject.toml", "-", "--extra", extra], BUILD) for kind, extra in EXTRAS.items()]
    for name, sources, stdin in jobs:
        say(f"pinning {name}.txt")
        command = [*compile_, *sources]
        found = subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True, text=True, check=False)
        if found.returncode:
            print(found.stderr, file=sys.stderr)
            return found.returncode
        (REQUIREMENTS / f"{name}.txt").write_text(found.stdout)
    return 0


# --- commands


def settle() -> None:
    """Let the tests see the same signals, umask, locale and environment however this was started."""
    sys.path.insert(0, str(ROOT))
    from tests.support import surroundings

    surroundings.settle()


def run(*command: object) -> int:
    return subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode


def works(*command: object) -> bool:
    try:
        run = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, check=False)
    except OSError:
        return False
    return run.returncode == 0


def must(command: list[object]) -> None:
    if status := run(*command):
        say(f"that failed: {' '.join(str(part) for part in command)}")
        raise SystemExit(status)


def say(text: str) -> None:
    print(f"[jobkit] {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
