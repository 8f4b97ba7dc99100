"""The command line: ``jobkit demo``, ``jobkit migrate``, ``jobkit work``."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

import sqlalchemy as sa

from jobkit import migrations
from jobkit.errors import ConfigurationError, JobkitError
from jobkit.runner import Runner

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
    return parser


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
            raise
        raise ConfigurationError(f"no module {error.name!r} here or on the path") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{module_name} has no {path!r}")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, Runner):
        found = found()
    if not isinstance(found, Runner):
        raise ConfigurationError(f"{name} is a {type(found).__name__}, not a jobkit.Runner")
    return found
