"""The loop of a worker that is written by hand: one thread, some jobs at a time, three commits for them together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tests.benchmarks.workers.files import ClaimedRow, File, publish, write
from tests.benchmarks.workers.report import Report

BATCH = 20
LEASE = 60


class Tables(Protocol):
    """jobkit's tables as such a worker needs them. Each method is one transaction."""

    def claim(self, limit: int) -> list[ClaimedRow]:
        """Take queued jobs: running, fence + 1, attempt + 1, leased, each with its event."""

    def intend(self, files: Sequence[File]) -> None:
        """Record the keys under which objects are about to be."""

    def finish(self, files: Sequence[File]) -> None:
        """Of the jobs whose fence still holds: done, with asset row and event; their intents go."""


def drain(tables: Tables, root: Path, jobs: int, report: Report) -> None:
    """Do so many jobs; the files go below ``root``."""
    done = 0
    while done < jobs:
        taken = tables.claim(min(BATCH, jobs - done))
        if not taken:
            raise RuntimeError(f"{done} of {jobs} jobs were there")
        report.begin()
        files = [write(root, job) for job in taken]
        tables.intend(files)
        publish(files)
        tables.finish(files)
        done += len(files)
    report.end(done)
