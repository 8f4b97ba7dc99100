"""The tables of the product jobkit descends from, as its hosts have them, with rows; and what a database holds."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

import sqlalchemy as sa

COMPANY, AGENT = UUID("0a5c1e2f-6b7d-4e8f-9a0b-1c2d3e4f5061"), UUID("7f6e5d4c-3b2a-4190-8f7e-6d5c4b3a2918")
ASSET, BARE = UUID("11111111-2222-4333-8444-555555555555"), UUID("66666666-7777-4888-9999-aaaaaaaaaaaa")
DONE, OPEN = UUID("aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"), UUID("bbbbbbbb-cccc-4ddd-8eee-ffffffffffff")
LARGE = 2_147_483_647
KEY = f"{COMPANY}/generated/2026/04/05/a.pdf"

POSTGRESQL = """
CREATE TABLE companies (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), name text NOT NULL);
CREATE TABLE agents (id uuid PRIMARY KEY DEFAULT gen_random_uuid());
CREATE TABLE assets (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    company_id uuid NOT NULL REFERENCES companies(id),
    provider text NOT NULL,
    object_key text NOT NULL,
    content_type text NOT NULL,
    byte_size integer NOT NULL,
    sha256 text NOT NULL,
    original_filename text,
    created_by_agent_id uuid REFERENCES agents(id),
    created_by_user_id text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX assets_company_created_idx ON assets (company_id, created_at);
CREATE INDEX assets_company_provider_idx ON assets (company_id, provider);
CREATE UNIQUE INDEX assets_company_object_key_uq ON assets (company_id, object_key);
CREATE TABLE issue_attachments (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    asset_id uuid NOT NULL UNIQUE REFERENCES assets(id) ON DELETE CASCADE
);
CREATE TABLE content_jobs (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    company_id uuid NOT NULL REFERENCES companies(id),
    job_type text NOT NULL,
    status text NOT NULL DEFAULT 'queued',
    input jsonb NOT NULL DEFAULT '{}',
    result_asset_id uuid,
    error_message text,
    source_task_id text,
    started_at timestamptz,
    finished_at timestamptz,
    created_at timestamptz DEFAULT now(),
    updated_at timestamptz DEFAULT now()
);
CREATE INDEX content_jobs_company_status_idx ON content_jobs (company_id, status);
CREATE INDEX content_jobs_company_created_idx ON content_jobs (company_id, created_at)
"""
# How hosts declare the types that SQLite does not have, and write their values.
SPELLINGS = {
    "sqlalchemy": ("CHAR(32)", "DATETIME", "JSON", "2026-04-05 10:00:00.123456"),
    "text": ("TEXT", "TEXT", "TEXT", "2026-04-05T10:00:00.123456Z"),
    "named": ("UUID", "TIMESTAMP", "JSONB", "2026-04-05T12:00:00.123456+02:00"),
    "sized": ("VARCHAR(36)", "TEXT", "TEXT", "2026-04-05 10:00:00.123456"),
}


def sqlite_ddl(spelling: str) -> str:
    identifier, time, document, _ = SPELLINGS[spelling]
    ddl = POSTGRESQL.replace(" DEFAULT gen_random_uuid()", "").replace("timestamptz", time).replace("uuid", identifier)
    return ddl.replace("jsonb", document).replace("now()", "CURRENT_TIMESTAMP")


def spell(value: UUID, spelling: str) -> str:
    return value.hex if spelling == "sqlalchemy" else str(value)


def plant(engine: sa.Engine, spelling: str = "sqlalchemy", *, jobs: bool = True, rows: bool = True) -> None:
    """Create the original tables, with two assets that an attachment refers to, and two jobs."""
    sqlite = engine.dialect.name == "sqlite"
    ddl = sqlite_ddl(spelling) if sqlite else POSTGRESQL
    spelling = spelling if sqlite else "sized"
    time = SPELLINGS[spelling][3] + ("" if sqlite else "+00")
    with engine.begin() as connection:
        for statement in ddl.split(";"):
            if jobs or "content_jobs" not in statement:
                connection.exec_driver_sql(statement)
        if not rows:
            return
        company, agent, asset, bare = (spell(value, spelling) for value in (COMPANY, AGENT, ASSET, BARE))
        fill = [
            f"INSERT INTO companies VALUES ('{company}', 'Acme')",
            f"INSERT INTO agents VALUES ('{agent}')",
            f"INSERT INTO assets VALUES ('{asset}', '{company}', 'local_disk', '{KEY}', 'application/pdf', {LARGE}, "
            f"'abc', 'é \"quoted\".pdf', '{agent}', 'user-1', '{time}', '{time}')",
            f"INSERT INTO assets (id, company_id, provider, object_key, content_type, byte_size, sha256) "
            f"VALUES ('{bare}', '{company}', 's3', '{COMPANY}/b', 'text/plain', 0, '')",
            f"INSERT INTO issue_attachments VALUES ('{spell(DONE, spelling)}', '{asset}')",
        ]
        job = "INSERT INTO content_jobs (id, company_id, job_type, status, input, result_asset_id, created_at) VALUES "
        if jobs:
            done, queued = spell(DONE, spelling), spell(OPEN, spelling)
            fill.append(
                f"""{job} ('{done}', '{company}', 'diagram', 'done', '{{"a": [1, "é"]}}', '{asset}', '{time}')"""
            )
            fill.append(f"{job} ('{queued}', '{company}', 'note', 'queued', '{{}}', NULL, NULL)")
        for statement in fill:
            connection.exec_driver_sql(statement)


_POSTGRESQL_DUMP = """
SELECT n.nspname, c.relname, 'column', a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' '
    || a.attnotnull::text || ' ' || a.attidentity::text || ' ' || coalesce(pg_get_expr(d.adbin, d.adrelid), '')
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'v')
UNION ALL SELECT n.nspname, c.relname, 'options', array_to_string(c.reloptions, ', ')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r'
UNION ALL SELECT n.nspname, c.relname, 'constraint', k.conname || ' ' || pg_get_constraintdef(k.oid)
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE k.contype <> 'n'
UNION ALL SELECT schemaname, tablename, 'index', indexdef FROM pg_indexes
UNION ALL SELECT n.nspname, c.relname, 'trigger', pg_get_triggerdef(t.oid)
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT t.tgisinternal
UNION ALL SELECT schemaname, viewname, 'view', definition FROM pg_views
UNION ALL SELECT nspname, '', 'schema', '' FROM pg_namespace
"""


def schema_of(engine: sa.Engine, *, only: str | None = None) -> list[tuple[str, ...]]:
    """Every definition in the database, of one PostgreSQL schema when ``only`` names it."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            query = "SELECT tbl_name, type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
            return sorted(tuple(map(_normal, row)) for row in connection.exec_driver_sql(query))
        rows = [tuple(map(str, row)) for row in connection.exec_driver_sql(_POSTGRESQL_DUMP)]
    kept = [row for row in rows if not row[0].startswith(("pg_", "information_schema"))]
    return sorted(row for row in kept if only is None or row[0] == only)


def _normal(definition: object) -> str:
    """SQLite keeps the text of CREATE TABLE, to which ADD COLUMN appends: the parts of a table in a fixed order."""
    text = str(definition)
    head, bracket, body = text.partition("(")
    if not text.upper().startswith("CREATE TABLE"):
        return text
    parts = re.split(r",\s(?![^()]*\))", body.rstrip().removesuffix(")"))
    return f"{head}{bracket}{', '.join(sorted(part.strip() for part in parts))})"


def rows_of(engine: sa.Engine, *, leave_out: str = "jobkit_") -> dict[str, list[Any]]:
    """Every row of every table, as the driver gives it."""
    with engine.connect() as connection:
        names = [name for name in sa.inspect(connection).get_table_names() if not name.startswith(leave_out)]
        return {n: sorted(map(repr, connection.exec_driver_sql(f'SELECT * FROM "{n}"'))) for n in sorted(names)}
