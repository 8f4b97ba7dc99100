"""The command line. The only reader of its environment; a module a noun, each adding its own commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import sqlalchemy as sa

from jobkit.cli import assets, jobs, render, running
from jobkit.cli.app import URL_VARIABLE
from jobkit.errors import JobkitError

__all__ = ["URL_VARIABLE", "main"]


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
    for module in (running, jobs, assets, render):
        module.add(commands)
    return parser
