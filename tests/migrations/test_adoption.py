"""Upgrading a database that has tables of the same names: the seed's are adopted, the rest is refused untouched."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import migrations
from jobkit.tables import assets, content_jobs
from tests.support import seed
from tests.support.databases import Database
from tests.support.seed import AGENT, ASSET, BARE, COMPANY, DONE, KEY, LARGE, OPEN, SPELLINGS, plant, rows_of, schema_of
from tests.support.unmigrated import KINDS, empty_engine, enforced, refused, run, unmigrated

WHEN = datetime(2026, 4, 5, 10, 0, 0, 123456, tzinfo=UTC)
CASES = [*(("sqlite", spelling) for spelling in SPELLINGS), ("postgresql", "sized")]


engine = empty_engine(*KINDS)
postgresql, sqlite = empty_engine("postgresql", fill=plant), empty_engine("sqlite", fill=plant)


@pytest.fixture(params=CASES, ids="-".join)
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """A database with the seed's tables and rows, in each spelling."""
    kind, spelling = request.param
    database: Database = unmigrated(kind, tmp_path, request)
    plant(database.engine, spelling)
    yield database.engine
    database.close()


def value(engine: sa.Engine, query: str) -> Any:
    with engine.connect() as connection:
        return connection.exec_driver_sql(query).scalar()


def columns(engine: sa.Engine, table: str) -> dict[str, Any]:
    return {column["name"]: column for column in sa.inspect(engine).get_columns(table)}


# --- what is kept


def test_no_row_and_no_value_is_lost(planted: sa.Engine, tmp_path: Path) -> None:
    migrations.upgrade(planted)
    store = jobkit.AssetStore(tmp_path, engine=planted)
    with Session(planted) as session:
        asset = store.get_by_id(session, ASSET)
        bare = store.get_by_id(session, str(BARE))
        assert asset is not None
        assert bare is not None
        assert asset == jobkit.Asset(
            id=ASSET,
            company_id=str(COMPANY),
            provider="local_disk",
            object_key=KEY,
            content_type="application/pdf",
            byte_size=LARGE,
            sha256="abc",
            original_filename='é "quoted".pdf',
            created_by_agent_id=str(AGENT),
            created_by_user_id="user-1",
            source_task_id=None,
            created_at=WHEN,
            updated_at=WHEN,
            job_id=None,
            position=0,
        )
        assert (bare.byte_size, bare.original_filename, bare.created_by_agent_id) == (0, None, None)
        assert store.list_by_company(session, str(COMPANY)) == [bare, asset]
        assert store.list_by_company(session, COMPANY, limit=1, before=bare.id) == [asset]
        jobs = jobkit.JobStore(session)
        done, queued = jobs.get_by_id(DONE), jobs.get_by_id(str(OPEN))
        assert done is not None
        assert queued is not None
        assert jobs.list_by_company(COMPANY) == [queued, done]
        assert (done.company_id, done.job_type, done.status) == (str(COMPANY), "diagram", "done")
        assert (done.input, done.result_asset_id, done.created_at) == ({"a": [1, "é"]}, ASSET, WHEN)
        assert (queued.input, queued.result_asset_id, queued.fence, queued.event_seq) == ({}, None, 0, 0)
        assert abs((queued.created_at - datetime.now(UTC)).total_seconds()) < 60


def test_jobs_and_assets_work_on_adopted_rows(planted: sa.Engine, tmp_path: Path) -> None:
    migrations.upgrade(planted)
    store = jobkit.AssetStore(tmp_path, engine=planted)
    renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"new"))
    assert jobkit.Runner(planted, store, renderers).run_until_idle(timeout=60) == 1
    with Session(planted) as session, session.begin():
        jobs = jobkit.JobStore(session)
        rendered = jobs.get_by_id(OPEN)
        assert rendered is not None
        assert rendered.status == "done"
        assert [a.id for a in store.list_by_job(session, OPEN)] == [rendered.result_asset_id]
        assert jobs.transition(DONE, expect="done", status="queued").fence == 0
        bare = store.get_by_id(session, BARE)
        assert bare is not None
        store.delete(session, bare)
        assert store.get_by_id(session, BARE) is None
    run(planted, f"UPDATE assets SET byte_size = {LARGE + 1}")


def test_the_references_of_other_tables_stay_valid_and_still_cascade(planted: sa.Engine, tmp_path: Path) -> None:
    migrations.upgrade(planted)
    assert value(planted, "SELECT count(*) FROM issue_attachments") == 1
    [key] = sa.inspect(planted).get_foreign_keys("issue_attachments")
    assert (key["referred_table"], key["constrained_columns"]) == ("assets", ["asset_id"])
    run(planted, "DELETE FROM companies", "DELETE FROM agents")
    assert value(planted, "SELECT count(*) FROM assets") == 2
    with pytest.raises(sa.exc.IntegrityError):
        run(planted, f"INSERT INTO issue_attachments VALUES ('{uuid4()}', '{uuid4()}')")
    run(planted, "DELETE FROM assets")
    assert value(planted, "SELECT count(*) FROM issue_attachments") == 0
    if planted.dialect.name == "sqlite":
        assert enforced(planted)


def test_the_types_are_ours_and_foreign_keys_to_the_hosts_tables_are_gone(planted: sa.Engine) -> None:
    migrations.upgrade(planted)
    for table in (assets, content_jobs):
        assert sa.inspect(planted).get_foreign_keys(table.name) == []
        there = columns(planted, table.name)
        assert set(there) == {column.name for column in table.columns}
        for column in table.columns:
            declared = there[column.name]["type"].compile(planted.dialect).replace("DOUBLE PRECISION", "FLOAT")
            assert (column.name, declared) == (column.name, column.type.compile(planted.dialect))
            assert column.primary_key or there[column.name]["nullable"] == column.nullable, column.name
        names = {index["name"] for index in sa.inspect(planted).get_indexes(table.name)}
        assert names >= {index.name for index in table.indexes}


def test_the_log_says_what_becomes_of_the_table(engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    plant(engine, jobs=False)
    with caplog.at_level(logging.WARNING, "jobkit"):
        migrations.upgrade(engine)
    [message] = [record.getMessage() for record in caplog.records if record.name == "jobkit"]
    for part in (
        "adopting table assets: foreign keys on company_id and created_by_agent_id are dropped",
        "company_id -> companies",
        "created_by_agent_id -> agents",
        "both columns become text, byte_size bigint",
        "added: source_task_id, job_id, position",
    ):
        assert part in message
    documented = " ".join((migrations.upgrade.__doc__ or "").replace("*", "").replace("`", "").split())
    assert (
        "Foreign keys on its company_id and created_by_agent_id are dropped, both columns become text, byte_size "
        "becomes bigint"
    ) in documented


def test_a_seed_that_has_source_task_id_keeps_it(engine: sa.Engine, tmp_path: Path) -> None:
    plant(engine)
    run(engine, "ALTER TABLE assets ADD COLUMN source_task_id text", "UPDATE assets SET source_task_id = 'task'")
    migrations.upgrade(engine)
    with Session(engine) as session:
        asset = jobkit.AssetStore(tmp_path).get_by_id(session, ASSET)
    assert asset is not None
    assert asset.source_task_id == "task"
    migrations.downgrade(engine)
    assert value(engine, "SELECT source_task_id FROM assets LIMIT 1") == "task"


def test_defaults_of_the_host_survive(engine: sa.Engine) -> None:
    plant(engine, rows=False)
    if engine.dialect.name == "postgresql":
        run(engine, "ALTER TABLE assets ALTER company_id SET DEFAULT '0a5c1e2f-6b7d-4e8f-9a0b-1c2d3e4f5061'")
        run(engine, "ALTER TABLE assets ALTER provider SET DEFAULT 'a:b'")
        wanted = {"id": "gen_random_uuid()", "created_at": "now()", "provider": "'a:b'::text"}
    else:
        run(engine, "DROP TABLE assets")
        ddl = seed.sqlite_ddl("sqlalchemy").split(";")[2].replace("provider text", "provider text DEFAULT 'a:b'")
        run(engine, ddl.replace("PRIMARY KEY", "PRIMARY KEY DEFAULT (lower(hex(randomblob(16))))", 1))
        wanted = {"id": "lower(hex(randomblob(16)))", "provider": "'a:b'"}
    migrations.upgrade(engine)
    there = columns(engine, "assets")
    assert {name: there[name]["default"] for name in wanted} == wanted
    run(
        engine,
        "INSERT INTO assets (company_id, object_key, content_type, byte_size, sha256) VALUES ('c','k','t',1,'s')",
    )
    with engine.connect() as connection:
        row = connection.execute(sa.select(assets)).one()
    assert (row.provider, row.position) == ("a:b", 0)
    assert abs((row.created_at - datetime.now(UTC)).total_seconds()) < 60
    if engine.dialect.name == "postgresql":
        assert "0a5c1e2f-6b7d-4e8f-9a0b-1c2d3e4f5061" in there["company_id"]["default"]


# --- what the host has on the table

TRIGGER = {
    "sqlite": ["CREATE TRIGGER seen AFTER INSERT ON assets BEGIN INSERT INTO audit VALUES (NEW.object_key); END"],
    "postgresql": [
        "CREATE FUNCTION seen() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN INSERT INTO audit VALUES (NEW.object_key); RETURN NEW; END'",
        "CREATE TRIGGER seen AFTER INSERT ON assets FOR EACH ROW EXECUTE FUNCTION seen()",
    ],
}


def test_triggers_views_and_indexes_of_the_host_survive(engine: sa.Engine) -> None:
    plant(engine)
    run(
        engine,
        "CREATE TABLE audit (entry text)",
        *TRIGGER[engine.dialect.name],
        "CREATE VIEW files AS SELECT id, object_key FROM assets",
        "CREATE INDEX by_hash ON assets (sha256) WHERE sha256 <> ''",
        "CREATE UNIQUE INDEX by_key ON assets (lower(object_key))",
    )
    kinds = {"index", "trigger", "view"}
    before = [row for row in schema_of(engine) if kinds.intersection(row)]
    migrations.upgrade(engine)
    kept = [row for row in schema_of(engine) if row in before]
    assert kept == before
    assert value(engine, "SELECT count(*) FROM files") == 2
    assert value(engine, "SELECT count(*) FROM audit") == 0
    row = {"id": uuid4(), "company_id": "c", "provider": "p", "object_key": "new", "content_type": "t"}
    with engine.begin() as connection:
        connection.execute(assets.insert(), {**row, "byte_size": 1, "sha256": "s"})
    assert value(engine, "SELECT entry FROM audit") == "new"


def test_other_constraints_of_the_host_survive(engine: sa.Engine) -> None:
    plant(engine, rows=False)
    extra = "CONSTRAINT positive CHECK (byte_size >= 0),\nCONSTRAINT once UNIQUE (sha256),\n"
    extra += "CONSTRAINT known FOREIGN KEY (created_by_user_id) REFERENCES users (id) ON DELETE SET NULL"
    ddl = seed.sqlite_ddl("sqlalchemy") if engine.dialect.name == "sqlite" else seed.POSTGRESQL
    ddl = ddl.split(";")[2].rstrip().removesuffix(")") + f", {extra})"
    run(engine, "DROP TABLE issue_attachments", "DROP TABLE assets", "CREATE TABLE users (id text PRIMARY KEY)", ddl)
    migrations.upgrade(engine)
    insert = "INSERT INTO assets (id, company_id, provider, object_key, content_type, byte_size, sha256, "
    insert += "created_by_user_id) VALUES ('{}', 'c', 'p', '{}', 't', {}, '{}', {})"
    run(engine, insert.format(uuid4(), "a", 1, "a", "NULL"))
    for wrong in (("b", -1, "b", "NULL"), ("b", 1, "a", "NULL"), ("b", 1, "b", "'nobody'")):
        with pytest.raises(sa.exc.IntegrityError):
            run(engine, insert.format(uuid4(), *wrong))
    [key] = sa.inspect(engine).get_foreign_keys("assets")
    assert (key["name"], key["options"]) == ("known", {"ondelete": "SET NULL"})


def test_a_view_that_holds_a_type_on_postgresql_is_named(postgresql: sa.Engine) -> None:
    run(postgresql, "CREATE VIEW owners AS SELECT company_id FROM assets")
    refused(postgresql, "table 'assets' cannot be adopted, nothing was changed", "owners", "company_id")
    with postgresql.begin() as connection:
        with pytest.raises(jobkit.SchemaOutOfDate):
            migrations.upgrade(connection)
        assert connection.exec_driver_sql("SELECT count(*) FROM owners").scalar() == 2


def test_a_condition_that_compares_a_uuid_on_postgresql_is_told(postgresql: sa.Engine) -> None:
    run(postgresql, f"CREATE INDEX of_one ON assets (id) WHERE company_id = '{COMPANY}'::uuid")
    refused(postgresql, "table 'assets' cannot be adopted", "text = uuid")


def test_adoption_is_refused_in_a_transaction_that_enforces_foreign_keys(sqlite: sa.Engine) -> None:
    before = schema_of(sqlite), rows_of(sqlite)
    with sqlite.begin() as connection:
        connection.exec_driver_sql("SELECT 1")
        with pytest.raises(jobkit.ConfigurationError, match="call upgrade with the Engine"):
            migrations.upgrade(connection)
    assert (schema_of(sqlite), rows_of(sqlite)) == before


def test_adoption_in_the_callers_transaction_may_be_rolled_back(postgresql: sa.Engine) -> None:
    before = schema_of(postgresql), rows_of(postgresql)
    with postgresql.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        migrations.upgrade(connection)
        connection.rollback()
    assert (schema_of(postgresql), rows_of(postgresql)) == before


def test_references_to_jobs_whose_ids_would_be_spelled_anew_refuse_the_upgrade(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'dashes.db'}")
    plant(engine, "text")
    run(engine, "CREATE TABLE invoices (job_id TEXT REFERENCES content_jobs (id))")
    run(engine, f"INSERT INTO invoices VALUES ('{DONE}')")
    refused(engine, "table 'content_jobs' cannot be adopted", "invoices refers to them")
    engine.dispose()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2026-04-05 10:00:00", (10, 0)),
        ("2026-04-05T10:00:00Z", (10, 0)),
        ("2026-04-05T10:00:00.5Z", (10, 500_000)),
        ("2026-04-05 10:00:00.999999", (10, 999_999)),
        ("2026-04-05T23:59:59.999+14:00", None),
        ("2026-04-05T08:30:00.123456789-01:30", (10, 123_456)),
    ],
)
def test_a_time_is_the_same_moment_in_our_spelling(
    sqlite: sa.Engine, written: str, read: tuple[int, int] | None
) -> None:
    run(sqlite, f"UPDATE assets SET created_at = '{written}'")
    migrations.upgrade(sqlite)
    spelled = str(value(sqlite, "SELECT created_at FROM assets"))
    wanted = datetime(2026, 4, 5, read[0], 0, 0, read[1]) if read else datetime(2026, 4, 5, 9, 59, 59, 999_000)
    assert spelled == wanted.strftime("%Y-%m-%d %H:%M:%S.%f")


# --- back, and again


def test_a_downgrade_keeps_the_rows_and_takes_off_what_was_added(planted: sa.Engine) -> None:
    before = {name: set(columns(planted, name)) for name in ("assets", "content_jobs")}
    indexes = {name: {i["name"] for i in sa.inspect(planted).get_indexes(name)} for name in before}
    rows = {name: len(found) for name, found in rows_of(planted).items()}
    options = [row for row in schema_of(planted) if "options" in row]
    migrations.upgrade(planted)
    once = schema_of(planted), rows_of(planted)
    migrations.downgrade(planted)
    assert {name: set(columns(planted, name)) for name in before} == before
    assert {name: {i["name"] for i in sa.inspect(planted).get_indexes(name)} for name in before} == indexes
    assert {name: len(found) for name, found in rows_of(planted).items()} == rows
    assert [row for row in schema_of(planted) if "options" in row] == options
    assert set(sa.inspect(planted).get_table_names()) == set(rows)
    migrations.upgrade(planted)
    assert rows_of(planted) == once[1]
    assert sorted(map(str, schema_of(planted))) == sorted(map(str, once[0]))


def test_a_view_on_an_added_column_keeps_the_downgrade_from_it(engine: sa.Engine) -> None:
    plant(engine)
    migrations.upgrade(engine)
    run(engine, "CREATE VIEW made AS SELECT job_id FROM assets")
    before = schema_of(engine), rows_of(engine)
    with pytest.raises(
        jobkit.ConfigurationError, match=r"table 'assets' cannot be given back, nothing was changed.*made"
    ):
        migrations.downgrade(engine)
    assert (schema_of(engine), rows_of(engine)) == before


def test_fifty_thousand_rows_are_adopted_in_seconds(engine: sa.Engine) -> None:
    plant(engine)
    company = seed.spell(COMPANY, "sqlalchemy" if engine.dialect.name == "sqlite" else "sized")
    source = {
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50000) "
        "SELECT printf('%032x', i), '{}', 'p', 'k' || i, 't', i, 's' FROM n",
        "postgresql": "SELECT gen_random_uuid(), '{}', 'p', 'k' || i, 't', i, 's' FROM generate_series(1, 50000) i",
    }[engine.dialect.name]
    names = "id, company_id, provider, object_key, content_type, byte_size, sha256"
    run(engine, f"INSERT INTO assets ({names}) {source.format(company)}")
    began = time.monotonic()
    migrations.upgrade(engine)
    took = time.monotonic() - began
    assert value(engine, "SELECT count(*) FROM assets WHERE company_id = '" + str(COMPANY) + "'") == 50_002
    assert took < 30, f"{took:.1f} s"
    print(f"{engine.dialect.name}: {took:.2f} s")
