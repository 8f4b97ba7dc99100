"""A process of a run ends when it is told to, whatever it is doing just then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# SIGTERM comes at each line that the main thread runs while it looks whether it came.
SCRIPT = """
import signal, sys
from jobkit.testing.chaos.process import Process

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
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, timeout=60)
