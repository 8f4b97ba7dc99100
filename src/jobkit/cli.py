"""The command line: ``jobkit demo``, ``jobkit migrate``, ``jobkit work``, ``jobkit assets``."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue

import sqlalchemy as sa

from jobkit import migrations
from jobkit.audit import audit, elsewhere
from jobkit.errors import ConfigurationError, JobkitError
from jobkit.runner import Runner
from jobkit.schema import require_schema
from jobkit.text import describe

URL_VARIABLE = "JOBKIT_DATABASE_URL"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0, 1 when the work failed, 2 when the command could not begin."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except (JobkitError, sa.exc.SQLAlchemyError, OSError) as error:
        print(f"jobkit: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jobkit", description="Content jobs for Python web apps.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make a PDF of a real document, on an SQLite file and a folder")
    demo.add_argument(
        "document", type=Path, nargs="?", help="a Markdown file (default: the one that comes with jobkit)"
    )
    demo.add_argument(
        "--directory", type=Path, default=Path("jobkit-demo"), help="where everything goes (default: %(default)s)"
    )
    demo.set_defaults(command=_demo)

    migrate = commands.add_parser("migrate", help="bring a database to this version of jobkit")
    _add_database(migrate)
    migrate.add_argument("--schema", help="a PostgreSQL schema to keep the tables in")
    migrate.add_argument("--downgrade", action="store_true", help="remove the tables, jobs and asset rows with them")
    migrate.set_defaults(command=_migrate)

    work = commands.add_parser("work", help="render queued jobs until SIGTERM or Ctrl-C")
    work.add_argument("--app", required=True, metavar="MODULE:RUNNER", help="a Runner, or a function that makes one")
    work.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS", help="how long jobs in flight may take to end"
    )
    work.set_defaults(command=_work)

    _add_assets(commands.add_parser("assets", help="check what is stored, and remove what no row names"))
    return parser


def _add_assets(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="read every asset and compare it with its row")
    verify.add_argument("--company", metavar="ID", help="only those of one company")
    verify.set_defaults(command=_verify)

    gc = commands.add_parser("gc", help="tell what a sweep would remove; with --yes remove it")
    gc.add_argument(
        "--older-than", type=_hours, default=_hours("24"), metavar="HOURS",
        help="how long a file may take from its record to its row (default: 24)",
    )  # fmt: skip
    gc.add_argument("--yes", action="store_true", help="do it")
    gc.set_defaults(command=_collect_garbage)
    for command in (verify, gc):
        command.add_argument("--app", required=True, metavar="MODULE:RUNNER", help="whose assets and database")


def _hours(text: str) -> timedelta:
    try:
        hours = timedelta(hours=float(text))
    except (ValueError, OverflowError):
        hours = timedelta(-1)
    if hours < timedelta(0):
        raise argparse.ArgumentTypeError(f"not a number of hours: {text!r}")
    return hours


def _add_database(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "url", nargs="?", default=os.environ.get(URL_VARIABLE), help=f"SQLAlchemy URL (default: ${URL_VARIABLE})"
    )
    where.add_argument("--app", metavar="MODULE:RUNNER", help="the database of this Runner")


def _demo(options: argparse.Namespace) -> int:
    from jobkit import demo

    return demo.run(options.directory, options.document)


def _migrate(options: argparse.Namespace) -> int:
    engine = _load(options.app).engine if options.app else _engine(options.url)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    before = migrations.current(engine, schema=options.schema)
    (migrations.downgrade if options.downgrade else migrations.upgrade)(engine, schema=options.schema)
    after = migrations.current(engine, schema=options.schema)
    shown = engine.url.render_as_string(hide_password=True)
    print(
        f"{shown}: {before or 'no tables'} -> {after or 'no tables'}"
        if before != after
        else f"{shown}: {after or 'no tables'}, nothing to do"
    )
    return 0


def _engine(url: str | None) -> sa.Engine:
    if url is None:
        raise ConfigurationError(f"which database? Give its URL, --app, or ${URL_VARIABLE}")
    try:
        engine = sa.create_engine(url)
    except ImportError as error:
        raise ConfigurationError(f"{error}: install the driver, for PostgreSQL with jobkit[postgresql]") from error
    return engine


def _work(options: argparse.Namespace) -> int:
    """Until the first SIGTERM or SIGINT; then jobs in flight may end. A second one puts them back into the queue."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    runner = _load(options.app)
    # The handlers raise nothing, so that no signal hits halfway through a stop; SimpleQueue.put may be re-entered.
    told: SimpleQueue[int | None] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: told.put(number))
    runner.start()
    print(f"working for {options.app}; Ctrl-C stops", flush=True)
    told.get()
    print(f"stopping: jobs in flight have {options.drain:g} s; once more to put them back now", flush=True)
    threading.Thread(target=_drain, args=(runner, options.drain, told), daemon=True).start()
    if told.get() is not None:
        runner.stop(timeout=0)
    print("stopped", flush=True)
    return 0


def _drain(runner: Runner, seconds: float, told: SimpleQueue[int | None]) -> None:
    try:
        runner.stop(timeout=seconds)
    finally:
        told.put(None)


def _verify(options: argparse.Namespace) -> int:
    read = bad = 0
    with _migrated(options.app) as runner:
        for finding in audit(runner.engine, runner.assets, company_id=options.company):
            read += 1
            if finding.problem is not None:
                bad += 1
                print(f"{finding.asset.object_key}: {finding.problem}", flush=True)
        others = elsewhere(runner.engine, runner.assets, company_id=options.company)
    print(f"{read} assets read, {bad} bad" if bad else f"{read} assets read, all as their rows say")
    for provider, count in others.items():
        print(f"{count} assets are in storage {provider!r}, which this runner does not have: not read")
    return 1 if bad else 0


def _collect_garbage(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _migrated(options.app) as runner:
        report = runner.assets.collect_garbage(
            older_than=options.older_than, dry_run=not options.yes, engine=runner.engine
        )
    size = "" if report.byte_size is None else f", {report.byte_size:,} bytes"
    print(f"objects without a row: {report.abandoned} abandoned, {report.deleted} deleted{size}")
    for key in report.sample:
        print(f"  {key}")
    if (more := report.abandoned + report.deleted - len(report.sample)) > 0:
        print(f"  and {more} more")
    print(f"records of earlier sweeps: {report.settled}")
    if report.failed:
        print(f"could not be removed: {report.failed}")
    print("removed" if options.yes else "nothing was changed; --yes removes them")
    return 1 if report.failed else 0


@contextmanager
def _migrated(app: str) -> Iterator[Runner]:
    """The Runner, its database looked at; its connections are closed at the end."""
    runner = _load(app)
    try:
        require_schema(runner.engine)
        yield runner
    finally:
        runner.engine.dispose()


def _load(name: str) -> Runner:
    """The Runner that ``module:attribute`` names, modules of the working directory included."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ConfigurationError(f"--app takes MODULE:RUNNER, such as myapp.jobs:runner, not {name!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _broken(f"{module_name} cannot be imported", error) from error
        raise ConfigurationError(f"no module {error.name!r} here or on the path") from error
    except Exception as error:
        raise _broken(f"{module_name} cannot be imported", error) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{module_name} has no {path!r}")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, Runner):
        try:
            found = found()
        except Exception as error:
            raise _broken(f"{name} cannot be called", error) from error
    if not isinstance(found, Runner):
        raise ConfigurationError(f"{name} is a {type(found).__name__}, not a jobkit.Runner")
    return found


def _broken(what: str, error: Exception) -> ConfigurationError:
    """One line that says ``what`` went wrong in the host's own code, how, and in which line of which file."""
    libraries = ("<", str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [at for at in traceback.extract_tb(error.__traceback__) if not at.filename.startswith(libraries)]
    place, message = (f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""), describe(error)
    if isinstance(error, SyntaxError):
        place, message = f"{error.filename}, line {error.lineno}: ", error.msg
    return ConfigurationError(f"{what}: {place}{type(error).__name__}: {' '.join(message.split())}")
