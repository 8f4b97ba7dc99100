"""``python -m tests.board [-j N] [NAME ...]``: plant every bug, or those whose names contain a NAME, and say what the
tests made of it. Ends with 1 when one survives, cannot be planted, or is not even a program.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from tests.board.bugs import BUGS
from tests.board.mutant import Bug, Copy, Outcome
from tests.support.postgres import start_server


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.board", description=__doc__)
    parser.add_argument("-j", "--jobs", type=int, default=2, help="how many bugs at once (default: 2)")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests without a bug first")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only bugs whose name contains it")
    options = parser.parse_args(arguments)
    if "JOBKIT_TEST_POSTGRES_URL" in os.environ:
        options.jobs = 1  # there is one server only
    bugs = [bug for bug in BUGS if not options.names or any(name in bug.name for name in options.names)]
    if not bugs:
        parser.error("no bug has such a name")
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end as well
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jobkit-board-")))
        copies = [_copy(folder / str(number), stack) for number in range(options.jobs)]
        if not options.unchecked and not _sound(copies, bugs):
            return 1
        outcomes = _judge(copies, bugs)
    survived = [outcome for outcome in outcomes if not outcome.killed]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} bugs killed in {time.monotonic() - began:.0f} s")
    return 1 if survived else 0


def _copy(folder: Path, stack: ExitStack) -> Copy:
    """A copy with a server of its own, because every transaction of a server holds up readers of an event log."""
    server = start_server()
    stack.callback(server.stop)
    return Copy(folder, server.url)


def _sound(copies: list[Copy], bugs: list[Bug]) -> bool:
    """Without a bug the tests pass, and each of them was run."""
    tests = sorted({test for bug in bugs for test in bug.tests})
    began = time.monotonic()
    shares = [tuple(tests[number :: len(copies)]) for number in range(len(copies))]
    with ThreadPoolExecutor(len(copies)) as pool:
        running = [pool.submit(copy.run, share) for copy, share in zip(copies, shares, strict=True) if share]
        results = [result for each in running for result in each.result()]
    red = sorted({result.test for result in results if result.failed or result.broken})
    red += sorted(set(tests) - {result.test for result in results})
    print(
        f"without a bug: {len(results)} tests in {time.monotonic() - began:.0f} s" + (f", red: {red}" if red else ""),
        flush=True,
    )
    for result in results:
        if said := result.failed or result.broken:
            print(said, flush=True)
    return not red


def _judge(copies: list[Copy], bugs: list[Bug]) -> list[Outcome]:
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(bug: Bug) -> Outcome:
        copy = free.get()
        try:
            return copy.judge(bug)
        finally:
            free.put(copy)

    outcomes = []
    width = max(len(bug.name) for bug in bugs)
    with ThreadPoolExecutor(len(copies)) as pool:
        for done in as_completed([pool.submit(one, bug) for bug in bugs]):
            outcomes.append(outcome := done.result())
            said = "killed" if outcome.killed else outcome.trouble or f"SURVIVES {', '.join(outcome.blind)}"
            print(f"{outcome.bug.name:{width}}  {outcome.seconds:5.1f} s  {said}", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
