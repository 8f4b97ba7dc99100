"""``jobkit prune``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from typing import Any

from jobkit.cli.app import add_source, duration, opened
from jobkit.cli.output import sample, until_interrupted
from jobkit.errors import ConfigurationError
from jobkit.maintenance.prune import PruneReport, prune


def add(commands: Any) -> None:
    parser = commands.add_parser("prune", help="report old jobs; with --yes delete them")
    parser.add_argument(
        "--older-than", type=duration("d"), required=True, metavar="DAYS", help="how long ago they ended: 30, 30d, 12h"
    )
    parser.add_argument("--assets", action="store_true", help="delete their assets too; needs --app")
    parser.add_argument("--yes", action="store_true", help="delete them")
    parser.add_argument("--json", action="store_true", help="print the report as a JSON document")
    parser.set_defaults(command=_prune)
    add_source(parser)


def _prune(options: argparse.Namespace) -> int:
    if options.assets and not options.app:
        raise ConfigurationError("--assets needs --app: the database does not say which storage has them")
    with opened(options) as (engine, runner):
        store = runner.assets if runner is not None and options.assets else None
        work = partial(prune, engine, older_than=options.older_than, assets=store, dry_run=not options.yes)
        nothing = PruneReport(not options.yes)
        report, interrupted = until_interrupted(lambda tell: work(on_batch=tell), nothing, "jobs", "jobs")
    if options.json:
        print(json.dumps({**asdict(report), "sample": [str(job) for job in report.sample]}))
        return 130 if interrupted else 0
    print(f"{report.jobs} jobs, {report.events} events, {report.assets} assets")
    sample(report.sample, report.jobs)
    if report.refused:
        print(f"{report.refused} jobs stay, because other rows refer to them")
    print("deleted" if options.yes else "nothing was changed; --yes deletes them")
    return 130 if interrupted else 0
