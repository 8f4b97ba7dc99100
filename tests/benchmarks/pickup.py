"""How soon an idle runner begins a job that another process has committed, and what it costs to wait for one.

    python -m tests.benchmarks.pickup [--count N] [URL]

The database at URL must be empty (default: an SQLite file). From the return of the other process' commit to the first
line of the renderer: jobs that come every 25 ms on average, each with the runner idle; then after three seconds without
any. Then the processor time of a runner, with its relay and a receiver, that gets no job for ten seconds.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from uuid import UUID

import jobkit
from tests.benchmarks.databases import database
from tests.benchmarks.relay import SILENCE, Other, report

# Wanted, in milliseconds at the median, and in hundredths of a core.
ACTIVE, OUT_OF_IDLE, IDLE = 10, 60, 1
QUIET = 3.0


class Begun:
    """When the renderer of each job began."""

    def __init__(self) -> None:
        self.at: dict[UUID, float] = {}
        self._changed = threading.Condition()

    def __call__(self, ctx: jobkit.RenderContext) -> jobkit.Rendered:
        now = time.monotonic()
        with self._changed:
            self.at[ctx.job_id] = now
            self._changed.notify_all()
        return jobkit.Rendered("a.txt", "text/plain", b"a")

    def since(self, committed: dict[tuple[UUID, int], float]) -> list[float]:
        """How long each of these took, once all have begun."""
        with self._changed:
            if not self._changed.wait_for(lambda: all(job in self.at for job, _ in committed), 60):
                raise SystemExit("jobs did not begin within a minute")
            return [self.at[job] - at for (job, _), at in committed.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?")
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    rng, begun = random.Random(7), Begun()
    heard: list[jobkit.JobEvent] = []
    unsubscribe = jobkit.signals.subscribe("other", heard.append)
    with database(options.url) as (engine, folder):
        other = Other(engine.url.render_as_string(hide_password=False))
        assets = jobkit.AssetStore(folder / "files", engine=engine)
        with jobkit.Runner(engine, assets, jobkit.Renderers(default=begun)) as runner:
            begun.since(other.commit([0.1]))
            waits = begun.since(other.commit([rng.uniform(0.015, 0.035) for _ in range(options.count)]))
            report("an idle runner, active", waits, ACTIVE)
            waits = [wait for _ in range(10) for wait in begun.since(other.commit([QUIET + rng.random()]))]
            report("out of idle", waits, OUT_OF_IDLE)
            time.sleep(SILENCE)
            before = time.process_time()
            time.sleep(SILENCE)
            share = (time.process_time() - before) / SILENCE * 100
            print(f"{'no job':44} {share:.2f} % of a core   wanted below {IDLE}{'' if share < IDLE else '  MISSED'}")
            ended = runner.metrics().ended
        other.close()
    unsubscribe()
    if (done := sum(event.type == "content_job.done" for event in heard)) != ended:
        raise SystemExit(f"{ended} jobs ended, {done} were told of")


if __name__ == "__main__":
    main()
