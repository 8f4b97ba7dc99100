"""What hosts lend: engines, sessions, connections, set up in ways of their own. They serve, or are refused at once with
the line that helps.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import jobkit
import jobkit.testing
from jobkit import AssetStore, ConfigurationError, JobRequest, JobStore, Runner
from jobkit.tables import content_job_events, content_jobs
from tests.support.databases import Database
from tests.support.runners import only, seen, statuses, until
from tests.support.unmigrated import run

RIGHT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def stored(assets: AssetStore) -> jobkit.StoredObject:
    return assets.put_file("acme", original_filename="a.txt", content_type="text/plain", body=b"x")


# --- AUTOCOMMIT


def by_option(database: Database) -> sa.Engine:
    return database.connect(isolation_level="AUTOCOMMIT")


def by_view(database: Database) -> sa.Engine:
    return database.engine.execution_options(isolation_level="AUTOCOMMIT")


def by_hook(database: Database) -> sa.Engine:
    engine = database.connect()
    sa.event.listen(engine, "connect", lambda driver, _: setattr(driver, "autocommit", True))
    return engine


@pytest.mark.parametrize("make", [by_option, by_view, by_hook])
def test_whatever_commits_by_itself_is_refused_by_everything(
    postgres_database: Database, tmp_path: Path, make: Callable[[Database], sa.Engine]
) -> None:
    right = AssetStore(tmp_path / "assets", engine=postgres_database.engine)
    with postgres_database.engine.begin() as connection:
        kept = right.create(connection, "acme", stored(right), source_task_id=None)
    free = stored(right)
    engine, refused = make(postgres_database), pytest.raises(ConfigurationError, match="AUTOCOMMIT")
    with engine.connect() as connection:
        for write in (
            lambda: JobStore(connection).create("acme", job_type="note"),
            lambda: JobStore(connection).create_many("acme", [JobRequest("note")]),
            lambda: right.create(connection, "acme", free, source_task_id=None),
            lambda: right.delete(connection, kept),
            lambda: jobkit.testing.inline(connection, right, only()),
        ):
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                write()
    with refused, Runner(engine, right, only()):
        pass
    with refused:
        Runner(engine, right, only()).run_until_idle(60)
    with refused, jobkit.Relay(engine):
        pass
    with postgres_database.engine.connect() as connection:
        assert JobStore(connection).list_by_company("acme") == []
        assert [one.id for one in right.list_by_company(connection, "acme")] == [kept.id]


# --- JSON


def decimals(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)


def plain(value: Any) -> str:
    """As text, because ``Decimal("1.5") == 1.5``; PostgreSQL does not keep the order of keys."""
    return json.dumps(value, sort_keys=True)


def refused_dump(value: Any) -> str:
    raise AssertionError("the host's serializer was asked")


def test_jobkits_json_is_its_own_whatever_the_host_decodes_by(
    database: Database, tmp_path: Path, recorder: Any
) -> None:
    engine = database.connect(json_deserializer=decimals, json_serializer=refused_dump)
    assets, given = AssetStore(tmp_path / "assets", engine=engine), {"price": 1.5, "list": [0.25, {"a": None}]}
    got: list[Any] = []

    def render(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        got.append(ctx.input)
        ctx.progress(0.5, "half")
        return jobkit.Rendered("a.txt", "text/plain", b"x")

    for _ in range(2):  # the second finds the first, and compares
        with Session(engine) as session, session.begin():
            job = JobStore(session).create("acme", job_type="note", input=given, idempotency_key="k")
    assert Runner(engine, assets, only(render)).run_until_idle(60) == 1
    assert plain(got) == plain([given])
    with Session(engine) as session:
        found = JobStore(session).get_by_id(job.id)
        assert found is not None
        assert plain(found.input) == plain(given)
        payloads = session.scalars(sa.select(content_job_events.c.payload)).all()
    assert "Decimal" not in repr([payloads, [event.payload for event in recorder.events]])
    assert [state.type for state in jobkit.watch(engine, job.id, timeout=60)]
    with engine.begin() as connection:  # a row of the host's own making
        row = {"id": jobkit.base.ids.new_id(), "company_id": "acme", "job_type": "note", "input": given}
        connection.execute(content_jobs.insert().values(row))
        assert JobStore(connection).get_by_id(row["id"]).input == given  # type: ignore[union-attr]


# --- times


def naive(engine: sa.Engine) -> None:
    """As Django has it with USE_TZ = False: times without their zone, which is the connection's."""
    from psycopg.types.datetime import TimestamptzLoader

    class Naive(TimestamptzLoader):
        def load(self, data: Any) -> datetime:
            return super().load(data).replace(tzinfo=None)

    sa.event.listen(engine, "connect", lambda driver, _: driver.adapters.register_loader("timestamptz", Naive))


def test_times_of_a_connection_that_leaves_out_its_zone_are_right(postgres_database: Database) -> None:
    engine = postgres_database.connect(connect_args={"options": "-c timezone=Europe/Berlin"})
    naive(engine)
    with engine.begin() as connection:
        jobs = JobStore(connection)
        made = [jobs.create("acme", job_type="note", run_at=RIGHT + timedelta(days=n)) for n in range(3)]
        assert [job.run_at for job in jobs.list_by_company("acme")] == [job.run_at for job in reversed(made)]
        assert [job.created_at for job in jobs.list_by_company("acme")] == [job.created_at for job in reversed(made)]
        # Each page begins after the one before it.
        page, pages = None, []
        while (found := jobs.list_by_company("acme", limit=1, before=page)) and len(pages) < 4:
            [page] = found
            pages.append(page.id)
        assert pages == [job.id for job in reversed(made)]
        assert jobs.cancel(made[0].id).run_at == RIGHT


# --- routing, two phases


def test_a_session_that_routes_writes_to_its_leader(database: Database, tmp_path: Path) -> None:
    leader, follower = database.engine, database.connect()

    @sa.event.listens_for(follower, "before_cursor_execute")
    def read_only(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        assert not statement.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE", "WITH")), statement

    class Routing(Session):
        """As SQLAlchemy's documentation has it."""

        def get_bind(self, mapper: Any = None, clause: Any = None, **kw: Any) -> Any:
            return leader if self._flushing or isinstance(clause, sa.Update | sa.Delete) else follower

    assets = AssetStore(tmp_path / "assets", engine=leader)
    made = stored(assets)
    for host in (Routing(), scoped_session(sessionmaker(class_=Routing))):
        jobs = JobStore(host)
        job = jobs.create("acme", job_type="note")
        jobs.create_many("acme", [JobRequest("note")])
        jobs.cancel(job.id)  # read where it was written
        jobs.retry(job.id)
        jobs.transition(job.id, status="running")
        if isinstance(host, Routing):
            assets.delete(host, assets.create(host, "acme", made, source_task_id=None))
        assert jobs.get_by_id(job.id) is None  # the follower has not heard of it
        host.commit()
        host.close()
    assert statuses(leader) == ["running", "queued"] * 2


def test_two_phase_transactions_are_not_notified_and_commit(postgres: Any) -> None:
    # A server that prepares no transactions still refuses first one that has notified.
    engine = sa.create_engine(postgres.create_database())
    try:
        jobkit.migrations.upgrade(engine)
        statements: list[str] = []
        sa.event.listen(
            engine, "before_cursor_execute", lambda c, cursor, statement, *rest: statements.append(statement)
        )
        with Session(engine, twophase=True) as session:
            jobs = JobStore(session)
            job = jobs.create("acme", job_type="note")
            jobs.create("acme", job_type="note", idempotency_key="k")
            jobs.create_many("acme", [JobRequest("note")] * 2)
            jobs.cancel(job.id)
            session.rollback()
        assert statements
        assert not [one for one in statements if "pg_notify" in one]
        with Session(engine) as session:
            JobStore(session).create("acme", job_type="note")
        assert "pg_notify" in statements[-1]
    finally:
        engine.dispose()
        postgres.drop_database(str(engine.url.render_as_string(hide_password=False)))


# --- rows that are not there


@pytest.fixture
def hiding(postgres_database: Database) -> Iterator[sa.Engine]:
    """A role that sees only jobs without a task, changes only those of type ``note``, and may insert all."""
    role, engine = f"guest_{sa.make_url(postgres_database.url).database}", postgres_database.engine
    run(
        engine,
        f"CREATE ROLE {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        "ALTER TABLE content_jobs ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY seen ON content_jobs FOR SELECT TO {role} USING (source_task_id IS NULL)",
        f"CREATE POLICY changed ON content_jobs FOR UPDATE TO {role} USING (job_type = 'note')",
        f"CREATE POLICY made ON content_jobs FOR INSERT TO {role} WITH CHECK (true)",
    )
    guest = postgres_database.connect(connect_args={"options": f"-c role={role}"})
    yield guest
    guest.dispose()
    run(engine, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_a_row_that_a_policy_hides_ends_in_an_error_that_says_so(
    hiding: sa.Engine, postgres_database: Database
) -> None:
    with postgres_database.engine.begin() as connection:
        JobStore(connection).create("acme", job_type="other", idempotency_key="k", source_task_id="mine")
        fixed = JobStore(connection).create("acme", job_type="fixed")
    with hiding.connect() as connection:
        jobs = JobStore(connection)
        with pytest.raises(ConfigurationError, match=r"type 'other' has this idempotency_key.* row-level security"):
            jobs.create("acme", job_type="other", idempotency_key="k")
        with pytest.raises(ConfigurationError, match=rf"job {fixed.id} is there.* row-level security"):
            jobs.cancel(fixed.id)
        made = jobs.create("acme", job_type="note")
        assert jobs.cancel(made.id).status == "cancelled"


LEAVES_OUT = {
    "sqlite": [
        "CREATE TRIGGER leave BEFORE INSERT ON content_jobs WHEN NEW.job_type = 'out' "
        "BEGIN SELECT RAISE(IGNORE); END"
    ],
    "postgresql": [
        "CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN IF NEW.job_type = 'out' THEN RETURN NULL; END IF; RETURN NEW; END$$",
        "CREATE TRIGGER leave BEFORE INSERT ON content_jobs FOR EACH ROW EXECUTE FUNCTION leave()",
    ],
}  # fmt: skip


def test_a_job_that_a_trigger_leaves_out_is_an_error_and_has_no_event(engine: sa.Engine) -> None:
    run(engine, *LEAVES_OUT[engine.dialect.name])
    with engine.begin() as connection:
        jobs = JobStore(connection)
        for key in (None, "k"):
            with pytest.raises(ConfigurationError, match=r"trigger|may not see it"):
                jobs.create("acme", job_type="out", idempotency_key=key)
        with pytest.raises(ConfigurationError, match="trigger"):
            jobs.create_many("acme", [JobRequest("out"), JobRequest("note")])
    with engine.connect() as connection:
        told = set(connection.scalars(sa.select(content_job_events.c.job_id)))
        assert told == set(connection.scalars(sa.select(content_jobs.c.id)))


# --- SQLite: listeners, odd files


@pytest.mark.parametrize("comment", ["{} /*x*/", "/*x*/ {}"])
def test_a_listener_that_comments_statements_changes_nothing(sqlite_database: Database, comment: str) -> None:
    engine = sqlite_database.connect()

    def commented(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> Any:
        return comment.format(statement), parameters

    sa.event.listen(engine, "before_cursor_execute", commented, retval=True)
    with engine.begin() as connection:
        JobStore(connection).create_many("acme", [JobRequest("note")] * 5)
    with Session(engine) as session:
        for number, _ in enumerate(session.execute(sa.select(content_jobs.c.id))):
            with sqlite_database.engine.begin() as other:  # commits while the result is half read
                JobStore(other).create("globex", job_type="note")
            if number == 0:
                JobStore(session).create("acme", job_type="note")
                session.commit()


def test_a_file_system_without_the_write_ahead_log_is_refused_and_named(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///file:{tmp_path}/odd.db?vfs=unix-dotfile&uri=true")
    jobkit.configure_sqlite(engine)
    with pytest.raises(ConfigurationError, match="journal_mode delete instead of the write-ahead log"):
        engine.connect()
    engine.dispose()


def test_a_file_that_may_only_be_read_is_sqlalchemys_error(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a.db") as made:
        made.execute("CREATE TABLE t (a)")
    made.close()
    engine = sa.create_engine(f"sqlite:///file:{tmp_path}/a.db?mode=ro&uri=true")
    jobkit.configure_sqlite(engine)
    with pytest.raises(sa.exc.OperationalError, match="readonly"):
        engine.connect()
    engine.dispose()


def test_an_engine_with_a_creator_is_the_file_that_it_opens(tmp_path: Path) -> None:
    file = tmp_path / "created.db"
    engine = sa.create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(file, check_same_thread=False), poolclass=sa.QueuePool
    )
    jobkit.configure_sqlite(engine)
    jobkit.migrations.upgrade(engine)
    assets = AssetStore(tmp_path / "assets", engine=engine)
    with Runner(engine, assets, only()) as runner:
        job = runner.submit("acme", job_type="note")
        until(lambda: seen(engine, job).status == "done")
    with engine.begin() as connection:
        JobStore(connection).create("acme", job_type="note")
        with pytest.raises(ConfigurationError, match="call put_file before"):
            stored(assets)
    engine.dispose()


# --- SQLite: a connection that Django lends


class Lender:
    """A connection as Django has it, and an engine that hands it on: it commits nothing, and closes nothing."""

    def __init__(self, file: Path | str, begin: str, *, timeout: float = 5, wal: bool = True) -> None:
        self.driver = sqlite3.connect(file, isolation_level=None, timeout=timeout, check_same_thread=False)
        if wal:
            self.driver.execute("PRAGMA journal_mode = WAL")
        self._begin = begin
        self.engine = sa.create_engine(
            "sqlite://", creator=lambda: self.driver, poolclass=sa.NullPool, pool_reset_on_return=None
        )
        for name in ("do_commit", "do_rollback", "do_close", "do_terminate"):
            setattr(self.engine.dialect, name, lambda driver: None)

    def __enter__(self) -> sa.Connection:
        if self._begin:
            self.driver.execute(self._begin)
        return self.engine.connect()

    def __exit__(self, *_: object) -> None:
        if self.driver.in_transaction:
            self.driver.execute("ROLLBACK")
        self.driver.close()


def test_a_lent_connection_whose_transaction_is_open_carries_jobs(sqlite_database: Database, tmp_path: Path) -> None:
    file = sqlite_database.engine.url.database or ""
    assets = AssetStore(tmp_path / "assets", engine=sqlite_database.engine)
    made = stored(assets)
    with Lender(file, "BEGIN IMMEDIATE") as lent:
        job = JobStore(lent).create("acme", job_type="note")
        assets.create(lent, "acme", made, source_task_id=None)
        assert JobStore(lent).get_by_id(job.id) == job
        # At once: its own transaction would be waited for.
        with pytest.raises(ConfigurationError, match="call put_file before"):
            stored(assets)
    assert seen(sqlite_database.engine, job) is None  # the lender rolled back
    assert stored(assets).byte_size == 1


REFUSED = {
    "deferred": ({"begin": "BEGIN"}, "transaction_mode: IMMEDIATE"),
    "no transaction": ({"begin": ""}, r"transaction\.atomic\(\)"),
    "no timeout": ({"begin": "BEGIN IMMEDIATE", "timeout": 0}, "no busy timeout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_lent_connection_that_would_lose_guarantees_is_refused(
    sqlite_database: Database, tmp_path: Path, name: str
) -> None:
    options, message = REFUSED[name]
    assets = AssetStore(tmp_path / "assets", engine=sqlite_database.engine)
    made = stored(assets)
    with Lender(sqlite_database.engine.url.database or "", **options) as lent:  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=message):
            JobStore(lent).create("acme", job_type="note")
        with pytest.raises(ConfigurationError, match=message):
            assets.create(lent, "acme", made, source_task_id=None)
    assert statuses(sqlite_database.engine) == []


def test_a_lent_connection_without_the_write_ahead_log_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigurationError, match="PRAGMA journal_mode = WAL")
    with Lender(tmp_path / "a.db", "BEGIN IMMEDIATE", wal=False) as lent, refused:
        JobStore(lent).create("acme", job_type="note")


def test_a_lent_database_in_memory_serves_tests(tmp_path: Path) -> None:
    lender = Lender(":memory:", "BEGIN")
    with lender as lent:
        jobkit.migrations.upgrade(lent)
        job = JobStore(lent).create("acme", job_type="note")
        assert JobStore(lent).get_by_id(job.id) == job
