"""The four tables: as the founding contract lists them, the same however made, left alone by a host's tools."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

import jobkit
from jobkit import migrations
from jobkit.tables import content_job_events, metadata
from tests.support import unmigrated
from tests.support.databases import Database
from tests.support.seed import schema_of
from tests.support.unmigrated import KINDS

# "name: type on PostgreSQL | declared on SQLite | null or not | default". The host fills what has no default.
CONTRACT = {
    "content_jobs": """
        id: uuid | CHAR(32) | not null
        company_id: text | TEXT | not null
        job_type: text | TEXT | not null
        status: text | TEXT | not null | 'queued'
        input: jsonb | JSON | not null | '{}'
        result_asset_id: uuid | CHAR(32) | null
        error_message: text | TEXT | null
        source_task_id: text | TEXT | null
        started_at: timestamp with time zone | TEXT | null
        finished_at: timestamp with time zone | TEXT | null
        created_at: timestamp with time zone | TEXT | not null | now
        updated_at: timestamp with time zone | TEXT | not null | now
        fence: bigint | BIGINT | not null | 0
        attempt: integer | INTEGER | not null | 0
        rescues: integer | INTEGER | not null | 0
        lease_until: timestamp with time zone | TEXT | null
        worker_id: text | TEXT | null
        run_at: timestamp with time zone | TEXT | null
        priority: integer | INTEGER | not null | 0
        idempotency_key: text | TEXT | null
        cancel_requested_at: timestamp with time zone | TEXT | null
        progress: double precision | FLOAT | null
        progress_message: text | TEXT | null
        event_seq: integer | INTEGER | not null | 0
        trace: jsonb | JSON | null
        error_detail: text | TEXT | null
    """,
    "assets": """
        id: uuid | CHAR(32) | not null
        company_id: text | TEXT | not null
        provider: text | TEXT | not null
        object_key: text | TEXT | not null
        content_type: text | TEXT | not null
        byte_size: bigint | BIGINT | not null
        sha256: text | TEXT | not null
        original_filename: text | TEXT | null
        created_by_agent_id: text | TEXT | null
        created_by_user_id: text | TEXT | null
        source_task_id: text | TEXT | null
        created_at: timestamp with time zone | TEXT | not null | now
        updated_at: timestamp with time zone | TEXT | not null | now
        job_id: uuid | CHAR(32) | null
        position: integer | INTEGER | not null | 0
    """,
    "content_job_events": """
        id: bigint | INTEGER | not null
        company_id: text | TEXT | not null
        job_id: uuid | CHAR(32) | not null
        seq: integer | INTEGER | not null
        type: text | TEXT | not null
        payload: jsonb | JSON | not null | '{}'
        created_at: timestamp with time zone | TEXT | not null | now
        xid: bigint | BIGINT | null | xid
    """,
    "asset_intents": """
        id: uuid | CHAR(32) | not null
        company_id: text | TEXT | not null
        provider: text | TEXT | not null
        object_key: text | TEXT | not null
        state: text | TEXT | not null | 'pending'
        not_before: timestamp with time zone | TEXT | not null
        attempts: integer | INTEGER | not null | 0
        last_error: text | TEXT | null
    """,
}
DEFAULTS = {
    "postgresql": {"now": "now()", "xid": "((pg_current_xact_id())::text)::bigint", "{}": "'{}'::jsonb"},
    "sqlite": {"now": "strftime('%Y-%m-%d %H:%M:%f000', 'now')", "xid": "NULL"},
}
# Columns, in order; every one of them is kept unique, or not.
INDEXES = {
    "content_jobs": {
        "content_jobs_company_status_idx": (["company_id", "status"], False),
        "content_jobs_company_created_idx": (["company_id", "created_at"], False),
    },
    "assets": {
        "assets_company_object_key_uq": (["company_id", "object_key"], True),
        "assets_company_created_idx": (["company_id", "created_at"], False),
    },
}
UNIQUE = {"content_job_events": ["job_id", "seq"], "asset_intents": ["provider", "object_key"]}


empty = unmigrated.empty(*KINDS)


def described(engine: sa.Engine, table: str) -> list[str]:
    """The columns of a table in the words of ``CONTRACT``, from the database itself."""
    sqlite = engine.dialect.name == "sqlite"
    with engine.connect() as connection:
        if sqlite:
            rows = connection.exec_driver_sql(f'PRAGMA table_info("{table}")')
            # SQLAlchemy 2.0 writes one more pair of parentheses around an expression than 2.1.
            found = [(row.name, row.type, row.notnull, _bare(row.dflt_value)) for row in rows]
        else:
            rows = connection.exec_driver_sql(
                "SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid) "
                "FROM pg_attribute LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum) "
                f"WHERE attrelid = '{table}'::regclass AND attnum > 0 ORDER BY attnum"
            )
            found = [tuple(row) for row in rows]
    return [
        f"{name}: {kind} | {'not null' if required else 'null'}" + ("" if default is None else f" | {default}")
        for name, kind, required, default in found
    ]


def _bare(default: str | None) -> str | None:
    return default[1:-1] if default is not None and default.startswith("(") else default


def promised(engine: sa.Engine, table: str) -> list[str]:
    """The same from ``CONTRACT``."""
    lines = []
    postgresql = engine.dialect.name == "postgresql"
    for line in CONTRACT[table].strip().splitlines():
        name, _, rest = line.strip().partition(": ")
        on_postgresql, on_sqlite, null, *default = rest.split(" | ")
        value = [DEFAULTS[engine.dialect.name].get(text, text) for text in default]
        if postgresql:
            kind = on_postgresql
            value = [f"{text}::{kind}" if text.startswith("'") else text for text in value]
        else:
            kind = on_sqlite
        lines.append(" | ".join([f"{name}: {kind}", null, *value]))
    return lines


# --- the contract


@pytest.mark.parametrize("table", CONTRACT)
def test_a_table_has_the_columns_of_the_contract(engine: sa.Engine, table: str) -> None:
    assert described(engine, table) == promised(engine, table)
    assert sa.inspect(engine).get_pk_constraint(table)["constrained_columns"] == ["id"]


def test_the_metadata_holds_exactly_the_four_tables() -> None:
    assert sorted(jobkit.metadata.tables) == sorted(CONTRACT)
    assert all(getattr(jobkit.tables, name) is jobkit.metadata.tables[name] for name in CONTRACT)


@pytest.mark.parametrize("table", INDEXES)
def test_a_table_has_the_indexes_of_the_contract(engine: sa.Engine, table: str) -> None:
    found = {index["name"]: index for index in sa.inspect(engine).get_indexes(table)}
    for name, (columns, unique) in INDEXES[table].items():
        assert (found[name]["column_names"], bool(found[name]["unique"])) == (columns, unique)
        assert not [key for key in found[name].get("dialect_options", {}) if key.endswith("where")]


@pytest.mark.parametrize("table", UNIQUE)
def test_a_table_keeps_unique_what_the_contract_says(engine: sa.Engine, table: str) -> None:
    found = [part["column_names"] for part in sa.inspect(engine).get_unique_constraints(table)]
    assert found == [UNIQUE[table]]


def test_no_table_has_a_foreign_key(engine: sa.Engine) -> None:
    assert [key for table in CONTRACT for key in sa.inspect(engine).get_foreign_keys(table)] == []
    assert [table.foreign_keys for table in metadata.sorted_tables] == [set()] * 4


def test_sqlite_declares_no_type_that_its_driver_may_convert(sqlite_database: Database) -> None:
    ddl = " ".join(row[-1] for row in schema_of(sqlite_database.engine)).upper()
    assert "CREATE TABLE CONTENT_JOBS" in ddl
    assert re.findall(r"\b(?:DATETIME|TIMESTAMP|DATE|TIME|BOOL|BOOLEAN)\b", ddl) == []


def test_an_event_holds_the_id_of_the_transaction_that_wrote_it(postgres_database: Database) -> None:
    row = {"company_id": "c", "job_id": uuid4(), "type": "t", "payload": {}}
    with postgres_database.engine.connect() as connection:
        for seq in (1, 2):
            connection.execute(content_job_events.insert(), {**row, "seq": seq})
            written = connection.execute(
                sa.select(content_job_events.c.xid).where(content_job_events.c.seq == seq)
            ).scalar_one()
            assert written == int(connection.exec_driver_sql("SELECT pg_current_xact_id()::text").scalar_one())
            connection.commit()
        assert connection.scalar(sa.select(sa.func.count(content_job_events.c.xid.distinct()))) == 2


def test_an_events_id_is_never_used_twice(engine: sa.Engine) -> None:
    row = {"company_id": "c", "job_id": uuid4(), "type": "t", "payload": {}}
    with engine.begin() as connection:
        ids = []
        for seq in (1, 2):
            connection.execute(content_job_events.insert(), {**row, "seq": seq})
            ids.append(connection.scalar(sa.select(content_job_events.c.id)))
            connection.execute(content_job_events.delete())
    assert ids == [1, 2]


# --- created by a migration or by create_all


def made_by_create_all(empty: Database) -> list[tuple[str, ...]]:
    metadata.create_all(empty.engine)
    made = schema_of(empty.engine)
    metadata.drop_all(empty.engine)
    return made


def made_by_upgrade(empty: Database) -> list[tuple[str, ...]]:
    migrations.upgrade(empty.engine)
    return [row for row in schema_of(empty.engine) if migrations.VERSION_TABLE not in row]


def test_a_migrated_schema_is_what_create_all_makes(empty: Database) -> None:
    created = made_by_create_all(empty)
    assert len(created) > 10
    assert made_by_upgrade(empty) == created


DISAGREEMENTS = {
    "a column": lambda t: t.c.worker_id.__setattr__("nullable", False),
    "a default": lambda t: t.c.priority.__setattr__("server_default", sa.DefaultClause(sa.text("1"))),
    "a type": lambda t: t.c.fence.__setattr__("type", sa.Integer()),
    "an index": lambda t: t.indexes.remove(next(i for i in t.indexes if i.name == "content_jobs_running_idx")),
    "a condition": lambda t: next(i for i in t.indexes if i.name == "content_jobs_queued_idx").dialect_kwargs.update(
        postgresql_where=sa.text("status = 'running'"), sqlite_where=sa.text("status = 'running'")
    ),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_a_disagreement_of_the_tables_and_the_revision_is_seen(
    empty: Database, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen copy must not drift from ``jobkit.tables``: the comparison above sees each kind of drift."""
    other = sa.MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(other)
    DISAGREEMENTS[what](other.tables["content_jobs"])
    other.create_all(empty.engine)
    drifted = schema_of(empty.engine)
    other.drop_all(empty.engine)
    assert [row for row in made_by_upgrade(empty) if "options" not in row] != [r for r in drifted if "options" not in r]


def test_alembic_finds_no_difference_either(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        options: dict[str, Any] = {"version_table": migrations.VERSION_TABLE}
        # Alembic, 1.14 even unasked, takes an Identity for a default that SQLite lost; the DDL is compared there.
        options["compare_server_default"] = engine.dialect.name == "postgresql"
        found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    identity = [
        d for d in found if isinstance(d, list) and d[0][:4] == ("modify_default", None, "content_job_events", "id")
    ]
    assert found == (identity if engine.dialect.name == "sqlite" else [])


# --- a host with migrations of its own

ENVIRONMENT = """
from alembic import context

given = context.config.attributes
options = {"include_name": given["include_name"]} if given["include_name"] else {}
context.configure(connection=given["connection"], target_metadata=given["metadata"], **options)
with context.begin_transaction():
    context.run_migrations()
"""
TEMPLATE = """
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
import sqlalchemy as sa
from alembic import op
def upgrade():
    ${upgrades}
def downgrade():
    ${downgrades}
"""


def proposed(engine: sa.Engine, folder: Path, include_name: Any) -> str:
    """What ``alembic revision --autogenerate`` writes into the upgrade of a host with one model of its own."""
    host = sa.MetaData()
    sa.Table("articles", host, sa.Column("id", sa.Integer, primary_key=True), sa.Column("title", sa.Text))
    config = Config()
    config.set_main_option("script_location", str(folder))
    (folder / "versions").mkdir()
    (folder / "env.py").write_text(ENVIRONMENT)
    (folder / "script.py.mako").write_text(TEMPLATE)
    with engine.begin() as connection:
        config.attributes.update(connection=connection, metadata=host, include_name=include_name)
        revision: Any = command.revision(config, autogenerate=True)
    return Path(revision.path).read_text().partition("def upgrade()")[2].partition("def downgrade()")[0]


def test_a_hosts_autogenerate_with_include_name_proposes_only_the_hosts_own(engine: sa.Engine, tmp_path: Path) -> None:
    folder = tmp_path / "host"
    folder.mkdir()
    written = proposed(engine, folder, migrations.include_name)
    assert "op.create_table('articles'" in written
    assert "op.drop" not in written
    assert not [name for name in (*CONTRACT, migrations.VERSION_TABLE) if name in written]


def test_a_hosts_autogenerate_without_it_would_drop_every_table_of_ours(engine: sa.Engine, tmp_path: Path) -> None:
    folder = tmp_path / "host"
    folder.mkdir()
    written = proposed(engine, folder, None)
    for name in (*CONTRACT, migrations.VERSION_TABLE):
        assert f"op.drop_table('{name}')" in written


def test_include_name_leaves_everything_else_to_the_host() -> None:
    parents = {"schema_name": None, "table_name": "articles", "schema_qualified_table_name": "articles"}
    assert migrations.include_name("articles", "table", {"schema_name": None})
    assert migrations.include_name("assets", "schema", {})
    assert migrations.include_name(None, "schema", {})
    assert migrations.include_name("assets", "column", parents)
    assert not any(migrations.include_name(name, "table", {"schema_name": None}) for name in CONTRACT)
