"""What several commands take: the Runner or the database to work on, and durations."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa

from jobkit.base.ids import ANY_COMPANY, company_text
from jobkit.base.text import error_message
from jobkit.cli import logs
from jobkit.db.host import require_schema
from jobkit.db.sqlite import configure_sqlite, is_memory
from jobkit.errors import ConfigurationError
from jobkit.runner.runner import Runner

URL_VARIABLE = "JOBKIT_DATABASE_URL"
PACKAGE = str(Path(__file__).parent.parent)
_NAMES = {"d": "days", "h": "hours"}
_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1), "s": timedelta(seconds=1)}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([dhms]?)", re.ASCII)


def add_app(parser: argparse.ArgumentParser, whose: str) -> None:
    """Add ``--app``, required, with ``whose`` as its help."""
    parser.add_argument("--app", required=True, metavar="MODULE:RUNNER", help=whose)
    logs.add(parser)


def add_source(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    """Add ``--app``, ``--schema`` and the database's URL: ``--database``, or an argument without a name."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--app", metavar="MODULE:RUNNER", help="the database of this Runner")
    what = f"SQLAlchemy URL (default: ${URL_VARIABLE})"
    if positional:
        where.add_argument("url", nargs="?", default=os.environ.get(URL_VARIABLE), help=what)
    else:
        where.add_argument("--database", metavar="URL", help=what)
    parser.add_argument("--schema", help="the PostgreSQL schema of the tables")
    logs.add(parser)


def add_company(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--company``; without it, ``ANY_COMPANY``. ``what`` is limited to it."""
    parser.add_argument(
        "--company", type=_company, default=ANY_COMPANY, metavar="ID", help=f"only {what} of this company"
    )


def _company(given: str) -> str:
    try:
        return company_text(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def duration(unit: str) -> Callable[[str], timedelta]:
    """A type for ``add_argument``: ``30d``, ``12h``, ``90m``, ``10s``, or a number in ``unit``."""

    def parse(given: str) -> timedelta:
        with suppress(OverflowError):
            if (found := _DURATION.fullmatch(given)) is not None:
                return float(found[1]) * _UNITS[found[2] or unit]
        raise argparse.ArgumentTypeError(f"neither a number of {_NAMES[unit]} nor such as 30d or 12h: {given!r}")

    return parse


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[sa.Engine, Runner | None]]:
    """The database that ``options`` name, its schema checked, and the Runner of ``--app``. Creates no SQLite file."""
    runner = load(options.app) if options.app else None
    logs.configure(options)
    engine = _existing(options.database or os.environ.get(URL_VARIABLE)) if runner is None else runner.engine
    if options.schema is not None:
        engine = engine.execution_options(schema_translate_map={None: options.schema})
    with migrated(engine):
        yield engine, runner


@contextmanager
def migrated(engine: sa.Engine) -> Iterator[None]:
    """Check the schema of the database. The engine's connections are closed at the end."""
    try:
        require_schema(engine)
        yield
    finally:
        engine.dispose()


def _existing(url: str | None) -> sa.Engine:
    engine = engine_of(url, option="--database")
    if engine.dialect.name == "sqlite":
        if not is_memory(engine) and not Path(engine.url.database or "").exists():
            raise ConfigurationError(f"there is no file {engine.url.database}")
        configure_sqlite(engine)
    return engine


def engine_of(url: str | None, *, option: str = "its URL") -> sa.Engine:
    if url is None:
        raise ConfigurationError(f"which database? Give {option}, --app, or ${URL_VARIABLE}")
    try:
        return sa.create_engine(url)
    except ImportError as error:
        raise ConfigurationError(f"{error}: install the driver, for PostgreSQL with jobkit[postgresql]") from error
    except ValueError as error:  # such as a port that is not a number
        raise ConfigurationError("not a SQLAlchemy URL, such as postgresql+psycopg://user@host/name") from error


def load(name: str) -> Runner:
    """The Runner that ``module:attribute`` names, or that a function of this name returns."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ConfigurationError(f"--app takes MODULE:RUNNER, such as myapp.jobs:runner, not {name!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise broken(f"{module_name} cannot be imported", error) from error
        raise ConfigurationError(f"no module {error.name!r} here or on the path") from error
    except Exception as error:
        raise broken(f"{module_name} cannot be imported", error) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{module_name} has no {path!r}")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, Runner):
        try:
            found = found()
        except Exception as error:
            raise broken(f"{name} cannot be called", error) from error
    if not isinstance(found, Runner):
        raise ConfigurationError(f"{name} is a {type(found).__name__}, not a jobkit.Runner")
    return found


def broken(what: str, error: Exception) -> ConfigurationError:
    """An error of the host's code in one line: ``what`` failed, the file and line in that code, the error."""
    libraries = ("<", PACKAGE, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    own = [at for at in traceback.extract_tb(error.__traceback__) if not at.filename.startswith(libraries)]
    place, message = (f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""), error_message(error)
    if isinstance(error, SyntaxError):
        place, message = f"{error.filename}, line {error.lineno}: ", error.msg
    return ConfigurationError(f"{what}: {place}{type(error).__name__}: {' '.join(message.split())}")
