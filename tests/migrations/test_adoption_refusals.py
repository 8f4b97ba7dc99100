"""Tables of the same names that are neither jobkit's nor the seed's: refused, naming what differs, and untouched."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from jobkit.tables import metadata
from tests.support import seed
from tests.support.seed import KEY, plant
from tests.support.unmigrated import KINDS, empty_engine, refused, run

engine = empty_engine(*KINDS)
postgresql, sqlite = empty_engine("postgresql", fill=plant), empty_engine("sqlite", fill=plant)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ("DROP COLUMN sha256", ["column sha256 is missing"]),
        ("ADD COLUMN thumbnail text", ["column thumbnail is unknown"]),
        ("ADD COLUMN xyzzy text; ALTER TABLE assets DROP COLUMN provider", ["xyzzy is unknown", "provider is missing"]),
    ],
)
def test_other_columns_are_refused_by_name(engine: sa.Engine, change: str, reasons: list[str]) -> None:
    plant(engine)
    run(engine, "DROP INDEX assets_company_provider_idx", *f"ALTER TABLE assets {change}".split(";"))
    refused(engine, "'assets'", "Nothing was changed", *reasons)


@pytest.mark.parametrize(
    ("table", "column", "before", "after"),
    [
        ("assets", "id", "uuid PRIMARY KEY", "integer PRIMARY KEY"),
        ("assets", "id", "uuid PRIMARY KEY", "uuid"),
        ("assets", "byte_size", "integer NOT NULL", "text NOT NULL"),
        ("assets", "byte_size", "integer NOT NULL", "numeric NOT NULL"),
        ("assets", "sha256", "text NOT NULL", "integer NOT NULL"),
        ("assets", "sha256", "text NOT NULL", "text"),
        ("assets", "provider", "text NOT NULL", "bytea NOT NULL"),
        ("assets", "company_id", "uuid NOT NULL", "integer NOT NULL"),
        ("assets", "created_at", "timestamptz NOT NULL", "bigint NOT NULL"),
        ("content_jobs", "input", "jsonb NOT NULL", "bytea NOT NULL"),
        ("content_jobs", "status", "text NOT NULL", "integer NOT NULL"),
    ],
)
def test_right_columns_of_wrong_types_are_refused(
    engine: sa.Engine, table: str, column: str, before: str, after: str
) -> None:
    ddl = next(part for part in seed.POSTGRESQL.split(";") if f"TABLE {table} " in part)
    head, _, rest = ddl.partition(f"    {column} {before}")
    assert rest
    rest = rest if "REFERENCES" not in rest.partition("\n")[0] else rest.replace(" REFERENCES companies(id)", "", 1)
    rest = "," + rest.partition(",")[2]  # without the default
    sqlite_names = [
        ("timestamptz", "DATETIME"),
        ("jsonb", "JSON"),
        ("bytea", "BLOB"),
        (" DEFAULT gen_random_uuid()", ""),
    ]
    statement = f"{head}    {column} {after}{rest}"
    if engine.dialect.name == "sqlite":
        for name, other in [*sqlite_names, ("now()", "CURRENT_TIMESTAMP"), ("uuid", "CHAR(32)")]:
            statement = statement.replace(name, other)
    parents = [
        f"CREATE TABLE {name} (id {'uuid' if engine.dialect.name == 'postgresql' else 'CHAR(32)'} PRIMARY KEY)"
        for name in ("companies", "agents")
    ]
    run(engine, *parents, statement)
    refused(engine, f"'{table}'", "its primary key is not id" if after == "uuid" else f"column {column} ")


def test_an_enum_on_postgresql_is_not_text(postgresql: sa.Engine) -> None:
    run(
        postgresql,
        "CREATE TYPE state AS ENUM ('queued', 'done')",
        "ALTER TABLE content_jobs ALTER status DROP DEFAULT, ALTER status TYPE state USING status::state",
    )
    refused(postgresql, "column status is state, not text")


@pytest.mark.parametrize("name", sorted(metadata.tables))
def test_a_table_of_the_host_that_only_has_the_name_is_refused(engine: sa.Engine, name: str) -> None:
    run(engine, f"CREATE TABLE {name} (id integer, note text)", f"INSERT INTO {name} VALUES (1, 'mine')")
    missing = {"content_job_epochs": "server"}.get(name, "company_id")
    refused(engine, f"table '{name}'", "column note is unknown", f"{missing} is missing")


@pytest.mark.parametrize("name", sorted(metadata.tables))
def test_a_table_of_ours_without_a_column_is_refused_by_that_column(engine: sa.Engine, name: str) -> None:
    metadata.create_all(engine)
    lost = {
        "content_jobs": "trace",
        "assets": "created_by_user_id",
        "content_job_events": "type",
        "content_job_epochs": "server",
    }.get(name, "company_id")
    run(engine, f"ALTER TABLE {name} DROP COLUMN {lost}")
    refused(engine, f"table '{name}' exists and is not jobkit's: column {lost} is missing. Nothing")


def test_duplicates_are_refused(engine: sa.Engine) -> None:
    plant(engine)
    key = f"UPDATE assets SET object_key = '{KEY}'"
    run(engine, "DROP INDEX assets_company_object_key_uq", key)
    refused(engine, "table 'assets' has several rows with the same company_id, object_key", KEY)


def test_an_index_of_ours_that_is_not_unique_is_refused(engine: sa.Engine) -> None:
    plant(engine)
    run(engine, "DROP INDEX assets_company_object_key_uq")
    run(engine, "CREATE INDEX assets_company_object_key_uq ON assets (object_key)")
    refused(engine, "index assets_company_object_key_uq does not keep (company_id, object_key) unique")


def test_a_status_that_jobkit_does_not_know_is_refused(engine: sa.Engine) -> None:
    plant(engine)
    run(engine, "UPDATE content_jobs SET status = 'paused' WHERE status = 'queued'")
    refused(engine, "'content_jobs'", "status is 'paused'")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("assets SET created_at = 'yesterday'", "created_at is 'yesterday'"),
        ("assets SET created_at = '2026-04-05 10:00:00+02'", "created_at is '2026-04-05 10:00:00+02'"),
        ("assets SET updated_at = '2026-13-05 10:00:00'", "updated_at is '2026-13-05 10:00:00'"),
        ("assets SET id = 'a1'", "id is 'a1'"),
        ("assets SET id = upper(id)", "id is"),
        ("assets SET byte_size = 'many'", "byte_size is 'many'"),
        ("content_jobs SET input = '[1]'", "input is '[1]'"),
        ("content_jobs SET input = 'oops'", "input is 'oops'"),
        ("content_jobs SET result_asset_id = 'x'", "result_asset_id is 'x'"),
        ("content_jobs SET started_at = 1775383200", "started_at is"),
    ],
)
def test_values_that_jobkit_could_not_read_are_refused_on_sqlite(sqlite: sa.Engine, change: str, reason: str) -> None:
    run(
        sqlite, "DELETE FROM issue_attachments", "DELETE FROM assets WHERE object_key LIKE '%a.pdf'", f"UPDATE {change}"
    )
    refused(sqlite, reason, "which jobkit cannot read")
