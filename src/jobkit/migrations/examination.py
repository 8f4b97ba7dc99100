"""Examines existing tables: jobkit's, to be adopted, or refused. Changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from jobkit.errors import ConfigurationError, SchemaOutOfDate
from jobkit.migrations import spelling
from jobkit.tables import metadata

# Columns of the tables that can be adopted, by kind: "?" for one that may be NULL, "*" for one that may be missing.
SEED: dict[str, dict[str, str]] = {
    "assets": {
        "id": "uuid", "company_id": "uuid|text", "provider": "text", "object_key": "text", "content_type": "text",
        "byte_size": "integer", "sha256": "text", "original_filename": "text?", "created_by_agent_id": "uuid|text?",
        "created_by_user_id": "text?", "source_task_id": "text?*", "created_at": "time", "updated_at": "time",
    },
    "content_jobs": {
        "id": "uuid", "company_id": "uuid|text", "job_type": "text", "status": "text", "input": "json?",
        "result_asset_id": "uuid?", "error_message": "text?", "source_task_id": "text?", "started_at": "time?",
        "finished_at": "time?", "created_at": "time?", "updated_at": "time?",
    },
}  # fmt: skip
_STATUSES = ("queued", "running", "done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Found:
    """An existing table: jobkit's, or one to adopt. ``declared``: its column types as the database spells them."""

    table: sa.Table
    columns: dict[str, Any]
    declared: dict[str, str]
    ours: bool


def examine(connection: sa.Connection, table: sa.Table) -> Found | None:
    """The existing table of this name, or None. ``SchemaOutOfDate`` when it is neither jobkit's nor one to adopt."""
    inspector = sa.inspect(connection)
    if not inspector.has_table(table.name, schema=table.schema):
        return None
    columns = {column["name"]: column for column in inspector.get_columns(table.name, schema=table.schema)}
    found = Found(table, columns, _declared(connection, table, columns), ours=True)
    in_both = [*_key(inspector, table), *_taken(inspector, table)]
    from_ours = [*_from_ours(connection, found), *in_both]
    if not from_ours:
        return found
    from_seed = [*_from_seed(connection, found), *in_both] if table.name in SEED else from_ours
    if from_seed:
        differences = min(from_ours, from_seed, key=len)
        raise SchemaOutOfDate(
            f"table {table.fullname!r} exists and is not jobkit's: {'; '.join(differences)}. Nothing was changed; "
            "rename that table, or give jobkit a schema of its own with schema="
        )
    _refuse_rows(connection, table)
    if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_keys").scalar():
        raise ConfigurationError(
            f"adopting table {table.name!r} rebuilds it, which foreign keys must not notice: call upgrade with "
            "the Engine, or with a Connection that has no open transaction"
        )
    return replace(found, ours=False)


def uniques(table: sa.Table) -> list[tuple[str, ...]]:
    """The groups of columns that this table of jobkit keeps unique without a condition."""
    parts: list[Any] = [index for index in table.indexes if index.unique and not index.dialect_kwargs]
    parts += [part for part in table.constraints if isinstance(part, sa.UniqueConstraint)]
    return [tuple(column.name for column in part.columns) for part in parts]


def _declared(connection: sa.Connection, table: sa.Table, columns: dict[str, Any]) -> dict[str, str]:
    if connection.dialect.name == "sqlite":  # SQLAlchemy reads a type it does not know as NUMERIC
        rows = connection.exec_driver_sql(f'PRAGMA table_info("{table.name}")')
        return {row.name: str(row.type).upper() for row in rows}
    return {
        name: "an unknown type" if isinstance(kind, sa.types.NullType) else kind.compile(dialect=connection.dialect)
        for name, kind in ((name, column["type"]) for name, column in columns.items())
    }


def _from_ours(connection: sa.Connection, found: Found) -> list[str]:
    """How the table differs from jobkit's."""
    table, columns, declared = found.table, found.columns, found.declared
    later = set(metadata.tables[table.name].columns.keys()) - set(table.columns.keys())
    differences = _names(columns.keys() - later, [column.name for column in table.columns], optional=())
    for column in table.columns:
        there = columns.get(column.name)
        if there is None:
            continue
        wanted = column.type.compile(dialect=connection.dialect)
        if declared[column.name] not in (wanted, {"FLOAT": "DOUBLE PRECISION"}.get(wanted)):
            differences.append(f"column {column.name} is {declared[column.name]}, not {wanted}")
        if not column.primary_key and there["nullable"] != column.nullable:
            differences.append(f"column {column.name} {'may' if there['nullable'] else 'may not'} be NULL")
        defaulted = column.server_default is not None and column.identity is None
        may_lack = connection.dialect.name == "sqlite" and column.nullable  # there DEFAULT NULL is no default
        if defaulted and not may_lack and there["default"] is None:
            differences.append(f"column {column.name} has no default")
        if column.identity is not None and connection.dialect.name == "postgresql" and not there.get("identity"):
            differences.append(f"column {column.name} is no identity")
    inspector = sa.inspect(connection)
    kept = [tuple(part["column_names"]) for part in inspector.get_unique_constraints(table.name, schema=table.schema)]
    for part in table.constraints:
        if isinstance(part, sa.UniqueConstraint) and tuple(c.name for c in part.columns) not in kept:
            differences.append(f"({', '.join(c.name for c in part.columns)}) is not unique")
    return differences


def _from_seed(connection: sa.Connection, found: Found) -> list[str]:
    """How the table differs from the one that can be adopted."""
    seed, columns, declared = SEED[found.table.name], found.columns, found.declared
    differences = _names(columns, seed, optional=[name for name, kind in seed.items() if "*" in kind])
    for name, kind in seed.items():
        if name not in columns:
            continue
        kinds = kind.strip("?*").split("|")
        if connection.dialect.name == "sqlite":
            right = any(_may_hold(declared[name], wanted) for wanted in kinds)
        else:
            right = _kind(columns[name]["type"]) in kinds
        if not right:
            differences.append(f"column {name} is {declared[name] or 'without a type'}, not {' or '.join(kinds)}")
        if columns[name]["nullable"] and "?" not in kind and name != "id":
            differences.append(f"column {name} may be NULL")
    return differences


def _names(columns: Iterable[str], expected: Iterable[str], optional: Iterable[str]) -> list[str]:
    missing = [name for name in expected if name not in columns and name not in optional]
    unknown = [name for name in columns if name not in expected]
    return [f"column {name} is missing" for name in missing] + [f"column {name} is unknown" for name in unknown]


def _key(inspector: sa.Inspector, table: sa.Table) -> list[str]:
    key = inspector.get_pk_constraint(table.name, schema=table.schema)
    names = [column.name for column in table.primary_key]
    return [] if key["constrained_columns"] == names else [f"its primary key is not {', '.join(names)}"]


def _taken(inspector: sa.Inspector, table: sa.Table) -> list[str]:
    """Unique indexes of jobkit whose name another index has."""
    there = {index["name"]: index for index in inspector.get_indexes(table.name, schema=table.schema)}
    return [
        f"index {index.name} does not keep ({', '.join(c.name for c in index.columns)}) unique"
        for index in sorted(table.indexes, key=lambda index: str(index.name))
        if index.unique
        and (same := there.get(str(index.name))) is not None
        and not (same["unique"] and same["column_names"] == [column.name for column in index.columns])
    ]


def _kind(type_: Any) -> str:
    """The kind of a PostgreSQL type as in SEED, else the type's name."""
    kinds: dict[str, Any] = {"text": sa.TEXT | sa.VARCHAR, "uuid": sa.Uuid, "json": sa.JSON, "integer": sa.Integer}
    for kind, known in kinds.items():
        if isinstance(type_, known):
            return kind
    return "time" if isinstance(type_, sa.DateTime) and type_.timezone else str(type_)


def _may_hold(declared: str, kind: str) -> bool:
    """Whether a column with this SQLite type keeps values of ``kind`` unchanged, by the rules of affinity."""
    if "INT" in declared:
        return kind == "integer"
    textual = re.search("CHAR|CLOB|TEXT", declared) is not None
    names = {"uuid": ("UUID", "GUID"), "json": ("JSON",), "time": ("DATETIME", "TIMESTAMP")}
    return kind != "integer" and (textual or declared.startswith(names.get(kind, "?")))


def _refuse_rows(connection: sa.Connection, table: sa.Table) -> None:
    """``SchemaOutOfDate`` for rows that break a unique constraint of jobkit or that it cannot read."""
    where = f"table {table.fullname!r}"
    for names in uniques(table):
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in names]
        source = sa.table(table.name, *columns, schema=table.schema)
        twice = sa.select(*columns).select_from(source).group_by(*columns).having(sa.func.count() > 1).limit(1)
        if (row := connection.execute(twice).first()) is not None:
            shown = ", ".join(repr(str(value)) for value in row)
            raise SchemaOutOfDate(f"{where} has several rows with the same {', '.join(names)}: {shown}")
    checks: dict[str, sa.ColumnElement[bool]] = {}
    if table.name == "content_jobs":
        checks["status"] = sa.column("status").not_in(_STATUSES)
    if connection.dialect.name == "sqlite":
        checks |= spelling.unreadable(table)
    for name, wrong in checks.items():
        source = sa.table(table.name, sa.column(name), sa.column("id"), schema=table.schema)
        query: Any = sa.select(sa.column("id"), sa.column(name)).select_from(source).where(wrong).limit(1)
        if (row := connection.execute(query).first()) is not None:
            raise SchemaOutOfDate(f"{where}, row {row[0]}: {name} is {row[1]!r}, which jobkit cannot read")
