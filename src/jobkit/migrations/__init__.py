"""Migrations of jobkit's tables in the host's database, with a version table of their own.

    jobkit.migrations.upgrade(engine)

A host that uses Alembic may call it in a revision: ``jobkit.migrations.upgrade(op.get_bind())``. Autogenerate proposes
to drop tables it does not know; this line of ``env.py`` makes it ignore jobkit's::

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
from jobkit.migrations.transaction import exclusive, refusal, supported
from jobkit.tables import metadata

VERSION_TABLE = "jobkit_alembic_version"

logger = logging.getLogger("jobkit")


def upgrade(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> None:
    """Create jobkit's tables or migrate them to this version. Safe to repeat and to call from several processes.

    With an Engine, in a transaction of its own; with a Connection, in its transaction, which the caller commits, or
    else in one of its own. When this raises, nothing has changed. ``schema`` (PostgreSQL) is created when missing; the
    default is the one that a ``schema_translate_map`` of ``bind`` gives tables without a schema.

    Existing tables of the same names are examined first. The product that jobkit descends from had ``assets`` and
    ``content_jobs`` tables: such a table is adopted, with every row and value. **Foreign keys on its
    ``company_id`` and ``created_by_agent_id`` are dropped, both columns become text, ``byte_size`` becomes bigint**,
    and the log says so. On SQLite times and UUIDs are spelled as jobkit spells them: an asset's id stays as it is, a
    company's id reads as ``str(uuid)`` where its column is declared as a UUID or CHAR(32). Foreign keys of other
    tables to an adopted one, its other constraints, its triggers, views and indexes stay.

    Any other table raises ``SchemaOutOfDate``, naming the differences; so does a table that an object of the host, such
    as a PostgreSQL view, keeps from being changed. ``ConfigurationError`` when the database is read-only or the user
    lacks the rights. ``sqlalchemy.exc.OperationalError`` when a PostgreSQL table stays locked for 10 seconds: call
    again.
    """
    _migrate(bind, schema, "head", up=True)


def downgrade(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> None:
    """Drop everything ``upgrade`` created, except a schema. **Jobs and asset rows are lost with their tables.** Adopted
    tables stay, with their rows and changed types.

    ``ConfigurationError`` when the host's schema refers to a table or column to be dropped. Stored objects stay.
    """
    _migrate(bind, schema, "base", up=False)


def current(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> str | None:
    """The revision of the database, None without jobkit's tables."""
    supported(bind)
    with bind.connect() if isinstance(bind, sa.Engine) else contextlib.nullcontext(bind) as connection:
        revision: str | None = _context(connection, _schema(connection, schema)).get_current_revision()
        return revision


def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
    """For ``context.configure(include_name=...)`` in a host's ``env.py``: everything but jobkit's own tables.

    A host with a model of an adopted table must remove it from its metadata, or autogenerate proposes to create that
    table. With jobkit in a schema of its own, this is only needed with ``include_schemas=True``.
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
        # Not EnvironmentContext.run_migrations, which replaces alembic's global ``op``: the caller may be a host's
        # migration, or use ``op`` in another thread.
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
            # SQLAlchemy warns that it does not reflect the host's indexes on expressions.
            warnings.filterwarnings("ignore", "Skipped unsupported reflection", sa.exc.SAWarning)
            for step in steps:
                logger.info("%s", step)
                step.migration_fn(connection, schema)
                maintainer.update_to_step(step)
        if not up:
            context._version.drop(connection)


def _context(connection: sa.Connection, schema: str | None) -> Any:
    from alembic.runtime.migration import MigrationContext

    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "version_table_schema": schema})


def _schema(connection: sa.Connection, schema: str | None) -> str | None:
    if schema is None:
        translated: dict[str | None, str | None] = connection.get_execution_options().get("schema_translate_map") or {}
        schema = translated.get(None)
    if schema is not None and connection.dialect.name == "sqlite":
        raise ConfigurationError(f"SQLite has no schemas: there is no {schema!r} to keep the tables in")
    return schema


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn the database's refusal of a change into ``ConfigurationError``."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        state, reason = refusal(error)
        if state in ("42501", "25006") or "readonly database" in reason:
            hint = "Migrate as a user who may create and alter jobkit's tables"
            raise ConfigurationError(f"the database refuses to change the schema: {reason}. {hint}") from error
        if state == "2BP01":
            what = "an object of the host depends on a table or column to be dropped"
            raise ConfigurationError(f"{what}: {reason}") from error
        raise
