"""Which tables a program works with: the check before it starts, and PostgreSQL schemas side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import migrations
from jobkit.db.host import require_schema
from jobkit.tables import metadata
from tests.support import unmigrated
from tests.support.databases import Database
from tests.support.seed import plant, rows_of, schema_of
from tests.support.unmigrated import KINDS, run

empty, postgresql = unmigrated.empty(*KINDS), unmigrated.empty_engine("postgresql")


# --- the check before a program starts


def test_a_migrated_database_passes_without_a_row_being_read(engine: sa.Engine) -> None:
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda c, cursor, statement, *rest: statements.append(statement))
    require_schema(engine)
    assert len(statements) == len(metadata.tables)
    assert all("LIMIT" in statement for statement in statements)


@pytest.mark.parametrize("table", sorted(metadata.tables))
def test_a_missing_table_is_named_with_what_to_call(engine: sa.Engine, table: str) -> None:
    run(engine, f"DROP TABLE {table}")
    with pytest.raises(jobkit.SchemaOutOfDate, match=rf"{table}.*: call jobkit.migrations.upgrade\(engine\), or run"):
        require_schema(engine)


@pytest.mark.parametrize(
    ("table", "column"), [("content_jobs", "trace"), ("assets", "position"), ("asset_intents", "last_error")]
)
def test_a_missing_column_is_named(engine: sa.Engine, table: str, column: str) -> None:
    if column == "position":
        run(engine, "DROP INDEX assets_job_idx")
    run(engine, f"ALTER TABLE {table} DROP COLUMN {column}")
    with pytest.raises(jobkit.SchemaOutOfDate, match=column):
        require_schema(engine)


def test_the_seeds_tables_do_not_pass(empty: Database) -> None:
    plant(empty.engine)
    with pytest.raises(jobkit.SchemaOutOfDate, match=r"source_task_id|job_id|content_job_events|asset_intents|fence"):
        require_schema(empty.engine)


def test_a_runner_and_a_relay_refuse_to_start_without_the_tables(empty: Database, tmp_path: Path) -> None:
    runner = jobkit.Runner(empty.engine, jobkit.AssetStore(tmp_path / "a", engine=empty.engine), jobkit.Renderers())
    with pytest.raises(jobkit.SchemaOutOfDate, match=r"jobkit\.migrations\.upgrade"):
        runner.start()
    with pytest.raises(jobkit.SchemaOutOfDate, match=r"jobkit\.migrations\.upgrade"):
        jobkit.Relay(empty.engine).start()


def test_the_check_leaves_a_pooled_connection_fit_for_use(empty: Database) -> None:
    engine = empty.connect(pool_size=1, max_overflow=0, pool_reset_on_return=None)
    with pytest.raises(jobkit.SchemaOutOfDate):
        require_schema(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    migrations.upgrade(engine)
    require_schema(engine)


def test_a_table_that_may_not_be_read_is_not_called_missing(database: Database) -> None:
    if database.engine.dialect.name == "sqlite":
        engine = database.connect()

        @sa.event.listens_for(engine, "connect")
        def deny(connection: object, _record: object) -> None:
            connection.set_authorizer(lambda action, name, *_: int(action == 20 and name == "assets"))  # type: ignore[attr-defined]

        with pytest.raises(sa.exc.DatabaseError, match="prohibited"):
            require_schema(engine)
        return
    role = f"guest_{sa.make_url(database.url).database}"
    run(database.engine, f"CREATE ROLE {role}")
    engine = database.connect(connect_args={"options": f"-c role={role}"})
    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        require_schema(engine)
    engine.dispose()
    run(database.engine, f"DROP ROLE {role}")


# --- schemas


def render_one(engine: sa.Engine, folder: Path, company: str) -> list[str]:
    """Create a job and render it; what the events say."""
    store = jobkit.AssetStore(folder, engine=engine)
    with Session(engine) as session, session.begin():
        job = jobkit.JobStore(session).create(company, job_type="note")
    renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", ctx.company_id.encode()))
    assert jobkit.Runner(engine, store, renderers).run_until_idle(timeout=60) == 1
    with Session(engine) as session:
        [asset] = store.list_by_job(session, job.id)
        assert [found.status for found in jobkit.JobStore(session).list_by_company(company)] == ["done"]
        with store.open(asset) as body:
            assert body.read() == company.encode()
        return [
            row.type for row in session.execute(sa.select(jobkit.tables.content_job_events).order_by(sa.text("seq")))
        ]


def test_two_schemas_and_the_default_one_live_side_by_side(postgresql: sa.Engine, tmp_path: Path) -> None:
    engines = {
        "red": postgresql.execution_options(schema_translate_map={None: "red"}),
        'Bl"ue': postgresql.execution_options(schema_translate_map={None: 'Bl"ue'}),
        "public": postgresql,
    }
    for schema, engine in engines.items():
        assert migrations.current(postgresql, schema=schema) is None
        with pytest.raises(jobkit.SchemaOutOfDate):
            require_schema(engine)
        migrations.upgrade(postgresql, schema=schema)
        assert migrations.current(postgresql, schema=schema) == "0002"
    expected = ["content_job.queued", "content_job.running", "content_job.done"]
    for schema, engine in engines.items():
        require_schema(engine)
        assert render_one(engine, tmp_path, schema.strip('"')[:2]) == expected
    migrations.downgrade(postgresql, schema="red")
    assert migrations.current(postgresql, schema="red") is None
    assert sa.inspect(postgresql).get_table_names(schema="red") == []
    for schema in ('Bl"ue', "public"):
        assert migrations.current(postgresql, schema=schema) == "0002"
        assert set(sa.inspect(postgresql).get_table_names(schema=schema)) >= set(metadata.tables)


def test_a_schema_is_migrated_as_the_default_one_is(postgresql: sa.Engine) -> None:
    migrations.upgrade(postgresql, schema="jobs")
    there = schema_of(postgresql, only="jobs")
    migrations.upgrade(postgresql)
    assert [tuple(part.replace("jobs.", "public.") for part in row[1:]) for row in there] == [
        row[1:] for row in schema_of(postgresql, only="public")
    ]


def test_an_engine_that_translates_the_schema_is_migrated_there(postgresql: sa.Engine, tmp_path: Path) -> None:
    engine = postgresql.execution_options(schema_translate_map={None: "jobs"})
    migrations.upgrade(engine)
    assert migrations.current(engine) == migrations.current(postgresql, schema="jobs") == "0002"
    assert sa.inspect(postgresql).get_table_names() == []
    assert len(render_one(engine, tmp_path, "acme")) == 3
    migrations.downgrade(engine)
    assert sa.inspect(postgresql).get_table_names(schema="jobs") == []


def test_a_table_of_the_hosts_in_another_schema_is_left_alone(postgresql: sa.Engine) -> None:
    run(postgresql, "CREATE TABLE assets (id integer)", "INSERT INTO assets VALUES (1)")
    before = schema_of(postgresql, only="public"), rows_of(postgresql)
    migrations.upgrade(postgresql, schema="jobs")
    migrations.downgrade(postgresql, schema="jobs")
    assert (schema_of(postgresql, only="public"), rows_of(postgresql)) == before


def test_the_seeds_tables_are_adopted_in_the_schema_they_are_in(postgresql: sa.Engine, tmp_path: Path) -> None:
    plant(postgresql)
    run(postgresql, "CREATE SCHEMA app", *(f"ALTER TABLE {name} SET SCHEMA app" for name in ("assets", "content_jobs")))
    migrations.upgrade(postgresql, schema="app")
    engine = postgresql.execution_options(schema_translate_map={None: "app"})
    require_schema(engine)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(jobkit.tables.assets)) == 2
    assert {name for _, name, kind, _ in schema_of(postgresql, only="public")} >= {"companies", "issue_attachments"}
    migrations.downgrade(postgresql, schema="app")
    assert set(sa.inspect(postgresql).get_table_names(schema="app")) == {"assets", "content_jobs"}


def test_a_refused_upgrade_does_not_leave_its_schema_behind(postgresql: sa.Engine) -> None:
    before = schema_of(postgresql)
    with postgresql.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        migrations.upgrade(connection, schema="jobs")
        connection.rollback()
    assert schema_of(postgresql) == before
