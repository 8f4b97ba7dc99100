"""Which log an engine leads to: two addresses may be one, one address may be two, and the database is asked once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Job, JobStore, Relay, Runner, sse
from jobkit.db.logs import known_log, log_of
from jobkit.events import hub, relay
from tests.support.databases import Database, SqliteDatabase
from tests.support.postgres import start_own_server
from tests.support.recorder import Recorder
from tests.support.runners import only
from tests.support.sent import hearing

Engine = Callable[..., sa.Engine]


@pytest.fixture
def engine_on() -> Iterator[Engine]:
    """Makes engines that are closed after the test."""
    with ExitStack() as stack:

        def make(url: object, **options: Any) -> sa.Engine:
            engine = sa.create_engine(str(url) if isinstance(url, Path) else url, **options)  # type: ignore[call-overload]
            if engine.dialect.name == "sqlite":
                jobkit.configure_sqlite(engine)
            stack.callback(engine.dispose)
            return engine

        yield make


def create(engine: sa.Engine) -> Job:
    with Session(engine) as session, session.begin():
        return JobStore(session).create("acme", job_type="note")


# --- one address, two logs


@pytest.fixture(params=["search path", "translated", "of the role"])
def schemas(
    request: pytest.FixtureRequest, postgres_database: Database, engine_on: Engine
) -> Iterator[list[sa.Engine]]:
    """Two engines on one database whose tables are in two schemas."""
    plain, names = postgres_database.engine, ("t1", "t'2")
    quoted = [plain.dialect.identifier_preparer.quote_identifier(name) for name in names]
    for name in names:
        jobkit.migrations.upgrade(plain, schema=name)
    url = sa.make_url(postgres_database.url)
    roles = [f"{url.database}_{number}" for number in range(2)]
    if request.param == "translated":
        yield [plain.execution_options(schema_translate_map={None: name}) for name in names]
    elif request.param == "search path":
        made = [engine_on(url) for _ in names]
        for engine, name in zip(made, quoted, strict=True):
            sa.event.listen(
                engine,
                "connect",
                lambda driver, _, name=name: driver.execute(f"SET search_path = {name}") and driver.commit(),
            )
        yield made
    else:
        with plain.begin() as connection:
            for role, name in zip(roles, quoted, strict=True):
                connection.exec_driver_sql(f"CREATE ROLE {role} SUPERUSER LOGIN")
                connection.exec_driver_sql(f"ALTER ROLE {role} SET search_path = {name}")
        yield [engine_on(url.set(username=role)) for role in roles]
        with plain.begin() as connection:
            for role in roles:
                connection.exec_driver_sql(f"DROP ROLE {role}")


def test_two_schemas_of_one_database_are_two_logs(schemas: list[sa.Engine], tmp_path: Path, recorder: Recorder) -> None:
    assert len({log_of(engine) for engine in schemas}) == 2
    jobs = [[create(engine) for _ in range(5)] for engine in schemas]
    with ExitStack() as stack:
        for number, engine in enumerate(schemas):
            stack.enter_context(Runner(engine, AssetStore(tmp_path / str(number)), only()))
        recorder.wait(lambda types: types.count("done") == 10)
    assert [recorder.types(job.id) for found in jobs for job in found] == [["running", "done"]] * 10


def test_a_stream_hears_of_its_own_schema_alone(schemas: list[sa.Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "POLL", 600.0)
    streams = [sse.stream(engine, "acme") for engine in schemas]
    for stream in streams:
        next(stream)
        next(stream)
    for _ in range(2):
        jobs = [create(engine) for engine in schemas]
        told = [next(stream) for stream in streams]
        assert [str(job.id).encode() in piece for job, piece in zip(jobs, told, strict=True)] == [True, True]
        assert [str(job.id).encode() in piece for job, piece in zip(jobs[::-1], told, strict=True)] == [False, False]
    for stream in streams:
        stream.close()


def test_two_files_are_two_logs_though_a_link_leads_to_either(tmp_path: Path, engine_on: Engine) -> None:
    databases = [SqliteDatabase(tmp_path / name) for name in ("a.db", "b.db")]
    link, engine = tmp_path / "host.db", engine_on(f"sqlite:///{tmp_path / 'host.db'}")
    found = []
    for database in databases:
        link.unlink(missing_ok=True)
        link.symlink_to(database.url.removeprefix("sqlite:///"))
        found.append(log_of(engine))
        engine.dispose()
    assert found == [log_of(database.engine) for database in databases]
    assert len(set(found)) == 2
    for database in databases:
        database.close()


# --- two addresses, one log


def spelled(database: Database, engine_on: Engine, tmp_path: Path) -> list[sa.Engine]:
    url = sa.make_url(database.url)
    if url.drivername == "sqlite":
        file = Path(url.database or "")
        (tmp_path / "link.db").symlink_to(file)
        import sqlite3

        return [
            engine_on(f"sqlite:///{tmp_path / 'link.db'}"),
            engine_on(f"sqlite:///{os.path.relpath(file)}"),
            engine_on(f"sqlite:///file:{file}?uri=true"),
            engine_on(
                "sqlite://", creator=lambda: sqlite3.connect(file, check_same_thread=False), poolclass=sa.QueuePool
            ),
        ]
    import psycopg

    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with database.engine.connect() as connection:
        folder = connection.exec_driver_sql("SHOW unix_socket_directories").scalar_one().split(",")[0]
    return [
        engine_on(url.update_query_dict({"application_name": "web"})),
        engine_on(url, connect_args={"application_name": "worker"}),
        engine_on(url.set(host="localhost")),
        engine_on(url.set(host=None).update_query_dict({"host": folder})),
        engine_on(url, pool_size=1, max_overflow=0),
        engine_on("postgresql+psycopg://", creator=lambda: psycopg.connect(plain)),
    ]


def test_however_a_database_is_addressed_it_is_one_log_and_told_once(
    database: Database, engine_on: Engine, tmp_path: Path, recorder: Recorder
) -> None:
    engines = [database.engine, *spelled(database, engine_on, tmp_path)]
    assert len({log_of(engine) for engine in engines}) == 1
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(Relay(engine))
        assert len(relay._shared.feeds) == 1
        jobs = [create(engine) for engine in engines]
        recorder.wait(lambda types: len(types) == len(engines))
        last = Runner(engines[-1], AssetStore(tmp_path / "assets"), only()).submit("acme", job_type="note")
        assert recorder.types(last.id) == ["queued"]
    assert [event.job_id for event in recorder.events] == [job.id for job in [*jobs, last]]
    assert relay._shared.feeds == {}


def test_two_servers_are_two_logs(postgres_database: Database, engine_on: Engine) -> None:
    with closing(_Stopped(start_own_server())) as other:
        engine = engine_on(other.server.url)
        jobkit.migrations.upgrade(engine)
        assert log_of(engine) != log_of(postgres_database.engine)
        engine.dispose()


class _Stopped:
    def __init__(self, server: Any) -> None:
        self.server = server

    def close(self) -> None:
        self.server.stop()


# --- asked once


def test_the_database_is_asked_once_for_each_engine(database: Database) -> None:
    engine, asked = database.engine, []

    def hear(_: object, statement: str, __: object) -> None:
        if "database_list" in statement or "to_regclass" in statement or "pg_control_system" in statement:
            asked.append(statement)

    with hearing(engine, hear):
        for _ in range(3):
            with Relay(engine):
                sse.stream(engine, "acme").close()
                create(engine)
    assert len(asked) <= 3


def test_an_engine_that_is_disposed_of_is_asked_anew_and_lets_go_of_the_feed_it_had(
    sqlite_database: Database, tmp_path: Path
) -> None:
    engine = sqlite_database.engine
    with Relay(engine):
        before = log_of(engine)
        engine.dispose()
        assert known_log(engine) == before
        os.rename(tmp_path / "host.db", tmp_path / "kept.db")
        engine.dispose()
        jobkit.migrations.upgrade(engine)
        assert log_of(engine) != before
        assert relay.running_feed(engine) is None
    assert relay._shared.feeds == {}


def test_a_database_without_the_tables_is_named_wherever_a_log_is_asked_for(database: Database) -> None:
    jobkit.migrations.downgrade(database.engine)
    for call in (lambda: log_of(database.engine), lambda: sse.stream(database.engine, "acme")):
        with pytest.raises(jobkit.SchemaOutOfDate, match="run jobkit migrate"):
            call()
