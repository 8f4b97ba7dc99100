"""Upgrading, downgrading, alone and together, on a database that has none of jobkit's tables or all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy.orm import Session

import jobkit
from jobkit import migrations, sse
from jobkit.migrations import transaction
from jobkit.tables import metadata
from tests.support import seed, unmigrated
from tests.support.databases import Database
from tests.support.seed import rows_of, schema_of
from tests.support.unmigrated import KINDS, enforced

TABLES = {*metadata.tables, migrations.VERSION_TABLE}


empty = unmigrated.empty(*KINDS)
postgresql, sqlite = unmigrated.empty_engine("postgresql"), unmigrated.empty_engine("sqlite")


@pytest.fixture
def engine(empty: Database) -> sa.Engine:
    return empty.engine


def tables(engine: sa.Engine, schema: str | None = None) -> set[str]:
    return set(sa.inspect(engine).get_table_names(schema=schema))


def render_one(engine: sa.Engine, folder: Path) -> jobkit.Job:
    """Create a job, render it, and return it as it is in the end."""
    renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"x"))
    store = jobkit.AssetStore(folder, engine=engine)
    with Session(engine) as session, session.begin():
        job = jobkit.JobStore(session).create("acme", job_type="note")
    jobkit.Runner(engine, store, renderers).run_until_idle(timeout=60)
    with Session(engine) as session:
        found = jobkit.JobStore(session).get_by_id(job.id)
        assert found is not None
        assert [asset.id for asset in store.list_by_job(session, job.id)] == [found.result_asset_id]
    return found


# --- up and down


def test_an_upgrade_makes_the_tables_and_says_at_which_revision_they_are(engine: sa.Engine) -> None:
    assert migrations.current(engine) is None
    migrations.upgrade(engine)
    assert migrations.current(engine) == "0002"
    assert tables(engine) == TABLES


def test_a_second_upgrade_changes_nothing(engine: sa.Engine, tmp_path: Path) -> None:
    migrations.upgrade(engine)
    render_one(engine, tmp_path)
    before = schema_of(engine), rows_of(engine)
    migrations.upgrade(engine)
    assert (schema_of(engine), rows_of(engine)) == before


def test_a_downgrade_with_jobs_leaves_nothing_and_an_upgrade_begins_anew(engine: sa.Engine, tmp_path: Path) -> None:
    before = schema_of(engine)
    migrations.upgrade(engine)
    first = schema_of(engine)
    render_one(engine, tmp_path)
    migrations.downgrade(engine)
    assert schema_of(engine) == before
    assert migrations.current(engine) is None
    migrations.downgrade(engine)
    assert schema_of(engine) == before
    migrations.upgrade(engine)
    assert schema_of(engine) == first
    assert render_one(engine, tmp_path).status == "done"


def test_tables_that_create_all_made_are_taken_as_they_are(engine: sa.Engine) -> None:
    metadata.create_all(engine)
    before = schema_of(engine)
    migrations.upgrade(engine)
    assert [row for row in schema_of(engine) if migrations.VERSION_TABLE not in map(str, row)] == before


@pytest.mark.parametrize("there", sorted(metadata.tables))
def test_the_tables_that_are_missing_are_made(engine: sa.Engine, there: str) -> None:
    metadata.tables[there].create(engine)
    migrations.upgrade(engine)
    assert tables(engine) == TABLES
    half = schema_of(engine)
    migrations.downgrade(engine)
    assert tables(engine) == set()
    migrations.upgrade(engine)
    assert schema_of(engine) == half


def test_a_revision_of_another_version_is_refused(engine: sa.Engine) -> None:
    migrations.upgrade(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {migrations.VERSION_TABLE} SET version_num = '9999'")
    before = schema_of(engine)
    for migrate in (migrations.upgrade, migrations.downgrade):
        with pytest.raises(jobkit.SchemaOutOfDate, match=r"another version of jobkit.*9999"):
            migrate(engine)
    assert migrations.current(engine) == "9999"
    assert schema_of(engine) == before


def test_a_table_of_the_hosts_that_refers_to_a_job_keeps_it_from_being_dropped(engine: sa.Engine) -> None:
    migrations.upgrade(engine)
    with engine.begin() as connection:
        kind = "CHAR(32)" if engine.dialect.name == "sqlite" else "uuid"
        connection.exec_driver_sql(f"CREATE TABLE invoices (job_id {kind} REFERENCES content_jobs (id))")
    before = schema_of(engine)
    with pytest.raises(jobkit.ConfigurationError, match="invoices"):
        migrations.downgrade(engine)
    assert schema_of(engine) == before


# --- from 0.1


@pytest.fixture
def first(engine: sa.Engine) -> sa.Engine:
    """A database of version 0.1, with a job."""
    migrations._migrate(engine, None, "0001", up=True)
    with Session(engine) as session, session.begin():
        jobkit.JobStore(session).create("acme", job_type="note", input={"a": 1})
    return engine


def test_a_database_of_0_1_takes_jobs_and_says_what_it_needs_before_anything_runs(
    first: sa.Engine, tmp_path: Path
) -> None:
    if first.dialect.name == "sqlite":
        jobkit.configure_sqlite(first)
    store, renderers = jobkit.AssetStore(tmp_path), jobkit.Renderers()
    for call in (
        lambda: jobkit.Runner(first, store, renderers).start(),
        lambda: jobkit.Runner(first, store, renderers).run_until_idle(),
        lambda: jobkit.Relay(first).start(),
        lambda: sse.stream(first, "acme"),
        lambda: jobkit.prune(first, older_than=0),
    ):
        with pytest.raises(jobkit.SchemaOutOfDate, match=r"content_job_epochs.*run jobkit migrate"):
            call()
    assert migrations.current(first) == "0001"
    with Session(first) as session, session.begin():
        jobkit.JobStore(session).create("acme", job_type="note")


def test_a_database_of_0_1_is_upgraded_with_its_rows_and_back(first: sa.Engine, tmp_path: Path) -> None:
    schema, rows = schema_of(first), rows_of(first)
    migrations.upgrade(first)
    assert migrations.current(first) == "0002"
    whole = schema_of(first)
    second = ScriptDirectory(str(Path(migrations.__file__).parent)).get_revision("0002").module
    with first.begin() as connection:
        second.downgrade(connection, None)
    assert (schema_of(first), rows_of(first)) == (schema, rows)
    with first.begin() as connection:
        second.upgrade(connection, None)
    assert schema_of(first) == whole
    counts = {name: len(found) for name, found in rows.items()}  # content_jobs has a column more
    assert {name: len(found) for name, found in rows_of(first).items()} == counts | {"content_job_epochs": 0}
    if first.dialect.name == "sqlite":
        jobkit.configure_sqlite(first)
    assert render_one(first, tmp_path).status == "done"
    migrations.downgrade(first)
    migrations.upgrade(first)
    assert schema_of(first) == whole


# --- whose transaction


def test_with_a_connection_without_a_transaction_the_upgrade_commits_one_of_its_own(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        migrations.upgrade(connection)
        assert not connection.in_transaction()
        assert migrations.current(connection) == "0002"
    assert tables(engine) == TABLES


@pytest.mark.parametrize("commit", [True, False], ids=["committed", "rolled back"])
@pytest.mark.parametrize("wrote", [True, False], ids=["which has written", "which has read"])
def test_in_the_callers_transaction_the_caller_decides(engine: sa.Engine, commit: bool, wrote: bool) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE hosts (id INTEGER)" if wrote else "SELECT 1")
        migrations.upgrade(connection)
        assert connection.in_transaction()
        assert migrations.current(connection) == "0002"
        (connection.commit if commit else connection.rollback)()
    assert tables(engine) == (TABLES if commit else set()) | ({"hosts"} if wrote and commit else set())


def test_a_refusal_in_the_callers_transaction_leaves_only_the_callers_own_writes(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE assets (id INTEGER)")
        with pytest.raises(jobkit.SchemaOutOfDate):
            migrations.upgrade(connection)
        assert connection.exec_driver_sql("SELECT count(*) FROM assets").scalar() == 0
    assert tables(engine) == {"assets"}


def test_a_migration_of_the_hosts_may_call_it_and_goes_on(engine: sa.Engine) -> None:
    from alembic import op

    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        migrations.upgrade(op.get_bind())
        op.create_table("hosts", sa.Column("id", sa.Integer))
    assert tables(engine) == TABLES | {"hosts"}


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
def test_an_engine_in_another_isolation_level_is_migrated_whole_or_not_at_all(empty: Database, level: str) -> None:
    engine = empty.connect(isolation_level=level)
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE asset_intents (id INTEGER)")
        connection.commit()
    with pytest.raises(jobkit.SchemaOutOfDate):
        migrations.upgrade(engine)
    assert tables(empty.engine) == {"asset_intents"}
    with engine.connect() as connection:
        connection.exec_driver_sql("DROP TABLE asset_intents")
        connection.commit()
    migrations.upgrade(engine)
    assert tables(empty.engine) == TABLES


def test_a_connection_in_autocommit_is_refused_on_postgresql(postgresql: sa.Engine) -> None:
    engine = postgresql.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, pytest.raises(jobkit.ConfigurationError, match="AUTOCOMMIT"):
        migrations.upgrade(connection)
    assert tables(postgresql) == set()


# --- several at once, and death in the middle


def child(url: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.migrating", url, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def let_go(children: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Start all at the same moment; the exit status and output of each."""
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in children:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in children]
    return [(process.returncode, *output) for process, output in zip(children, outputs, strict=True)]


def nothing(engine: sa.Engine) -> None:
    """A database without any table."""


PLANTED: dict[str, Callable[[sa.Engine], None]] = {"from nothing": nothing, "onto the seed's tables": seed.plant}


def test_the_seeds_tables_are_there_to_be_adopted(engine: sa.Engine) -> None:
    seed.plant(engine)
    assert {name: len(rows) for name, rows in rows_of(engine).items()} == {
        "agents": 1,
        "assets": 2,
        "companies": 1,
        "content_jobs": 2,
        "issue_attachments": 1,
    }


@pytest.mark.parametrize("start", PLANTED)
def test_six_processes_that_migrate_at_once_all_succeed(empty: Database, start: str) -> None:
    PLANTED[start](empty.engine)
    before = {name: len(rows) for name, rows in rows_of(empty.engine).items()}
    children = [child(empty.url) for _ in range(6)]
    results = let_go(children)
    assert [(status, error) for status, _, error in results if status] == []
    assert tables(empty.engine) >= TABLES
    after = rows_of(empty.engine)
    assert {name: len(after[name]) for name in before} == before
    # Exactly one of them did the work.
    assert sorted(int(out) > 0 for _, out, _ in results) == [False] * 5 + [True]


@pytest.mark.parametrize("start", PLANTED)
def test_a_killed_upgrade_leaves_nothing_half_done(empty: Database, start: str) -> None:
    PLANTED[start](empty.engine)
    before = schema_of(empty.engine), rows_of(empty.engine)
    [(status, out, error)] = let_go([child(empty.url, "die")])
    assert status == 0, error
    assert int(out) > 15
    assert (schema_of(empty.engine), rows_of(empty.engine)) == before
    migrations.upgrade(empty.engine)
    assert tables(empty.engine) >= TABLES


def test_a_table_that_stays_locked_ends_the_upgrade_with_nothing_changed(
    postgresql: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "LOCK_TIMEOUT", "100ms")
    seed.plant(postgresql)
    before = schema_of(postgresql)
    with postgresql.begin() as other:
        other.exec_driver_sql("SELECT * FROM assets")
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            migrations.upgrade(postgresql)
        assert schema_of(postgresql) == before
    migrations.upgrade(postgresql)


def test_the_lock_timeout_of_the_callers_transaction_is_as_before(postgresql: sa.Engine) -> None:
    with postgresql.begin() as connection:
        connection.exec_driver_sql("SET LOCAL lock_timeout = '3s'")
        migrations.upgrade(connection)
        assert connection.exec_driver_sql("SHOW lock_timeout").scalar() == "3s"


# --- the engine


def test_an_sqlite_engine_without_configure_sqlite_can_be_migrated(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'plain.db'}")
    migrations.upgrade(engine)
    assert tables(engine) == TABLES
    migrations.downgrade(engine)
    engine.dispose()


def test_an_sqlite_engine_whose_hook_sends_begin_can_be_migrated(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'recipe.db'}")
    sa.event.listen(engine, "connect", lambda driver, _record: setattr(driver, "isolation_level", None))
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    seed.plant(engine)
    migrations.upgrade(engine)
    assert tables(engine) >= TABLES
    engine.dispose()


@pytest.mark.parametrize("refused", [False, True], ids=["after success", "after an error"])
def test_foreign_keys_are_enforced_again_afterwards(sqlite: sa.Engine, refused: bool) -> None:
    if refused:
        with sqlite.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE assets (id INTEGER)")
    with sqlite.connect() as connection:
        if refused:
            with pytest.raises(jobkit.SchemaOutOfDate):
                migrations.upgrade(connection)
        else:
            migrations.upgrade(connection)
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    assert enforced(sqlite)


def test_a_read_only_database_is_said_to_be_one(empty: Database) -> None:
    if empty.engine.dialect.name == "sqlite":
        engine = sa.create_engine(empty.url.replace("sqlite:///", "sqlite:///file:") + "?mode=ro&uri=true")
        rows_of(empty.engine)  # makes the file
    else:
        engine = empty.connect(connect_args={"options": "-c default_transaction_read_only=on"})
    with pytest.raises(jobkit.ConfigurationError, match=r"refuses to change the schema: .*read-?only"):
        migrations.upgrade(engine)
    engine.dispose()
    assert tables(empty.engine) == set()


def test_a_user_who_may_not_create_tables_is_told_so(postgresql: sa.Engine) -> None:
    role = f"guest_{sa.make_url(str(postgresql.url)).database}"
    with postgresql.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role}; REVOKE ALL ON SCHEMA public FROM PUBLIC;")
        connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA public TO {role}")
    try:
        with postgresql.connect() as connection:
            connection.exec_driver_sql(f"SET SESSION AUTHORIZATION {role}")
            connection.commit()
            with pytest.raises(jobkit.ConfigurationError, match="permission denied for schema public"):
                migrations.upgrade(connection)
            connection.invalidate()
    finally:
        with postgresql.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert tables(postgresql) == set()


@pytest.mark.parametrize("call", [migrations.upgrade, migrations.downgrade, migrations.current])
def test_what_cannot_be_migrated_is_said_to_be_so(call: Callable[[Any], Any], sqlite: sa.Engine) -> None:
    with pytest.raises(jobkit.ConfigurationError, match="Engine or Connection, not Session"):
        call(Session(sqlite))
    other = sa.create_engine("sqlite://")
    other.dialect.name = "mysql"
    with pytest.raises(jobkit.ConfigurationError, match="not on mysql"):
        call(other)
    with pytest.raises(jobkit.ConfigurationError, match="SQLite has no schemas"):
        call(sqlite, schema="jobs")  # type: ignore[call-arg]
