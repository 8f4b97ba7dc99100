"""What a host lends: an engine for jobkit's threads, a session or connection whose transaction jobkit writes in."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from jobkit.base.ids import ANY_COMPANY, CompanyId, CompanyScope, company_text
from jobkit.base.text import is_storable
from jobkit.db.connections import ENOUGH, pool_limit
from jobkit.db.failures import sqlstate
from jobkit.db.sqlite import require_configured
from jobkit.errors import ConfigurationError, SchemaOutOfDate
from jobkit.tables import assets, content_jobs, metadata

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, scoped_session


# The connections without which a started runner does nothing.
LEAST = 2
AUTOCOMMIT = (
    "this connection is in AUTOCOMMIT: jobkit needs a transaction that is committed or rolled back as one; use a "
    'connection without isolation_level="AUTOCOMMIT"'
)
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
    level = engine.get_execution_options().get("isolation_level") or getattr(
        engine.dialect, "_on_connect_isolation_level", None
    )
    if level == "AUTOCOMMIT" and engine.dialect.name != "sqlite":
        raise ConfigurationError(AUTOCOMMIT)
    return engine


def require_pool(engine: sa.Engine) -> None:
    """``ConfigurationError`` for a pool of one connection: a feed keeps it, and a runner would wait for ever."""
    if pool_limit(engine) < LEAST:
        raise ConfigurationError(
            f"a started runner needs at least {LEAST} connections of its engine's pool, and uses up to {ENOUGH}; this "
            "pool gives out 1: raise pool_size or max_overflow in create_engine"
        )


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


def connection_of(session: Host, clause: sa.ClauseElement = content_jobs) -> sa.Connection:
    """The connection of the host's transaction: ``session`` itself, or that of a Session or scoped_session, which may
    have several, and is asked for the one of ``clause``. ``TypeError`` for anything else, and for what is asynchronous.
    """
    if isinstance(session, sa.Connection):
        return session
    if hasattr(session, "sync_connection") or iscoroutinefunction(getattr(session, "connection", None)):
        raise TypeError("an asynchronous session: await session.run_sync(lambda s: JobStore(s).create(...))")
    if not hasattr(session, "connection"):
        raise TypeError(f"expected a Session, scoped_session or Connection, not {type(session).__name__}")
    return session.connection(bind_arguments={"clause": clause})


def writable(session: Host) -> sa.Connection:
    """As ``connection_of``, when the host commits or rolls back what is written on it; ``ConfigurationError`` in
    AUTOCOMMIT, and for SQLite without ``configure_sqlite``.
    """
    # An UPDATE, because sessions that route, as SQLAlchemy's documentation shows, know it as a write.
    connection = connection_of(session, content_jobs.update())
    require_transactions(connection)
    return connection


def require_transactions(connection: sa.Connection) -> None:
    """``ConfigurationError`` unless what is written on ``connection`` is committed or rolled back as one."""
    require_configured(connection)
    # Drivers without this attribute do not commit by themselves.
    if connection.dialect.name != "sqlite" and getattr(connection.connection, "autocommit", False) is True:
        raise ConfigurationError(AUTOCOMMIT)


def may_notify(connection: sa.Connection) -> bool:
    """Whether the open transaction may send notifications: PostgreSQL refuses to PREPARE one that does."""
    return not isinstance(connection.get_transaction(), sa.TwoPhaseTransaction)


def has_asset_id(connection: sa.Connection, asset_id: UUID) -> sa.ColumnElement[bool]:
    """The condition for the row of this asset."""
    if connection.dialect.name != "sqlite":
        return assets.c.id == asset_id
    # An adopted table may have ids with dashes, and rows of the host refer to them.
    return sa.type_coerce(assets.c.id, sa.Text).in_([asset_id.hex, str(asset_id)])


def page_size(limit: int | None) -> int | None:
    """``limit`` as the database takes it: None, or a number of rows from 0 on; ``ValueError`` for anything else."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit must be a count, not {limit!r}")
    return min(limit, (1 << 63) - 1)


def of_company(column: sa.Column[str], company_id: CompanyId) -> sa.ColumnElement[bool]:
    """The condition for this company's rows; ``ValueError`` or ``TypeError`` for what names no company."""
    owner = company_text(company_id)
    return column == owner if is_storable(owner) else sa.false()


def in_scope(column: sa.Column[str], company_id: CompanyScope) -> sa.ColumnElement[bool]:
    """As ``of_company``; true of every row for ``ANY_COMPANY``."""
    return sa.true() if company_id is ANY_COMPANY else of_company(column, company_id)


# PostgreSQL's undefined_table, undefined_column and invalid_schema_name.
_ABSENT = ("42P01", "42703", "3F000")


def require_schema(engine: sa.Engine) -> None:
    """Return when every table has every column; else ``SchemaOutOfDate`` with the first that is missing and the call
    that adds it. Reads no row. ``ConfigurationError`` as ``require_transactions``.
    """
    with engine.connect() as connection:
        require_transactions(connection)
        for table in metadata.sorted_tables:
            try:
                connection.execute(sa.select(table).limit(0))
            except (sa.exc.ProgrammingError, sa.exc.OperationalError) as error:
                reason = str(error.orig).splitlines()[0]
                if sqlstate(error) not in _ABSENT and not reason.startswith("no such"):
                    raise
                raise SchemaOutOfDate(
                    f"{reason}: call jobkit.migrations.upgrade(engine), or run jobkit migrate"
                ) from None
