"""A worker process that tells what it does, a line each, and does what it is told: ``go`` lets its renderers end,
``report`` prints its metrics, the end of the input stops it.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import sqlalchemy as sa

import jobkit

_telling = threading.Lock()


def tell(*words: object) -> None:
    with _telling:
        print(*words, flush=True)


def main(url: str, folder: str, lease: str, concurrency: str) -> None:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        jobkit.configure_sqlite(engine, busy_timeout=30)
    go = threading.Event()

    def render(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        tell("begun", ctx.job_id)
        go.wait()
        return jobkit.Rendered("worker.txt", "text/plain", b"by the worker")

    runner = jobkit.Runner(
        engine,
        jobkit.AssetStore(Path(folder), engine=engine),
        jobkit.Renderers(default=render),
        lease=float(lease),
        concurrency=int(concurrency),
        poll_interval=0.05,
    )
    with runner:
        for line in sys.stdin:
            if line.strip() == "go":
                go.set()
            else:
                metrics = runner.metrics()
                tell("metrics", metrics.ended, metrics.rejected)
        go.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
