"""``jobkit demo``, ``jobkit migrate``, ``jobkit work``."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import sqlalchemy as sa

from jobkit import migrations
from jobkit.cli.app import add_app, add_source, engine_of, load
from jobkit.db.logs import log_of
from jobkit.runner.runner import Runner
from jobkit.tables import content_job_events


def add(commands: Any) -> None:
    demo = commands.add_parser("demo", help="render a PDF with an SQLite file and a folder")
    demo.add_argument("document", type=Path, nargs="?", help="a Markdown file (default: one that comes with jobkit)")
    demo.add_argument(
        "--directory", type=Path, default=Path("jobkit-demo"), help="folder for everything (default: %(default)s)"
    )
    demo.set_defaults(command=_demo)

    migrate = commands.add_parser("migrate", help="create or upgrade jobkit's tables in a database")
    add_source(migrate, positional=True)
    migrate.add_argument("--downgrade", action="store_true", help="drop the tables, with all jobs and asset rows")
    migrate.set_defaults(command=_migrate)

    work = commands.add_parser("work", help="render queued jobs until SIGTERM or Ctrl-C")
    add_app(work, "a Runner, or a function that returns one")
    work.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS", help="how long running jobs may go on (default: 30)"
    )
    work.set_defaults(command=_work)


def _demo(options: argparse.Namespace) -> int:
    from jobkit import demo

    return demo.run(options.directory, options.document)


def _migrate(options: argparse.Namespace) -> int:
    engine = load(options.app).engine if options.app else engine_of(options.url)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    before = migrations.current(engine, schema=options.schema)
    (migrations.downgrade if options.downgrade else migrations.upgrade)(engine, schema=options.schema)
    if not options.downgrade:
        _settle(engine.execution_options(schema_translate_map={None: options.schema}) if options.schema else engine)
    after = migrations.current(engine, schema=options.schema)
    change = ", nothing to do" if before == after else f" -> {after or 'no tables'}"
    print(f"{engine.url.render_as_string(hide_password=True)}: {before or 'no tables'}{change}")
    return 0


def _settle(engine: sa.Engine) -> None:
    """Write down that the event log has come from another server, before those who may not. Not of an empty log, into
    which one may be restored yet.
    """
    with engine.connect() as connection:
        if connection.execute(sa.select(content_job_events.c.id).limit(1)).first() is None:
            return
    log_of(engine)


def _work(options: argparse.Namespace) -> int:
    """Run jobs until SIGTERM or SIGINT, then let running jobs end. A second signal puts them back into the queue."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    runner = load(options.app)
    # The handlers do not raise, lest a signal interrupt ``stop`` halfway. SimpleQueue.put is reentrant.
    signals: SimpleQueue[int | None] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signals.put(number))
    runner.start()
    print(f"working for {options.app}; Ctrl-C stops", flush=True)
    signals.get()
    print(f"stopping: jobs in flight have {options.drain:g} s; once more to put them back now", flush=True)
    threading.Thread(target=_drain, args=(runner, options.drain, signals), daemon=True).start()
    if signals.get() is not None:
        runner.stop(timeout=0)
    print("stopped", flush=True)
    return 0


def _drain(runner: Runner, seconds: float, signals: SimpleQueue[int | None]) -> None:
    try:
        runner.stop(timeout=seconds)
    finally:
        signals.put(None)
