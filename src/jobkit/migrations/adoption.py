"""Tables that were there before jobkit: recognised and adopted, or refused before anything is changed."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jobkit.errors import ConfigurationError, SchemaOutOfDate

logger = logging.getLogger("jobkit")

# The columns of the tables jobkit descends from, by kind; "?" marks one that may be NULL, "*" one that may be missing.
SEED: dict[str, dict[str, str]] = {
    "assets": {
        "id": "uuid",
        "company_id": "uuid|text",
        "provider": "text",
        "object_key": "text",
        "content_type": "text",
        "byte_size": "integer",
        "sha256": "text",
        "original_filename": "text?",
        "created_by_agent_id": "uuid|text?",
        "created_by_user_id": "text?",
        "source_task_id": "text?*",
        "created_at": "time",
        "updated_at": "time",
    },
    "content_jobs": {
        "id": "uuid",
        "company_id": "uuid|text",
        "job_type": "text",
        "status": "text",
        "input": "json?",
        "result_asset_id": "uuid?",
        "error_message": "text?",
        "source_task_id": "text?",
        "started_at": "time?",
        "finished_at": "time?",
        "created_at": "time?",
        "updated_at": "time?",
    },
}
# Foreign keys on these are dropped: their tables, and their types, are the host's.
LOOSE = {"company_id", "created_by_agent_id", "source_task_id", "result_asset_id"}


@dataclass(frozen=True, slots=True)
class Found:
    """A table that is there already: ours, or one to adopt."""

    table: sa.Table
    columns: dict[str, Any]
    ours: bool

    @property
    def missing(self) -> list[sa.Column[Any]]:
        """Our columns that it does not have yet."""
        return [column for column in self.table.columns if column.name not in self.columns]


def examine(connection: sa.Connection, table: sa.Table) -> Found | None:
    """What is there under this table's name, or None; ``SchemaOutOfDate`` when it is neither ours nor one to adopt."""
    inspector = sa.inspect(connection)
    if not inspector.has_table(table.name, schema=table.schema):
        return None
    columns = {column["name"]: column for column in inspector.get_columns(table.name, schema=table.schema)}
    ours = _differences(connection, columns, {c.name: _described(c) for c in table.columns})
    if not ours:
        return Found(table, columns, ours=True)
    seed = SEED.get(table.name)
    differences = ours if seed is None else _differences(connection, columns, seed)
    if differences:
        raise SchemaOutOfDate(
            f"table {table.fullname!r} exists and is not jobkit's: {'; '.join(differences)}. Nothing was changed; "
            "rename that table, or give jobkit a schema of its own with schema="
        )
    _refuse_duplicates(connection, table)
    if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
        raise ConfigurationError(
            f"adopting table {table.name!r} rebuilds it, which foreign keys must not notice: call upgrade with "
            "the Engine, or with a Connection that has no open transaction"
        )
    return Found(table, columns, ours=False)


def adopt(connection: sa.Connection, found: Found) -> None:
    """Turn the table into ours: types, foreign keys, missing columns. Every row and value stays."""
    logger.warning(
        "adopting table %s: foreign keys on company_id and created_by_agent_id are dropped, both become text, "
        "byte_size bigint; added: %s",
        found.table.fullname,
        ", ".join(column.name for column in found.missing) or "nothing",
    )
    if connection.dialect.name == "sqlite":
        _rebuild(connection, found)
    else:
        _alter(connection, found)


def create_indexes(connection: sa.Connection, table: sa.Table) -> None:
    """Create those of the table's indexes that are not there."""
    present = {index["name"] for index in sa.inspect(connection).get_indexes(table.name, schema=table.schema)}
    for index in sorted(table.indexes, key=lambda index: str(index.name)):
        if index.name not in present:
            index.create(connection)


def remember(connection: sa.Connection, version_table: str, schema: str | None, adopted: list[Found]) -> None:
    """Note what was adopted, for ``downgrade``, as the default of a column of the version table, whose row is yet to
    come.
    """
    note = json.dumps({found.table.name: [column.name for column in found.missing] for found in adopted})
    quoted = connection.dialect.identifier_preparer
    name = quoted.format_table(sa.table(version_table, schema=schema))
    connection.exec_driver_sql(f"ALTER TABLE {name} ADD COLUMN adopted TEXT DEFAULT '{note}'")


def recall(connection: sa.Connection, version_table: str, schema: str | None) -> dict[str, list[str]]:
    """What ``remember`` noted: the adopted tables with the columns that were added."""
    columns = {column["name"] for column in sa.inspect(connection).get_columns(version_table, schema=schema)}
    if "adopted" not in columns:
        return {}
    table = sa.table(version_table, sa.column("adopted"), schema=schema)
    note = connection.execute(sa.select(table.c.adopted)).scalar()
    result: dict[str, list[str]] = json.loads(note) if note else {}
    return result


def _described(column: sa.Column[Any]) -> str:
    kind = {"Uuid": "uuid", "Text": "text", "BigInteger": "integer", "Integer": "integer", "Float": "float"}
    kind |= {"UtcDateTime": "time", "JsonObject": "json"}
    return kind[type(column.type).__name__] + ("?" if column.nullable else "")


def _differences(connection: sa.Connection, columns: dict[str, Any], expected: dict[str, str]) -> list[str]:
    missing = [name for name, kind in expected.items() if name not in columns and "*" not in kind]
    unknown = [name for name in columns if name not in expected]
    found = [f"column {name} is missing" for name in missing] + [f"column {name} is unknown" for name in unknown]
    for name, kind in expected.items():
        if name not in columns:
            continue
        column = columns[name]
        if connection.dialect.name == "postgresql" and _kind(column["type"]) not in kind.strip("?*").split("|"):
            found.append(f"column {name} is {column['type']}, not {kind.strip('?*').replace('|', ' or ')}")
        if column["nullable"] and "?" not in kind and name != "id":
            found.append(f"column {name} may be NULL")
    return found


def _kind(type_: Any) -> str:
    for kind, types in {
        "uuid": sa.Uuid,
        "json": sa.JSON,
        "integer": sa.Integer,
        "float": sa.Float,
        "text": sa.String,
    }.items():
        if isinstance(type_, types):
            return kind
    return "time" if isinstance(type_, sa.DateTime) and type_.timezone else str(type_)


def _refuse_duplicates(connection: sa.Connection, table: sa.Table) -> None:
    for index in table.indexes:
        names = [column.name for column in index.columns if isinstance(column, sa.Column)]
        if not index.unique or "idempotency_key" in names:
            continue
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in names]
        source = sa.table(table.name, *columns, schema=table.schema)
        twice = sa.select(*columns).select_from(source).group_by(*columns).having(sa.func.count() > 1).limit(1)
        if (row := connection.execute(twice).first()) is not None:
            raise SchemaOutOfDate(
                f"table {table.fullname!r} has several rows with the same {', '.join(names)}: {tuple(row)!r}"
            )


def _alter(connection: sa.Connection, found: Found) -> None:
    """PostgreSQL: one ALTER TABLE, so that the rows are rewritten once."""
    table, quoted = found.table, connection.dialect.identifier_preparer
    actions = []
    for key in sa.inspect(connection).get_foreign_keys(table.name, schema=table.schema):
        if LOOSE.intersection(key["constrained_columns"]):
            actions.append(f"DROP CONSTRAINT {quoted.quote(key['name'] or '')}")
    for column in table.columns:
        name = quoted.quote(column.name)
        present = found.columns.get(column.name)
        if present is None:
            actions.append(f"ADD COLUMN {sa.schema.CreateColumn(column).compile(dialect=connection.dialect)}")
            continue
        wanted = column.type.compile(dialect=connection.dialect)
        if present["type"].compile(dialect=connection.dialect) != wanted:
            # A default of the old type would stop the change; the ids' own default stays, they keep their type.
            actions += [f"ALTER COLUMN {name} DROP DEFAULT"] if present["default"] and wanted != "JSONB" else []
            actions.append(f"ALTER COLUMN {name} TYPE {wanted} USING {name}::{wanted}")
        if not column.nullable and present["nullable"]:
            actions.append(f"ALTER COLUMN {name} SET NOT NULL")
    connection.exec_driver_sql(f"ALTER TABLE {quoted.format_table(table)} {', '.join(actions)}")


def _rebuild(connection: sa.Connection, found: Found) -> None:
    """SQLite: a new table, the rows copied, the old one gone; indexes and triggers of the host made again."""
    table = found.table
    master = sa.text(
        "SELECT sql FROM sqlite_master WHERE tbl_name = :name AND type IN ('index', 'trigger') AND sql IS NOT NULL"
    )
    extras = connection.execute(master, {"name": table.name}).scalars().all()
    copy = table.to_metadata(sa.MetaData(), name=f"jobkit_new_{table.name}")
    copy.indexes.clear()
    copy.create(connection)
    shared = [column.name for column in table.columns if column.name in found.columns]
    source = ", ".join(_copied(table.name, name, str(found.columns[name]["type"]).upper()) for name in shared)
    connection.exec_driver_sql(f'INSERT INTO {copy.name} ({", ".join(shared)}) SELECT {source} FROM "{table.name}"')
    connection.exec_driver_sql(f'DROP TABLE "{table.name}"')
    connection.exec_driver_sql(f'ALTER TABLE {copy.name} RENAME TO "{table.name}"')
    for statement in extras:
        connection.exec_driver_sql(statement)


def _copied(table: str, name: str, declared: str) -> str:
    if (table, name) == ("content_jobs", "id"):
        return "lower(replace(id, '-', ''))"  # as jobkit's statements compare it; an asset's id may have dashes
    # SQLAlchemy keeps a UUID as 32 digits in CHAR(32); as text, a company's id is what str(uuid) gives.
    if name in ("company_id", "created_by_agent_id") and declared in ("CHAR(32)", "UUID"):
        groups = ((1, 8), (9, 4), (13, 4), (17, 4), (21, 12))
        dashed = " || '-' || ".join(f"substr({name}, {start}, {length})" for start, length in groups)
        return (
            f"CASE WHEN length({name}) = 32 AND {name} NOT GLOB '*[^0-9a-fA-F]*' THEN lower({dashed}) ELSE {name} END"
        )
    return f"COALESCE({name}, '{{}}')" if name == "input" else name


def give_back(connection: sa.Connection, table: sa.Table, added: list[str]) -> None:
    """Take what ``adopt`` added off an adopted table; its rows stay, and so do the changed types."""
    columns = set(added)
    for index in table.indexes:
        if columns.intersection(column.name for column in index.columns if isinstance(column, sa.Column)) or any(
            name in str(expression) for expression in index.expressions for name in added
        ):
            index.drop(connection, checkfirst=True)
    name = connection.dialect.identifier_preparer.format_table(table)
    for column in added:
        connection.exec_driver_sql(
            f"ALTER TABLE {name} DROP COLUMN {connection.dialect.identifier_preparer.quote(column)}"
        )
