"""What a host lends: an engine for jobkit's threads, a session or connection whose transaction jobkit writes in."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import TYPE_CHECKING

import sqlalchemy as sa

from jobkit.base.text import company_id_or_none
from jobkit.db.sqlite import require_configured
from jobkit.errors import ConfigurationError, SchemaOutOfDate
from jobkit.tables import content_jobs, metadata

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session


NEEDED = "a Runner, Relay or AssetStore needs a synchronous Engine, not"


def sync_engine(engine: object) -> sa.Engine:
    """``engine`` when jobkit's threads can use it; else ``ConfigurationError``, which says what to use."""
    if hasattr(engine, "sync_engine") or (isinstance(engine, sa.Engine) and engine.dialect.is_async):
        raise ConfigurationError(
            f"{NEEDED} AsyncEngine: make one with create_engine(), on the same URL; postgresql+psycopg:// serves both "
            "kinds"
        )
    if not isinstance(engine, sa.Engine):
        raise ConfigurationError(f"{NEEDED} {type(engine).__name__}")
    require_configured(engine)
    return engine


def leave_connections(engine: sa.Engine) -> None:
    """In a forked child: leave the pooled connections to the parent, neither used nor closed. Both processes would read
    each other's answers.
    """
    engine.dispose(close=False)


def refuse_inherited(engine: sa.Engine, used: bool) -> None:
    """``ConfigurationError`` in a forked child whose parent ``used`` this SQLite database on other threads.

    Locks that they held at the fork stay held in the child's memory: see "Carrying an open database connection across a
    fork()" in SQLite's How To Corrupt An SQLite Database File.
    """
    if used and engine.dialect.name == "sqlite":
        raise ConfigurationError(
            "this process was forked while its parent's runner or relay used the same SQLite database, which SQLite "
            "forbids: fork first and call start() in each process, or spawn instead of forking"
        )


if TYPE_CHECKING:
    Host = Session | scoped_session[Session] | sa.Connection


def connection_of(session: Host) -> sa.Connection:
    """The connection of the host's transaction: ``session`` itself, or that of a Session or scoped_session.
    ``TypeError`` for anything else, and for what is asynchronous.
    """
    if isinstance(session, sa.Connection):
        return session
    if hasattr(session, "sync_connection") or iscoroutinefunction(getattr(session, "connection", None)):
        raise TypeError("an asynchronous session: await session.run_sync(lambda s: JobStore(s).create(...))")
    if not hasattr(session, "connection"):
        raise TypeError(f"expected a Session, scoped_session or Connection, not {type(session).__name__}")
    return session.connection(bind_arguments={"clause": content_jobs})


def writable(session: Host) -> sa.Connection:
    """As ``connection_of``, when the host commits or rolls back what is written on it; ``ConfigurationError`` in
    AUTOCOMMIT, and for SQLite without ``configure_sqlite``.
    """
    connection = connection_of(session)
    require_configured(connection)
    # Drivers without this attribute do not commit by themselves.
    if connection.dialect.name != "sqlite" and getattr(connection.connection, "autocommit", False) is True:
        raise ConfigurationError(
            "this connection is in AUTOCOMMIT: jobkit needs a transaction that the host commits or rolls back; "
            'use a connection without isolation_level="AUTOCOMMIT"'
        )
    return connection


def page_size(limit: int | None) -> int | None:
    """``limit`` as the database takes it: None, or a number of rows from 0 on; ``ValueError`` for anything else."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit must be a count, not {limit!r}")
    return min(limit, (1 << 63) - 1)


def of_company(column: sa.Column[str], company_id: object) -> sa.ColumnElement[bool]:
    """The condition for this company's rows; false for a value that cannot be a company."""
    owner = company_id_or_none(company_id)
    return sa.false() if owner is None else column == owner


# PostgreSQL's undefined_table, undefined_column and invalid_schema_name.
_ABSENT = ("42P01", "42703", "3F000")


def require_schema(engine: sa.Engine) -> None:
    """Return when every table has every column; else ``SchemaOutOfDate`` with the first that is missing and the call
    that adds it. Reads no row. ``ConfigurationError`` as ``require_configured``.
    """
    with engine.connect() as connection:
        require_configured(connection)
        for table in metadata.sorted_tables:
            try:
                connection.execute(sa.select(table).limit(0))
            except (sa.exc.ProgrammingError, sa.exc.OperationalError) as error:
                reason = str(error.orig).splitlines()[0]
                state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
                if state not in _ABSENT and not reason.startswith("no such"):
                    raise
                raise SchemaOutOfDate(
                    f"{reason}: call jobkit.migrations.upgrade(engine), or run jobkit migrate"
                ) from None
