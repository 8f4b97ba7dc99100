"""A process of a run ends when it is told to, whatever it is doing just then."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobkit.testing.chaos.processes import Processes
from tests.support.databases import Database

# SIGTERM comes at each line that the main thread runs while it looks whether it came.
SCRIPT = """
import signal, sys
from jobkit.testing.chaos.workers.process import Process

process = Process("some", {"folder": sys.argv[1]})
struck = 0

def strike(frame, event, argument):
    global struck
    if event == "line":
        sys.settrace(None)
        signal.raise_signal(signal.SIGTERM)
        struck += 1
        sys.settrace(strike)
    return strike

sys.settrace(strike)
ended = process.ends_within(20.0)
sys.settrace(None)
assert ended and struck, (ended, struck)
"""


def test_sigterm_does_not_stop_the_thread_that_waits_for_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, timeout=240)


@pytest.mark.parametrize("role", ["subscriber", "janitor"])
def test_a_process_that_is_told_to_end_before_it_can_hear_of_it_ends_clean(
    role: str, sqlite_database: Database, tmp_path: Path
) -> None:
    # On a busy machine all jobs may end before the last of the workers has come to its first line.
    storage = (tmp_path / "assets").as_uri()
    settings: dict[str, Any] = {"database": sqlite_database.url, "storage": storage, "storage_options": {}}
    settings |= {"folder": str(tmp_path), "life": 0, "older_than": 20.0, "rescues": False}
    with Processes(tmp_path, sqlite_database.url, storage, "") as processes:
        processes.start("one", role, settings)
        processes.signal("one", signal.SIGTERM)  # in the same breath: it arrives right after the fork
        told: list[dict[str, Any]] = [{}]
        deadline = time.monotonic() + 60
        while "exit" not in told[-1] and time.monotonic() < deadline:
            told += processes.messages(1.0)
    assert told[-1] == {"from": "one", "exit": 0}
