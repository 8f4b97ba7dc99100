"""SQLite engines: when a transaction begins, which engines are refused, which thread holds the write lock."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

import jobkit
from jobkit import ConfigurationError, JobStore, configure_sqlite
from jobkit.base.ids import new_id
from jobkit.db.sqlite import is_memory, is_write, writing_in_this_thread
from jobkit.tables import metadata
from tests.support import notes
from tests.support.databases import Database
from tests.support.notes import NOTES

engine = notes.engine


@pytest.fixture
def statements(sqlite_database: Database) -> list[str]:
    """Every statement that reaches SQLite on connections opened from now on, sqlite3's own BEGINs too."""
    seen: list[str] = []
    sqlite_database.engine.dispose()
    sa.event.listen(sqlite_database.engine, "connect", lambda driver, _: driver.set_trace_callback(seen.append))
    return seen


def in_transaction(connection: sa.Connection) -> bool:
    driver: Any = connection.connection.driver_connection
    return bool(driver.in_transaction)


def pragmas(engine: sa.Engine) -> tuple[Any, ...]:
    with engine.connect() as connection:
        return tuple(
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "busy_timeout", "synchronous")
        )


# --- is_write


WRITES = """
INSERT INTO t VALUES (1)
insert or ignore into t values (1)
REPLACE INTO t VALUES (1)
UPDATE t SET a = 1
DELETE FROM t
CREATE TABLE t (a)
DROP TABLE t
ALTER TABLE t ADD b
ANALYZE
REINDEX
SAVEPOINT s
WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x
WITH x AS (SELECT 1) DELETE FROM t RETURNING a
with recursive x as (select 1) update t set a = 1
""".strip().splitlines()
READS = """
SELECT 1
select * from t where a = 'INSERT'
VALUES (1), (2)
WITH x AS (SELECT 1) SELECT * FROM x
EXPLAIN QUERY PLAN DELETE FROM t
PRAGMA table_info(t)
BEGIN
COMMIT
END
ROLLBACK TO s
RELEASE s
ATTACH 'x' AS y
DETACH y
VACUUM
""".strip().splitlines()


@pytest.mark.parametrize("before", ["", " \n\t", "-- INSERT\n", "/* SELECT\n; */ ", ";;", "( ", "--a\n/**//**/ \n("])
def test_a_write_is_known_by_its_first_word_behind_blanks_comments_and_parentheses(before: str) -> None:
    assert [statement for statement in WRITES if not is_write(before + statement)] == []
    assert [statement for statement in READS if is_write(before + statement)] == []


@pytest.mark.parametrize("statement", ["", " ", "-- nothing", "/* open", "; ;", "?", "123"])
def test_what_is_no_statement_is_no_write(statement: str) -> None:
    assert not is_write(statement)


# --- the transaction begins at the first write or savepoint


def savepoint(connection: sa.Connection) -> None:
    with connection.begin_nested():
        connection.execute(NOTES.insert(), {"title": "a"})


def flush(connection: sa.Connection) -> None:
    with Session(connection, join_transaction_mode="rollback_only") as session:
        session.bulk_insert_mappings(sa.orm.registry().map_imperatively(type("Note", (), {}), NOTES), [{"title": "a"}])
        session.flush()


OPERATIONS: dict[str, Callable[[sa.Connection], object]] = {
    "insert": lambda c: c.execute(NOTES.insert(), {"title": "a"}),
    "executemany": lambda c: c.execute(NOTES.insert(), [{"title": "a"}, {"title": "b"}]),
    "returning": lambda c: c.execute(NOTES.insert().returning(NOTES.c.id), [{"title": "a"}, {"title": "b"}]).all(),
    "text": lambda c: c.execute(sa.text("\n -- why\n/* not */ INSERT INTO host_notes (title) VALUES (:t)"), {"t": "a"}),
    "driver": lambda c: c.exec_driver_sql("REPLACE INTO host_notes VALUES (1, 'a')"),
    "driver many": lambda c: c.exec_driver_sql("INSERT INTO host_notes VALUES (?, ?)", [(1, "a"), (2, "b")]),
    "cte": lambda c: c.exec_driver_sql("WITH x AS (SELECT 'a' AS t) INSERT INTO host_notes (title) SELECT t FROM x"),
    "savepoint": savepoint,
    "flush": flush,
    "ddl": lambda c: c.exec_driver_sql("CREATE TABLE other (id INTEGER)"),
    "job": lambda c: JobStore(c).create("acme", job_type="note"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_begin_immediate_is_sent_once_before_the_first_write_and_rollback_undoes_it(
    engine: sa.Engine, statements: list[str], name: str
) -> None:
    with engine.connect() as connection:
        statements.clear()
        before = connection.execute(sa.select(NOTES)).all()
        assert not in_transaction(connection)
        OPERATIONS[name](connection)
        assert in_transaction(connection)
        connection.execute(NOTES.insert(), {"title": "last"})
        begins = [number for number, sql in enumerate(statements) if sql.startswith("BEGIN")]
        assert [statements[number] for number in begins] == ["BEGIN IMMEDIATE"]
        assert [is_write(sql) for sql in statements[: begins[0] + 2]] == [False, False, True]
        connection.rollback()
        assert not in_transaction(connection)
        assert connection.execute(sa.select(NOTES)).all() == before == []
        assert JobStore(connection).list_by_company("acme") == []
        assert not sa.inspect(connection).has_table("other")


# --- configure_sqlite


def test_the_pragmas_are_set_also_on_pooled_connections_and_the_last_call_counts(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'host.db'}")
    assert pragmas(engine) == ("delete", 5000, 2)
    configure_sqlite(engine)
    assert pragmas(engine) == ("wal", 10_000, 2)
    configure_sqlite(engine, busy_timeout=timedelta(seconds=3), synchronous="NORMAL")
    configure_sqlite(engine, busy_timeout=0.5, synchronous="NORMAL")
    assert pragmas(engine) == ("wal", 500, 1)
    with engine.connect() as one, engine.connect() as two:
        assert one.connection.driver_connection is not two.connection.driver_connection
    assert pragmas(engine) == ("wal", 500, 1)
    engine.dispose()


def test_a_view_of_an_engine_configures_the_engine(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'host.db'}")
    view = engine.execution_options(logging_token="view")
    configure_sqlite(view)
    metadata.create_all(engine)
    for each in (engine, view, engine.execution_options(schema_translate_map={None: None})):
        with each.connect() as connection:
            with connection.begin_nested():
                JobStore(connection).create("acme", job_type="note")
            assert writing_in_this_thread(engine)
            connection.rollback()
            assert JobStore(connection).list_by_company("acme") == []
    engine.dispose()


def test_other_engines_and_values_are_refused(postgres_database: Database, engine: sa.Engine) -> None:
    for wrong in (postgres_database.engine, "sqlite://", None, engine.url):
        with pytest.raises(ConfigurationError, match=r"^configure_sqlite takes an SQLite engine, not "):
            configure_sqlite(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^synchronous must be FULL, NORMAL or EXTRA, not 'OFF'$"):
        configure_sqlite(engine, synchronous="OFF")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^busy_timeout must be at least zero and finite, not -1$"):
        configure_sqlite(engine, busy_timeout=-1)


HELP = r"not set up for jobkit: call jobkit\.configure_sqlite\(engine\) after create_engine$"


def test_an_engine_that_is_not_configured_is_refused_with_the_line_that_helps(
    engine: sa.Engine, disk: jobkit.AssetStore
) -> None:
    bare = sa.create_engine(engine.url)
    with bare.connect() as connection:
        jobs = JobStore(connection)
        assert jobs.list_by_company("acme") == []
        with pytest.raises(ConfigurationError, match=HELP):
            jobs.create("acme", job_type="note")
        with pytest.raises(ConfigurationError, match=HELP):
            jobs.transition(new_id(), status="done")
    with pytest.raises(ConfigurationError, match=HELP):
        jobkit.Runner(bare, disk, jobkit.Renderers())
    with pytest.raises(ConfigurationError, match=HELP):
        jobkit.Relay(bare)
    bare.dispose()


def autocommit(engine: sa.Engine) -> sa.Engine:
    return sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")


def recipe(engine: sa.Engine) -> sa.Engine:
    """SQLAlchemy's older documented way to correct savepoints, which begins DEFERRED at the first read."""
    made = sa.create_engine(engine.url)
    sa.event.listen(made, "connect", lambda driver, _: setattr(driver, "isolation_level", None))
    sa.event.listen(made, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return made


@pytest.mark.parametrize("make", [autocommit, recipe])
@pytest.mark.parametrize("late", [False, True])
def test_an_engine_that_begins_otherwise_is_refused(
    engine: sa.Engine, disk: jobkit.AssetStore, make: Callable[[sa.Engine], sa.Engine], late: bool
) -> None:
    other = make(engine)
    if late:
        other.connect().close()  # a connection is in the pool already
    configure_sqlite(other)
    message = r"AUTOCOMMIT, or a hook sets isolation_level = None: .*configure_sqlite\(engine\)"
    with other.connect() as connection, pytest.raises(ConfigurationError, match=message):
        JobStore(connection).create("acme", job_type="note")
    runner = jobkit.Runner(other, disk, jobkit.Renderers())
    for start in (runner.start, runner.run_until_idle, jobkit.Relay(other).start):
        with pytest.raises(ConfigurationError, match=message):
            start()
    other.dispose()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sqlite3 has no autocommit= before Python 3.12")
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_the_newer_transaction_control_of_sqlite3_is_refused(tmp_path: Path, driver: str, value: bool) -> None:
    url, options = f"{driver}:///{tmp_path / 'host.db'}", {"autocommit": value}
    message = r"remove autocommit= from connect_args$"
    if driver == "sqlite":
        engine = sa.create_engine(url, connect_args=options)
        configure_sqlite(engine)
        with pytest.raises(ConfigurationError, match=message):
            engine.connect()
        engine.dispose()
        return

    async def connect() -> None:
        engine = create_async_engine(url, connect_args=options)
        configure_sqlite(engine)
        with pytest.raises(ConfigurationError, match=message):
            await engine.connect()
        await engine.dispose()

    asyncio.run(connect())


@pytest.mark.parametrize("level", ["IMMEDIATE", "DEFERRED"])
def test_sqlite3s_own_isolation_levels_change_nothing(sqlite_database: Database, engine: sa.Engine, level: str) -> None:
    other = sqlite_database.connect(connect_args={"isolation_level": level})
    with other.connect() as connection:
        with connection.begin_nested():
            JobStore(connection).create("acme", job_type="note")
        connection.rollback()
        assert JobStore(connection).list_by_company("acme") == []


# --- which thread holds the write lock


ENDS: dict[str, Callable[[sa.Connection], object]] = {
    "commit": lambda c: c.commit(),
    "rollback": lambda c: c.rollback(),
    "close": lambda c: c.close(),
    "invalidate": lambda c: c.invalidate(),
    "detach": lambda c: (c.detach(), c.close()),
    "driver": lambda c: c.connection.driver_connection.rollback(),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("end", ENDS)
def test_a_thread_holds_the_lock_from_its_first_write_to_the_end_of_its_transaction(
    engine: sa.Engine, sqlite_database: Database, end: str
) -> None:
    other = sqlite_database.connect()
    linked = Path(f"{engine.url.database}.link")
    linked.symlink_to(Path(engine.url.database or ""))
    spellings = [engine, other, sa.create_engine(f"sqlite:///{linked}")]
    spellings.append(sa.create_engine(f"sqlite:///file:{engine.url.database}?uri=true"))
    assert not writing_in_this_thread(engine)
    connection = engine.connect()
    connection.execute(sa.select(NOTES)).all()
    assert not writing_in_this_thread(engine)
    connection.begin_nested()
    assert [writing_in_this_thread(each) for each in spellings] == [True] * 4
    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(writing_in_this_thread, engine).result()
    ENDS[end](connection)
    assert [writing_in_this_thread(each) for each in spellings] == [False] * 4
    with ThreadPoolExecutor(1) as pool, other.connect() as elsewhere:  # the lock is free, and another thread takes it
        pool.submit(elsewhere.execute, NOTES.insert(), {"title": "a"}).result()
        assert not writing_in_this_thread(engine)
        assert pool.submit(writing_in_this_thread, engine).result()
    connection.close()
    for each in spellings[2:]:
        each.dispose()


def test_submit_within_a_transaction_that_has_written_says_so_instead_of_hanging(
    engine: sa.Engine, disk: jobkit.AssetStore
) -> None:
    runner = jobkit.Runner(engine, disk, jobkit.Renderers())
    with Session(engine) as session:
        assert JobStore(session).list_by_company("acme") == []
        job = runner.submit("acme", job_type="note")  # reading is no obstacle
        JobStore(session).create("acme", job_type="note")
        with pytest.raises(ConfigurationError, match=r"use JobStore\(session\)\.create in it"):
            runner.submit("acme", job_type="note")
        session.rollback()
        assert [found.id for found in JobStore(session).list_by_company("acme")] == [job.id]


# --- in memory, and asynchronous


def test_a_database_in_memory_has_transactions_too_and_each_its_own_lock() -> None:
    one, two = sa.create_engine("sqlite://"), sa.create_engine("sqlite:///:memory:")
    for engine in (one, two):
        assert is_memory(engine)
        configure_sqlite(engine)
        metadata.create_all(engine)
    with one.connect() as connection:
        with connection.begin_nested():
            JobStore(connection).create("acme", job_type="note")
        assert (writing_in_this_thread(one), writing_in_this_thread(two)) == (True, False)
        connection.rollback()
        assert JobStore(connection).list_by_company("acme") == []
    one.dispose()
    two.dispose()


@pytest.mark.parametrize("name", ["file::memory:?cache=shared", "file:jobs?mode=memory&cache=shared"])
def test_a_shared_cache_in_memory_keeps_savepoints_right(name: str) -> None:
    engine = sa.create_engine(f"sqlite:///{name}&uri=true", poolclass=QueuePool)
    configure_sqlite(engine)
    assert is_memory(engine)
    with engine.connect() as keep:
        metadata.create_all(engine)
        with Session(engine) as session:
            with session.begin_nested():
                JobStore(session).create("acme", job_type="note")
            session.rollback()
            kept = JobStore(session).create("acme", job_type="note")
            session.commit()
        assert JobStore(keep).list_by_company("acme") == [kept]
    engine.dispose()


def test_an_asynchronous_engine_keeps_the_same_promises(sqlite_database: Database) -> None:
    async def story() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{sqlite_database.engine.url.database}")
        configure_sqlite(engine, busy_timeout=0.2)
        configure_sqlite(engine, busy_timeout=0.2)
        async with AsyncSession(engine) as session:
            assert await session.run_sync(lambda s: JobStore(s).list_by_company("acme")) == []
            assert not await session.run_sync(lambda s: in_transaction(s.connection()))
            async with session.begin_nested():
                await session.run_sync(lambda s: JobStore(s).create("acme", job_type="note"))
            assert await session.run_sync(lambda s: in_transaction(s.connection()))
            assert writing_in_this_thread(sqlite_database.engine)
            async with AsyncSession(engine) as other:
                with pytest.raises(sa.exc.OperationalError, match="database is locked"):
                    await other.run_sync(lambda s: JobStore(s).create("acme", job_type="note"))
            await session.rollback()
            assert not writing_in_this_thread(sqlite_database.engine)
            kept = await session.run_sync(lambda s: JobStore(s).create("acme", job_type="note"))
            await session.commit()
            assert await session.run_sync(lambda s: JobStore(s).list_by_company("acme")) == [kept]
        await engine.dispose()

    asyncio.run(story())


def test_an_asynchronous_session_is_refused_with_the_call_that_works(sqlite_database: Database) -> None:
    async def story() -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{sqlite_database.engine.url.database}")
        scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        async with AsyncSession(engine) as session, engine.connect() as connection:
            for host in (session, scoped, connection):
                with pytest.raises(TypeError, match=r"await session\.run_sync\(lambda s: JobStore\(s\)\.create"):
                    JobStore(host).create("acme", job_type="note")  # type: ignore[arg-type]
        await scoped.remove()
        await engine.dispose()

    asyncio.run(story())
