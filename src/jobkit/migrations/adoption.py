"""Adoption: turns a table that existed before jobkit into one of jobkit's, and gives it back."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from jobkit.errors import ConfigurationError, SchemaOutOfDate
from jobkit.migrations import spelling
from jobkit.migrations.examination import Found, uniques
from jobkit.migrations.transaction import pragma, refusal
from jobkit.tables import SQLITE_NOW

logger = logging.getLogger("jobkit")

# Foreign keys on these columns are dropped: they refer to tables and types of the host.
LOOSE = {"company_id", "created_by_agent_id", "source_task_id", "result_asset_id"}
# Values for columns that may be NULL in an adopted table and not in jobkit's.
_FILLED = {
    "input": "COALESCE(input, '{{}}')",
    "created_at": "COALESCE(created_at, started_at, finished_at, updated_at, {now})",
    "updated_at": "COALESCE(updated_at, finished_at, started_at, created_at, {now})",
}

Added = dict[str, list[str]]


def adopt(connection: sa.Connection, found: Found) -> Added:
    """Turn the table into jobkit's: types, foreign keys, missing columns, indexes. Every row and value stays.

    Returns what was added, for ``give_back``. ``SchemaOutOfDate`` when an object of the host prevents the change.
    """
    keys = sa.inspect(connection).get_foreign_keys(found.table.name, schema=found.table.schema)
    loose = [key for key in keys if LOOSE.intersection(key["constrained_columns"])]
    columns = [column.name for column in found.table.columns if column.name not in found.columns]
    logger.warning(
        "adopting table %s: foreign keys on company_id and created_by_agent_id are dropped (here: %s), both columns "
        "become text, byte_size bigint; added: %s",
        found.table.fullname,
        ", ".join(f"{', '.join(key['constrained_columns'])} -> {key['referred_table']}" for key in loose) or "none",
        ", ".join(columns) or "nothing",
    )
    with _refused(SchemaOutOfDate, f"table {found.table.fullname!r} cannot be adopted, nothing was changed"):
        if connection.dialect.name == "sqlite":
            _rebuild(connection, found)
        else:
            _alter(connection, found, loose)
        return {"columns": columns, "indexes": create_indexes(connection, found.table)}


def give_back(connection: sa.Connection, table: sa.Table, added: Added, storage: str | None) -> None:
    """Remove from an adopted table what ``adopt`` added. Its rows and changed types stay."""
    name = connection.dialect.identifier_preparer.format_table(table)
    with _refused(ConfigurationError, f"table {table.fullname!r} cannot be given back, nothing was changed"):
        for index in table.indexes:
            if index.name in added["indexes"]:
                index.drop(connection, checkfirst=True)
        for column in added["columns"]:
            quoted = connection.dialect.identifier_preparer.quote(column)
            connection.exec_driver_sql(f"ALTER TABLE {name} DROP COLUMN {quoted}")
        if storage is not None and connection.dialect.name == "postgresql":
            names = ", ".join(part.partition("=")[0].strip() for part in storage.split(","))
            connection.exec_driver_sql(f"ALTER TABLE {name} RESET ({names})")


def drop(connection: sa.Connection, table: sa.Table) -> None:
    """Drop a table of jobkit. ``ConfigurationError`` when a table of the host refers to it."""
    # PostgreSQL refuses by itself; SQLite does not, with foreign keys off.
    children = _children(connection, table.name) if connection.dialect.name == "sqlite" else set()
    if children:
        raise ConfigurationError(f"table {table.name!r} is referred to by {', '.join(sorted(children))}")
    table.drop(connection, checkfirst=True)


def create_indexes(connection: sa.Connection, table: sa.Table) -> list[str]:
    """Create the missing indexes of the table; their names."""
    present = {index["name"] for index in sa.inspect(connection).get_indexes(table.name, schema=table.schema)}
    absent = {str(index.name): index for index in table.indexes if index.name not in present}
    for name in sorted(absent):
        absent[name].create(connection)
    return sorted(absent)


def remember(connection: sa.Connection, version_table: str, schema: str | None, added: dict[str, Added]) -> None:
    """Store ``added`` for ``recall``: as the default of a column of the version table, which has no row yet."""
    name = connection.dialect.identifier_preparer.format_table(sa.table(version_table, schema=schema))
    connection.exec_driver_sql(f"ALTER TABLE {name} ADD COLUMN adopted TEXT DEFAULT '{json.dumps(added)}'")


def recall(connection: sa.Connection, version_table: str, schema: str | None) -> dict[str, Added]:
    """The adopted tables that ``remember`` stored, with what was added to each."""
    columns = {column["name"] for column in sa.inspect(connection).get_columns(version_table, schema=schema)}
    if "adopted" not in columns:
        return {}
    table = sa.table(version_table, schema=schema)
    note = connection.execute(sa.select(sa.column("adopted")).select_from(table)).scalar()
    result: dict[str, Added] = json.loads(note) if note else {}
    return result


@contextlib.contextmanager
def _refused(kind: type[ConfigurationError], what: str) -> Iterator[None]:
    """Raise the database's refusal of a change as ``kind``; errors about locks, rights or outages stay as they are."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        state, reason = refusal(error)
        if state[:2] in ("25", "40", "53", "55", "57", "58") or state == "42501" or "lock" in reason:
            raise
        raise kind(f"{what}: {reason}") from error


def _alter(connection: sa.Connection, found: Found, loose: list[Any]) -> None:
    """PostgreSQL: one ALTER TABLE, which rewrites the rows once. Defaults are converted with their columns."""
    table, quoted, dialect = found.table, connection.dialect.identifier_preparer, connection.dialect
    actions = [f"DROP CONSTRAINT {quoted.quote(key['name'])}" for key in loose]
    compiler: Any = dialect.ddl_compiler(dialect, None)  # type: ignore[arg-type]
    for column in table.columns:
        name = quoted.quote(column.name)
        present = found.columns.get(column.name)
        if present is None:
            actions.append(f"ADD COLUMN {sa.schema.CreateColumn(column).compile(dialect=dialect)}")
            continue
        wanted = column.type.compile(dialect=dialect)
        closes = present["nullable"] and not column.nullable
        if closes or found.declared[column.name] != wanted:
            value = _FILLED[column.name].format(now="now()") if closes else name
            actions.append(f"ALTER COLUMN {name} TYPE {wanted} USING ({value})::{wanted}")
        if closes:
            actions.append(f"ALTER COLUMN {name} SET NOT NULL")
        if column.server_default is not None and present["default"] is None:
            actions.append(f"ALTER COLUMN {name} SET DEFAULT {compiler.get_column_default_string(column)}")
    connection.exec_driver_sql(f"ALTER TABLE {quoted.format_table(table)} {', '.join(actions)}")


def _rebuild(connection: sa.Connection, found: Found) -> None:
    """SQLite: create a new table, copy the rows, drop the old one, recreate the host's indexes and triggers."""
    table = found.table
    master = sa.text(
        "SELECT sql FROM sqlite_master WHERE lower(tbl_name) = :name AND type IN ('index', 'trigger') "
        "AND sql IS NOT NULL ORDER BY rowid"
    )
    extras = connection.execute(master, {"name": table.name}).scalars().all()
    children = _children(connection, table.name)
    dangling = _dangling(connection, children)
    copy = _like(connection, found)
    copy.create(connection)
    shared = [column.name for column in table.columns if column.name in found.columns]
    filled = _FILLED if table.name == "content_jobs" else {}
    source = ", ".join(f"{filled.get(name, name).format(now=SQLITE_NOW)} AS {name}" for name in shared)
    target = ", ".join(spelling.copied(table, name, found.declared[name]) for name in shared)
    connection.exec_driver_sql(
        f'INSERT INTO {copy.name} ({", ".join(shared)}) SELECT {target} FROM (SELECT {source} FROM "{table.name}")'
    )
    # RENAME fails on a view of the dropped table unless it behaves as in old versions.
    with pragma(connection, "legacy_alter_table", 1):
        connection.exec_driver_sql(f'DROP TABLE "{table.name}"')
        connection.exec_driver_sql(f'ALTER TABLE {copy.name} RENAME TO "{table.name}"')
    for statement in extras:
        connection.exec_driver_sql(statement)
    if lost := sorted(_dangling(connection, children) - dangling):
        raise SchemaOutOfDate(
            f"table {table.name!r} cannot be adopted, nothing was changed: its ids are not spelled as 32 digits, and "
            f"{lost[0][0]} refers to them"
        )


def _like(connection: sa.Connection, found: Found) -> sa.Table:
    """jobkit's table under another name, with the host's defaults and constraints that jobkit's lacks."""
    table, inspector = found.table, sa.inspect(connection)
    copy = table.to_metadata(sa.MetaData(), name=f"jobkit_new_{table.name}")
    copy.indexes.clear()
    for column in copy.columns:
        default = found.columns.get(column.name, {}).get("default")
        if column.server_default is None and default is not None:
            escaped = default.replace(":", r"\:")
            column.server_default = sa.DefaultClause(sa.text(f"({escaped})"))
    for unique in inspector.get_unique_constraints(table.name):
        if tuple(unique["column_names"]) not in uniques(table):
            copy.append_constraint(sa.UniqueConstraint(*unique["column_names"], name=unique["name"]))
    for check in inspector.get_check_constraints(table.name):
        copy.append_constraint(sa.CheckConstraint(sa.text(check["sqltext"].replace(":", r"\:")), name=check["name"]))
    for key in inspector.get_foreign_keys(table.name):
        if LOOSE.intersection(key["constrained_columns"]):
            continue
        others: list[sa.Column[Any]] = [sa.Column(name) for name in key["referred_columns"]]
        sa.Table(key["referred_table"], copy.metadata, *others, extend_existing=True)
        referred = [f"{key['referred_table']}.{name}" for name in key["referred_columns"]]
        copy.append_constraint(
            sa.ForeignKeyConstraint(key["constrained_columns"], referred, name=key["name"], **key["options"])
        )
    return copy


def _children(connection: sa.Connection, name: str) -> set[str]:
    """SQLite: the tables with a foreign key to this one."""
    query = sa.text(
        "SELECT DISTINCT m.name FROM sqlite_master m, pragma_foreign_key_list(m.name) f "
        """WHERE m.type = 'table' AND lower(f."table") = :name"""
    )
    return set(connection.execute(query, {"name": name}).scalars())


def _dangling(connection: sa.Connection, children: set[str]) -> set[tuple[str, int]]:
    """SQLite: the rows of these tables whose foreign keys refer to no row."""
    return {
        (child, row[1])
        for child in children
        for row in connection.exec_driver_sql(f'PRAGMA foreign_key_check("{child}")')
    }
