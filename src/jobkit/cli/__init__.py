"""The command line. Each module adds its commands; ``app`` alone reads the environment."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import sqlalchemy as sa

from jobkit.cli import assets, jobs, prune, render, running
from jobkit.cli.app import URL_VARIABLE
from jobkit.cli.output import complain
from jobkit.errors import JobkitError

__all__ = ["URL_VARIABLE", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 when the work failed, 2 when it could not start, 75 when a
    worker left jobs to others.
    """
    parser = argparse.ArgumentParser(prog="jobkit", description="Content jobs for Python web apps.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (running, jobs, prune, assets, render):
        module.add(commands)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without a letter is no failure
    try:
        status: int = options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as ``head``, has closed the pipe: Python must not fail to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (JobkitError, sa.exc.SQLAlchemyError, OSError) as error:
        complain(error)
        return 2
    return status
