"""A worker as a process of its own, whose interpreter has done nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from tests.benchmarks.databases import postmaster
from tests.benchmarks.measuring import Figures


class AppendedEvent(NamedTuple):
    """What a worker told of itself."""

    costs: Figures
    memory: Figures
    modules: list[str]


def run(kind: str, engine: sa.Engine, folder: Path, jobs: int) -> AppendedEvent:
    """Let a worker of this kind, ``module:function`` beside this one, do so many jobs."""
    server = postmaster(engine)
    engine.dispose()
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "tests.benchmarks.workers", kind, url, str(folder), str(jobs), str(server or 0)]
    return AppendedEvent(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
