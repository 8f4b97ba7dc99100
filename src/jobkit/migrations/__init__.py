"""jobkit's tables in the host's database: their own history, in their own version table, beside the host's.

    jobkit.migrations.upgrade(engine)

A host that uses Alembic may call it in a revision, ``jobkit.migrations.upgrade(op.get_bind())``. Its autogenerate
would propose to drop every table it does not know; one line of ``env.py`` keeps it off jobkit's::

    context.configure(..., include_name=jobkit.migrations.include_name)
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from jobkit.errors import ConfigurationError, SchemaOutOfDate
from jobkit.migrations.transaction import exclusive, supported
from jobkit.tables import metadata

VERSION_TABLE = "jobkit_alembic_version"

logger = logging.getLogger("jobkit")


def upgrade(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> None:
    """Bring the database to this version of jobkit. Safe to call from several processes at once, and again.

    An Engine: one transaction of its own. A Connection: its transaction, which the caller commits, or one of its own.
    Whatever this raises, nothing of it stays. ``schema`` (PostgreSQL) is created when it is not there; without it,
    the one that a ``schema_translate_map`` of ``bind`` names for tables without a schema.

    Tables of the same name that jobkit did not make are looked at first. The product jobkit descends from had
    ``assets`` and ``content_jobs`` tables: such a table is adopted, with every row and value. **Foreign keys on its
    ``company_id`` and ``created_by_agent_id`` are dropped, both columns become text, ``byte_size`` becomes bigint**,
    and the log says so. On SQLite times and UUIDs are spelled as jobkit spells them: an asset's id stays as it is, a
    company's id reads as ``str(uuid)`` where its column is declared as a UUID or CHAR(32). Foreign keys of other
    tables to an adopted one, its other constraints, its triggers, views and indexes stay.

    Anything else is ``SchemaOutOfDate``, naming what differs, with nothing changed; so is a table that something of
    the host's, a view on PostgreSQL for instance, keeps from being changed. ``ConfigurationError`` when the database
    is read-only or the user may not change it. On PostgreSQL a table that stays locked for 10 seconds is
    ``sqlalchemy.exc.OperationalError``: call again.
    """
    _migrate(bind, schema, "head", up=True)


def downgrade(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> None:
    """Remove everything ``upgrade`` made, except a schema. **Jobs and assets go with their tables.** An adopted table
    stays, with its rows and its changed types.

    ``ConfigurationError`` when something of the host's refers to a table or column that would go. Objects in storage
    are not touched.
    """
    _migrate(bind, schema, "base", up=False)


def current(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> str | None:
    """The revision the database is at, None without jobkit's tables."""
    supported(bind)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(bind.connect()) if isinstance(bind, sa.Engine) else bind
        revision: str | None = _context(connection, _schema(connection, schema)).get_current_revision()
        return revision


def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
    """For ``context.configure(include_name=...)`` in a host's ``env.py``: everything but jobkit's own tables.

    A host that had a model of an adopted table takes it out of its own metadata, or autogenerate proposes to create
    that table. With jobkit in a schema of its own this is needed only beside ``include_schemas=True``.
    """
    return not (type_ == "table" and name is not None and (name in metadata.tables or name == VERSION_TABLE))


def _migrate(bind: sa.Engine | sa.Connection, schema: str | None, target: str, *, up: bool) -> None:
    from alembic.runtime.migration import HeadMaintainer
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError

    supported(bind)
    script = ScriptDirectory(str(Path(__file__).parent))
    with _explained(), exclusive(bind) as connection:
        schema = _schema(connection, schema)
        if schema is not None and not sa.inspect(connection).has_schema(schema):
            connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
        # Not EnvironmentContext.run_migrations: it takes alembic's global `op` away from a host's migration that calls
        # this, and from other threads.
        context = _context(connection, schema)
        heads = context.get_current_heads()
        if not heads:
            context._ensure_version_table()
        maintainer = HeadMaintainer(context, heads)
        try:
            steps: Any = script._upgrade_revs(target, heads) if up else script._downgrade_revs(target, heads)
        except CommandError as error:
            raise SchemaOutOfDate(f"this database was migrated by another version of jobkit: {error}") from error
        with warnings.catch_warnings():
            # The host's own indexes on expressions, which SQLAlchemy says it skips.
            warnings.filterwarnings("ignore", "Skipped unsupported reflection", sa.exc.SAWarning)
            for step in steps:
                logger.info("%s", step)
                step.migration_fn(connection, schema)
                maintainer.update_to_step(step)
        if not up:
            context._version.drop(connection)


def _context(connection: sa.Connection, schema: str | None) -> Any:
    from alembic.runtime.migration import MigrationContext

    options = {"version_table": VERSION_TABLE, "version_table_schema": schema}
    return MigrationContext.configure(connection, opts=options)


def _schema(connection: sa.Connection, schema: str | None) -> str | None:
    if schema is None:
        translated: dict[str | None, str | None] = connection.get_execution_options().get("schema_translate_map") or {}
        schema = translated.get(None)
    if schema is not None and connection.dialect.name == "sqlite":
        raise ConfigurationError(f"SQLite has no schemas: there is no {schema!r} to keep the tables in")
    return schema


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What a database says that refuses a change, as ``ConfigurationError``."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        reason = str(error.orig).strip().replace("\n", "; ")
        state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        if state in ("42501", "25006") or "readonly database" in reason:
            raise ConfigurationError(
                f"the database lets nothing be changed here: {reason}. Migrate as a user who may create and alter "
                "jobkit's tables"
            ) from error
        if state == "2BP01":
            raise ConfigurationError(f"something of the host's depends on what would go: {reason}") from error
        raise
