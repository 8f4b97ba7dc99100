"""However a run is started, its tests find the same signals, umask, locale, time zone and environment."""

from __future__ import annotations

import locale
import os
import pty
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.surroundings import COLOURS, KEPT_SIGNALS, UMASK

ROOT = Path(__file__).parents[1]
TRIAL = "test_the_state_is_the_known_one"
# What a shell, a service manager or a terminal may have done beforehand, as lines of Python.
IGNORED = """
for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGQUIT", "SIGPIPE", "SIGCHLD", "SIGUSR1"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
"""
BLOCKED = "signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())"
STARTS = {
    "signals ignored": (IGNORED, {}),
    "signals blocked": (BLOCKED, {}),
    "umask 0": ("os.umask(0)", {}),
    "umask 077, nice": ("os.umask(0o077); os.nice(19)", {}),
    "nothing open": ("os.closerange(0, 1)", {}),
    "C": ("", {"LC_ALL": "C", "LANG": "C"}),
    "Turkish": ("", {"LC_ALL": "tr_TR", "LANG": "tr_TR.ISO-8859-9", "LANGUAGE": "tr", "TZ": "Asia/Kathmandu"}),
    "CI": ("", {"CI": "true", "COLUMNS": "20", "NO_COLOR": "1", "http_proxy": "http://127.0.0.1:9", "NO_PROXY": "*"}),
    "coloured": ("", {"FORCE_COLOR": "1", "ALL_PROXY": "http://127.0.0.1:9", "PGHOST": "nowhere.invalid"}),
    "Python": ("", {"PYTHONIOENCODING": "ascii", "PYTHONDEVMODE": "1", "PYTHONUTF8": "0", "PYTHONASYNCIODEBUG": "1"}),
}


def test_the_state_is_the_known_one() -> None:
    assert [s for s in signal.valid_signals() if signal.getsignal(s) is signal.SIG_IGN and named(s)] == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    os.umask(umask := os.umask(0))
    assert umask == UMASK
    assert time.tzname == ("UTC", "UTC")
    assert locale.getpreferredencoding().lower() == "utf-8"
    assert urllib.request.getproxies() == {}
    assert {"CI", "COLUMNS", "LC_ALL", "PGHOST", "PYTHONIOENCODING", *COLOURS} & os.environ.keys() == set()
    for descriptor in range(3):
        os.fstat(descriptor)


def named(number: signal.Signals | int) -> bool:
    return getattr(number, "name", "") not in KEPT_SIGNALS


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process ignores and blocks")
def test_a_child_ignores_and_blocks_nothing() -> None:
    told = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    status = dict(line.split(":\t", 1) for line in told.splitlines() if ":\t" in line)
    hangup = 1 << (signal.SIGHUP - 1)
    assert (int(status["SigBlk"], 16), int(status["SigIgn"], 16) & ~hangup) == (0, 0)


@pytest.mark.parametrize("start", STARTS)
def test_the_state_does_not_depend_on_how_the_run_was_started(start: str) -> None:
    before, environment = STARTS[start]
    ran = subprocess.run(
        command(before),
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "2 passed" in ran.stdout


def test_the_state_is_the_same_on_a_terminal() -> None:
    controlling, terminal = pty.openpty()
    try:
        with subprocess.Popen(command(""), cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal) as ran:
            os.close(terminal)
            told = b""
            try:
                while part := os.read(controlling, 65536):
                    told += part
            except OSError:  # the end, of a terminal
                pass
        assert ran.returncode == 0, told.decode()
    finally:
        os.close(controlling)


def command(before: str) -> list[str]:
    """A pytest of the two tests above, in a process that did ``before`` first."""
    tests = [f"{__file__}::{name}" for name in (TRIAL, "test_a_child_ignores_and_blocks_nothing")]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return [sys.executable, "-c", f"import os, signal, sys\n{before}\nos.execv(sys.argv[1], sys.argv[1:])", *pytest_]
