"""A worker: a started runner, which the plan lets die, freeze or stop."""

from __future__ import annotations

from contextlib import ExitStack

from jobkit import signals
from jobkit.rendering.renderers import Renderers
from jobkit.runner.runner import Runner
from jobkit.testing.chaos.workers.points import Points, StoragePlan, through
from jobkit.testing.chaos.workers.process import Process, Witness
from jobkit.testing.chaos.workers.workload import register
from jobkit.types import JobEvent

# A worker checks one event in this many.
CHECKED = 8
# Seconds between a worker's reports of its runner's metrics.
REPORT = 0.05


def main(process: Process) -> None:
    """Run jobs until SIGTERM, or until the plan has it otherwise."""
    settings = process.settings
    points = Points(process, doom=settings["doom"], point=settings["point"], skip=settings["skip"])
    engine = process.engine()
    points.watch_commits(engine)
    with ExitStack() as stack:
        url = None
        if settings["fault_rate"] or (settings["point"] or "").startswith("storage"):
            faults = StoragePlan(process, points, seed=settings["seed"], rate=settings["fault_rate"])
            url = stack.enter_context(through(faults, settings["storage"]))
        renderers = Renderers()
        witness = Witness(process)
        register(renderers, points, witness)
        runner = Runner(
            engine,
            process.assets(engine, url),
            renderers,
            concurrency=settings["concurrency"],
            lease=settings["lease"],
            poll_interval=0.2,
            db_timeout=settings["db_timeout"],
        )

        def hear(_company: str, *, event: JobEvent) -> None:
            witness.sometimes(event, CHECKED)
            points.reach("receiver")

        for signal in (signals.content_job_running, signals.content_job_done, signals.content_job_failed):
            signal.connect(hear)
        process.persist(runner.start)
        process.tell(ready=True)
        _report(process, runner)
        runner.stop(settings["patience"])
        process.tell(ended=runner.metrics().ended, rejected=runner.metrics().rejected)


def _report(process: Process, runner: Runner) -> None:
    """Tell of each rejected write while it is news: a worker that is killed can tell nothing at its end."""
    told = 0
    while not process.ends_within(REPORT):
        if (rejected := runner.metrics().rejected) != told:
            told = rejected
            process.tell(rejected=told)
