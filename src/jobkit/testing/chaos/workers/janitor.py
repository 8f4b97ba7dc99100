"""The janitor: sweeps the storage all the time, and takes jobs from lost workers, as a host's cron may do."""

from __future__ import annotations

from contextlib import ExitStack

from jobkit.maintenance.rescue import RescueReport
from jobkit.rendering.renderers import Renderers
from jobkit.runner.runner import Runner
from jobkit.testing.chaos.workers.points import through
from jobkit.testing.chaos.workers.process import Process
from jobkit.testing.faulty import FaultPlan

PAUSE = 0.25


def main(process: Process) -> None:
    """Sweep and rescue until SIGTERM. One in twenty objects cannot be removed at first."""
    engine = process.engine()
    faults = FaultPlan.seeded(process.settings["life"], rate=0.05, operations=("rm_file",))
    older_than = process.settings["older_than"]
    with ExitStack() as stack:
        # Through the same door as the workers whose storage fails: it knows what they leave unfinished.
        assets = process.assets(engine, stack.enter_context(through(faults, process.settings["storage"])))
        runner = Runner(engine, assets, Renderers())
        process.tell(ready=True)
        while not process.ends_within(PAUSE):
            report = process.persist(lambda: assets.collect_garbage(older_than=older_than, dry_run=False))
            rescued = process.persist(runner.rescue) if process.settings["rescues"] else RescueReport()
            told = {
                "swept": report.abandoned + report.deleted,
                "settled": report.settled,
                "rescued": rescued.queued + rescued.failed + rescued.cancelled,
            }
            if any(told.values()):
                process.tell(**told)
