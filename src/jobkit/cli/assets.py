"""``jobkit assets verify`` and ``jobkit assets gc``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

from jobkit.base.text import printable
from jobkit.cli import logs
from jobkit.cli.app import add_app, add_company, duration, load, migrated
from jobkit.cli.output import progress, sample, until_interrupted
from jobkit.maintenance.audit import audit, elsewhere
from jobkit.types import GarbageReport


def add(commands: Any) -> None:
    parser = commands.add_parser("assets", help="check stored files, and remove those without a row")
    own = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = own.add_parser("verify", help="read every asset and compare it with its row")
    add_company(verify, "assets")
    verify.set_defaults(command=_verify)

    gc = own.add_parser("gc", help="report objects without a row; with --yes remove them")
    gc.add_argument(
        "--older-than", type=duration("h"), default=timedelta(hours=24), metavar="HOURS",
        help="how long a file may take until it has its row (default: 24)",
    )  # fmt: skip
    gc.add_argument("--yes", action="store_true", help="remove them")
    gc.add_argument("--json", action="store_true", help="print the report as a JSON document")
    gc.set_defaults(command=_collect_garbage)
    for command in (verify, gc):
        add_app(command, "the Runner with the assets and the database")


def _verify(options: argparse.Namespace) -> int:
    read = bad = 0
    runner = load(options.app)
    logs.configure(options)
    with migrated(runner.engine), progress("assets", None) as advance:
        for finding in audit(runner.engine, runner.assets, company_id=options.company):
            read += 1
            advance(1)
            if finding.problem is not None:
                bad += 1
                print(f"{printable(finding.asset.object_key)}: {printable(finding.problem)}", flush=True)
        others = elsewhere(runner.engine, runner.assets, company_id=options.company)
    print(f"{read} assets read, {bad} bad" if bad else f"{read} assets read, all as their rows say")
    for provider, count in others.items():
        print(f"{count} assets are in storage {provider!r}, which this runner does not have: not read")
    return 1 if bad else 0


def _collect_garbage(options: argparse.Namespace) -> int:
    runner, age = load(options.app), options.older_than
    logs.configure(options)
    with migrated(runner.engine):
        work = partial(runner.assets.collect_garbage, older_than=age, dry_run=not options.yes, engine=runner.engine)
        nothing, parts = GarbageReport(not options.yes, 0, 0, 0, 0, None, ()), ("abandoned", "deleted", "settled")
        report, interrupted = until_interrupted(lambda tell: work(on_batch=tell), nothing, "objects", *parts)
    if options.json:
        print(json.dumps(asdict(report)))
        return 130 if interrupted else 1 if report.failed else 0
    size = "" if report.byte_size is None else f", {report.byte_size:,} bytes"
    print(f"objects without a row: {report.abandoned} abandoned, {report.deleted} deleted{size}")
    sample(report.sample, report.abandoned + report.deleted)
    print(f"records of earlier sweeps: {report.settled}")
    if report.failed:
        print(f"could not be removed: {report.failed}")
    print("removed" if options.yes else "nothing was changed; --yes removes them")
    return 130 if interrupted else 1 if report.failed else 0
