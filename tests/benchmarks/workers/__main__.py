"""A worker process: ``python -m tests.benchmarks.workers MODULE:FUNCTION URL FOLDER JOBS POSTMASTER``; 0: no server."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tests.benchmarks.workers.report import Report


def main(kind: str, url: str, folder: str, jobs: str, postmaster: str) -> None:
    report = Report(int(postmaster) or None)
    module, function = kind.split(":")
    work = getattr(importlib.import_module(f"tests.benchmarks.workers.{module}"), function)
    work(url, Path(folder), int(jobs), report)
    report.tell()


if __name__ == "__main__":
    main(*sys.argv[1:])
