"""jobkit's tables in the host's database: their own history, in their own version table, beside the host's.

    jobkit.migrations.upgrade(engine)

In a host that uses Alembic, one line of ``env.py`` keeps its autogenerate from proposing to drop these tables::

    context.configure(..., include_name=jobkit.migrations.include_name)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from jobkit.errors import ConfigurationError, SchemaOutOfDate
from jobkit.tables import metadata

if TYPE_CHECKING:
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

VERSION_TABLE = "jobkit_alembic_version"

# Any number will do, as long as every version of jobkit takes the same: the first 8 bytes of SHA-256("jobkit"), as a
# signed integer.
_LOCK = -5676339625223235709
# DDL that waits for a lock makes every later query on the table wait behind it, so it gives up rather soon.
_LOCK_TIMEOUT = "10s"


def upgrade(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> None:
    """Bring the database to this version of jobkit. Safe to call from several processes at once, and again.

    An Engine: one transaction of its own. A Connection: its transaction, which the caller commits, or one of its own.

    Tables of the same name that jobkit did not make are looked at first. The product jobkit descends from had
    ``assets`` and ``content_jobs`` tables: such a table is adopted, with every row and value. **Foreign keys on its
    ``company_id`` and ``created_by_agent_id`` are dropped, both columns become text, ``byte_size`` becomes bigint**,
    and the log says so. Anything else is ``SchemaOutOfDate``, naming what differs, with nothing changed.
    """
    _migrate(bind, schema, "head", up=True)


def downgrade(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> None:
    """Remove everything ``upgrade`` made. **Jobs and assets go with their tables.** An adopted table keeps its rows and
    stays.

    Objects in storage are not touched.
    """
    _migrate(bind, schema, "base", up=False)


def current(bind: sa.Engine | sa.Connection, *, schema: str | None = None) -> str | None:
    """The revision the database is at, None without jobkit's tables."""
    from alembic.runtime.migration import MigrationContext

    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(bind.connect()) if isinstance(bind, sa.Engine) else bind
        options = {"version_table": VERSION_TABLE, "version_table_schema": schema}
        return MigrationContext.configure(connection, opts=options).get_current_revision()


def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
    """For ``context.configure(include_name=...)`` in a host's ``env.py``: everything but jobkit's own tables."""
    return not (type_ == "table" and name is not None and (name in metadata.tables or name == VERSION_TABLE))


def _migrate(bind: sa.Engine | sa.Connection, schema: str | None, target: str, *, up: bool) -> None:
    from alembic.util.exc import CommandError

    with _transaction(bind, schema) as connection:
        script = _script()
        steps = script._upgrade_revs if up else script._downgrade_revs
        try:
            with _environment(script, lambda revision, _context: steps(target, revision)) as environment:
                environment.configure(
                    connection=connection,
                    version_table=VERSION_TABLE,
                    version_table_schema=schema,
                    transactional_ddl=True,
                )
                environment.run_migrations()
        except CommandError as error:
            raise SchemaOutOfDate(f"this database was migrated by another version of jobkit: {error}") from error


def _script() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(__file__).parent))


def _environment(script: ScriptDirectory, steps: Callable[[Any, Any], Any]) -> EnvironmentContext:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext

    return EnvironmentContext(Config(), script, fn=steps)


@contextlib.contextmanager
def _transaction(bind: sa.Engine | sa.Connection, schema: str | None) -> Iterator[sa.Connection]:
    """A connection in a transaction that no other migration shares."""
    if isinstance(bind, sa.Engine):
        with bind.connect() as connection, _transaction(connection, schema):
            yield connection
        return
    if not isinstance(bind, sa.Connection):
        raise ConfigurationError(
            f"migrations need an Engine or Connection, not {type(bind).__name__}; "
            "with an async engine: await connection.run_sync(jobkit.migrations.upgrade)"
        )
    lock = {"sqlite": _lock_sqlite, "postgresql": _lock_postgresql}.get(bind.dialect.name)
    if lock is None:
        raise ConfigurationError(f"jobkit works on SQLite and PostgreSQL, not on {bind.dialect.name}")
    with lock(bind, schema):
        yield bind


@contextlib.contextmanager
def _lock_sqlite(connection: sa.Connection, schema: str | None) -> Iterator[None]:
    if connection.in_transaction():
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        return
    # Rebuilding a table that others refer to would fire their ON DELETE. The pragma is ignored within a transaction.
    enforced = _foreign_keys(connection, "")
    _foreign_keys(connection, "= OFF")
    try:
        with connection.begin():
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield
    finally:
        if enforced:
            _foreign_keys(connection, "= ON")


def _foreign_keys(connection: sa.Connection, change: str) -> Any:
    cursor = connection.connection.cursor()
    try:
        cursor.execute(f"PRAGMA foreign_keys {change}")
        row = cursor.fetchone()
        return row and row[0]
    finally:
        cursor.close()


@contextlib.contextmanager
def _lock_postgresql(connection: sa.Connection, schema: str | None) -> Iterator[None]:
    with contextlib.nullcontext() if connection.in_transaction() else connection.begin():
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        before = connection.execute(sa.text("SHOW lock_timeout")).scalar_one()
        _set_lock_timeout(connection, _LOCK_TIMEOUT)
        if schema is not None and not sa.inspect(connection).has_schema(schema):
            connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
        yield
        _set_lock_timeout(connection, before)


def _set_lock_timeout(connection: sa.Connection, value: str) -> None:
    connection.execute(sa.text("SELECT set_config('lock_timeout', :value, true)"), {"value": value})
