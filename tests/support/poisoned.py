"""A worker process with a poison job: once ``most`` jobs render, or all that are left, it kills the process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import sqlalchemy as sa

import jobkit
from tests.support.runners import note


def main(url: str, folder: str, lease: str, most: str) -> None:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        jobkit.configure_sqlite(engine, busy_timeout=30)
    poisoned, lock = threading.Event(), threading.Lock()
    begun: set[str] = set()

    def innocent(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        with lock:
            begun.add(str(ctx.job_id))
        # Beside the poison job for as long as it takes to be killed; alone, it ends.
        poisoned.wait(1)
        return note(ctx)

    def poison(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        poisoned_with = threading.Event()
        for _ in range(200):
            if len(begun) == int(most) - 1 or poisoned_with.wait(0.005):
                break
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    renderers = jobkit.Renderers(default=innocent)
    renderers.register("poison")(poison)
    store = jobkit.AssetStore(Path(folder), engine=engine)
    runner = jobkit.Runner(engine, store, renderers, lease=float(lease), concurrency=int(most), poll_interval=0.05)
    with runner:
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
