"""``jobkit demo``, ``jobkit migrate``, ``jobkit work``."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from jobkit import migrations
from jobkit.base.text import without_secrets
from jobkit.cli import logs
from jobkit.cli.app import add_app, add_source, engine_of, load
from jobkit.cli.hearing import Bell, Speaker
from jobkit.db.logs import log_of
from jobkit.errors import ConfigurationError
from jobkit.runner.runner import Runner
from jobkit.tables import content_job_events

# Exit status of a worker that left jobs to others: sysexits' EX_TEMPFAIL.
PUT_BACK = 75
# Seconds after the time to drain within which jobs are put back, signals delivered and the process has ended; the same
# after a second signal, when nobody has named a time.
LAST, LAST_AT_ONCE = 0.9, 3.0
# Seconds between two looks at whether the runner has stopped by itself.
LOOK = 1.0
# Seconds for the last line to be printed.
LAST_LINE = 0.2


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

    work = commands.add_parser("work", help="render queued jobs until SIGTERM, SIGHUP or Ctrl-C")
    add_app(work, "a Runner, or a function that returns one")
    work.add_argument(
        "--drain", type=_seconds, default=30.0, metavar="SECONDS", help="how long running jobs may go on (default: 30)"
    )
    work.add_argument("--wait", action="store_true", help="wait for the database and its tables, instead of failing")
    work.set_defaults(command=_work)


def _seconds(given: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(given)) <= threading.TIMEOUT_MAX:
            return value
    raise argparse.ArgumentTypeError(f"not a number of seconds from 0 on: {given!r}")


def _demo(options: argparse.Namespace) -> int:
    from jobkit import demo

    return demo.run(options.directory, options.document)


def _migrate(options: argparse.Namespace) -> int:
    engine = load(options.app).engine if options.app else engine_of(options.url)
    logs.configure(options)
    before = migrations.current(engine, schema=options.schema)
    (migrations.downgrade if options.downgrade else migrations.upgrade)(engine, schema=options.schema)
    if not options.downgrade:
        _settle(engine.execution_options(schema_translate_map={None: options.schema}) if options.schema else engine)
    after = migrations.current(engine, schema=options.schema)
    change = ", nothing to do" if before == after else f" -> {after or 'no tables'}"
    print(f"{without_secrets(engine.url.render_as_string(hide_password=True))}: {before or 'no tables'}{change}")
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
    """Run jobs until SIGTERM, SIGINT or SIGHUP, then let running jobs end. A second signal puts them back into the
    queue. 0 when every job ended, ``PUT_BACK`` otherwise.
    """
    runner, speaker = load(options.app), Speaker()  # the app first: it may configure logging
    logs.configure(options, plain=False)
    # Whatever blocks does so on other threads: this one hears signals.
    with closing(Bell(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)) as bell:
        started = bell.background(partial(runner.start, wait=options.wait))
        signalled = False
        while not (signalled or started.done()):
            signalled = bell.wait()
        if not signalled:
            started.result()
            speaker.say(f"working for {options.app}; Ctrl-C stops")
            while not bell.wait(LOOK):
                if (failure := runner.failure) is not None:
                    runner.stop(0.0)
                    raise ConfigurationError(failure)
        drained = _stop(runner, options.drain, bell, speaker)
    speaker.say("stopped")
    speaker.close(LAST_LINE)
    return 0 if drained else PUT_BACK


def _stop(runner: Runner, drain: float, bell: Bell, speaker: Speaker) -> bool:
    """Whether every job ended. However that goes, the process ends in time."""
    last = _Last(drain + LAST)
    stopping = bell.background(partial(runner.stop, drain))
    speaker.say(f"stopping: jobs in flight have {drain:g} s; once more to put them back now")
    while not stopping.done():
        if bell.wait() and not stopping.done():
            last.end_within(LAST_AT_ONCE)
            bell.background(partial(runner.stop, 0.0))
    last.status = 0 if stopping.result() else PUT_BACK
    return last.status == 0


class _Last:
    """Ends the process when it is late, whatever holds it up: a database or a storage that does not answer, a receiver,
    what the host does at exit, standard output.
    """

    def __init__(self, seconds: float) -> None:
        self.status = PUT_BACK
        self._deadline, self._changed = time.monotonic() + seconds, threading.Condition()
        threading.Thread(target=self._wait, name="jobkit-last", daemon=True).start()

    def end_within(self, seconds: float) -> None:
        with self._changed:
            self._deadline = min(self._deadline, time.monotonic() + seconds)
            self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            while (left := self._deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
        os._exit(self.status)
