"""The database refuses what a runner writes: a value, a right, a trigger, a server that became read-only. Only a value
is the job's fault; and whatever is refused keeps nothing else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobRequest, JobStore, Rendered, Runner
from jobkit.base.clock import utcnow
from jobkit.db.failures import contained, is_outage, refuses_values
from jobkit.jobs.claims import MAX_RESCUES
from tests.support.databases import Database, PostgresDatabase, SqliteDatabase
from tests.support.invariants import violations
from tests.support.postgres import OwnServer, Server, start_own_server
from tests.support.runners import Gate, note, only, seen, statuses, until

Create = Callable[..., jobkit.Job]
# The classes of PostgreSQL's Appendix A that an error can have, but those of values.
CLASSES = (
    "03 08 09 0A 0B 0F 0L 0P 0Z 20 21 24 25 26 27 28 2B 2D 2F 34 38 39 3B 3D 3F 40 42 44 53 54 55 57 58 72 F0 HV P0 XX"
)
NAMED = "25006 26000 0A000 42501 40001 40P01 53100 53300 55P03 57014 57P01 57P03 P0001"
VALUES = "22001 22003 22021 22P02 22P05 23502 23505 23514"


class Store:
    """Assets in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.assets = folder, AssetStore(folder)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "assets")


class Renders:
    """A renderer that counts its calls by job, and fails for the type "fails"."""

    def __init__(self, message: str = "boom") -> None:
        self.of: Counter[UUID] = Counter()
        self._message = message

    def __call__(self, ctx: jobkit.RenderContext) -> Rendered:
        self.of[ctx.job_id] += 1
        if ctx.job_type == "fails":
            raise jobkit.Discard(self._message)
        return note(ctx)


def refuse(engine: sa.Engine, *, status: str, state: str = "P0001", times: int = 2_000_000_000) -> None:
    """The database refuses, ``times`` times, that a job of a type beginning with "refused" gets this status."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql(
                f"CREATE TRIGGER refuse BEFORE UPDATE ON content_jobs WHEN NEW.status = '{status}' "
                "AND NEW.job_type <> 'note' BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
            return
        for statement in (
            "DROP TRIGGER IF EXISTS refuse ON content_jobs",
            "DROP SEQUENCE IF EXISTS refusals",
            "CREATE SEQUENCE refusals",
            f"""CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.status = '{status}' AND NEW.job_type <> 'note' AND nextval('refusals') <= {times} THEN
                    RAISE EXCEPTION 'refused' USING ERRCODE = '{state}'; END IF;
                RETURN NEW; END $$""",
            "CREATE TRIGGER refuse BEFORE UPDATE ON content_jobs FOR EACH ROW EXECUTE FUNCTION refuse()",
        ):
            connection.exec_driver_sql(statement)


def sqlstates() -> list[str]:
    """Some of every class, others at each run: only the classes are fixed."""
    letters = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
    drawn = [group + "".join(random.choices(letters, k=3)) for group in CLASSES.split()]
    return [*NAMED.split(), *(state for state in drawn if not state.endswith("000"))]


def many(database: Database, kinds: list[str]) -> list[jobkit.Job]:
    with Session(database.engine) as session, session.begin():
        return JobStore(session).create_many("acme", [JobRequest(kind) for kind in kinds])


def test_what_is_no_error_of_values_is_repeated_and_costs_no_render(postgres_database: Database, store: Store) -> None:
    engine, renders = postgres_database.engine, Renders()
    with Runner(engine, store.assets, only(renders)) as runner:
        for state in sqlstates():
            refuse(engine, status="done", state=state, times=2)
            jobs = many(postgres_database, ["note", "refused", "note"])
            runner.dispatch(jobs[0])
            until(lambda jobs=jobs: all(seen(engine, job).status == "done" for job in jobs), f"the jobs of {state}")  # type: ignore[misc]
    assert set(renders.of.values()) == {1}
    assert violations(engine, store.folder) == []


@pytest.mark.parametrize("state", VALUES.split())
def test_an_error_of_values_fails_the_job_at_once_and_alone(
    state: str, postgres_database: Database, store: Store
) -> None:
    engine, renders = postgres_database.engine, Renders()
    refuse(engine, status="done", state=state)
    one, bad, two = many(postgres_database, ["note", "refused", "note"])
    assert Runner(engine, store.assets, only(renders)).run_until_idle(60) == 3
    assert [seen(engine, job).status for job in (one, bad, two)] == ["done", "failed", "done"]
    assert set(renders.of.values()) == {1}
    assert violations(engine, store.folder) == []


def test_a_result_that_is_refused_for_a_whole_lease_fails_and_says_why(
    postgres_database: Database, store: Store
) -> None:
    engine, renders = postgres_database.engine, Renders()
    refuse(engine, status="done", state="42501")
    bad, good = many(postgres_database, ["refused", "note"])
    with Runner(engine, store.assets, only(renders), lease=1.5) as runner:
        runner.dispatch(bad)
        until(lambda: seen(engine, good).status == "done")
        until(lambda: seen(engine, bad).status == "failed")
    assert seen(engine, bad).attempt == 1
    assert seen(engine, bad).error_message
    assert renders.of == {bad.id: 1, good.id: 1}


@pytest.mark.parametrize("state", ["P0001", "23514", "42501"])
def test_ends_that_cannot_be_written_at_all_cost_one_render_a_lease(
    state: str, database: Database, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    engine, renders = database.engine, Renders()
    refuse(engine, status="failed", state=state)
    bad = many(database, ["fails"] * 30)
    with Runner(engine, store.assets, only(renders)) as runner:
        runner.dispatch(bad[0])
        until(lambda: len(renders.of) == 30, "the first renders")
        for _ in range(20):  # others go on, each of them with a claim that may be refused with an end
            (good,) = many(database, ["note"])
            runner.dispatch(good)
            until(lambda good=good: seen(engine, good).status == "done")  # type: ignore[misc]
    assert {renders.of[job.id] for job in bad} == {1}
    rows = [seen(engine, job) for job in bad]
    # Charged: what a stop gives back was refused all the time, and is queued again by the runner that stops.
    assert {row.status for row in rows} <= {"running", "queued"}
    assert "refused" in caplog.text


def test_an_end_that_is_never_written_stops_being_rendered_and_holds_up_no_other_rescue(
    database: Database, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    engine, renders = database.engine, Renders()
    refuse(engine, status="failed", state="23514")
    (bad,) = many(database, ["fails"])
    with Runner(engine, store.assets, only(renders), lease=0.6):
        until(lambda: "the database refuses to record that" in caplog.text, "the last rescue")
        assert renders.of[bad.id] == MAX_RESCUES + 1
        # A job of a lost worker beyond it is rescued all the same.
        with engine.begin() as connection:
            lost = JobStore(connection).create("acme", job_type="note")
            past = utcnow().replace(year=2020)
            values = {"status": "running", "lease_until": past, "worker_id": "lost", "fence": 1, "attempt": 1}
            connection.execute(
                jobkit.tables.content_jobs.update().where(jobkit.tables.content_jobs.c.id == lost.id).values(values)
            )
        until(lambda: seen(engine, lost).status == "done")
    assert renders.of[bad.id] == MAX_RESCUES + 1
    assert seen(engine, bad).status == "running"


@pytest.fixture
def latin1(postgres: Server) -> Iterator[sa.Engine]:
    url = sa.make_url(postgres.create_database())
    admin = sa.create_engine(postgres.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {url.database}")
        connection.exec_driver_sql(
            f"CREATE DATABASE {url.database} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
        )
    engine = sa.create_engine(url)
    jobkit.migrations.upgrade(engine)
    yield engine
    engine.dispose()
    postgres.drop_database(str(url))


@pytest.mark.parametrize("message", ["naïve", "🎉", "x" * 3000, "日本" * 3000])
def test_a_message_that_the_databases_encoding_lacks_is_written_escaped(
    message: str, latin1: sa.Engine, store: Store
) -> None:
    renders = Renders(message)
    with latin1.begin() as connection:
        bad, good = JobStore(connection).create_many("acme", [JobRequest("fails"), JobRequest("note")])
    assert Runner(latin1, store.assets, only(renders)).run_until_idle(60) == 2
    assert seen(latin1, good).status == "done"
    assert seen(latin1, bad).status == "failed"
    expected = message[:20].encode("latin-1" if message == "naïve" else "ascii", "backslashreplace").decode("latin-1")
    assert seen(latin1, bad).error_message.startswith(expected[:20])
    assert set(renders.of.values()) == {1}


def test_progress_that_is_refused_keeps_no_other_jobs_progress(latin1: sa.Engine, store: Store) -> None:
    gate = Gate()
    with latin1.begin() as connection:
        jobs = JobStore(connection).create_many("acme", [JobRequest("note")] * 3)
    with Runner(latin1, store.assets, only(gate), concurrency=3):
        gate.entered(3)
        by_id = {ctx.job_id: ctx for ctx in gate.contexts}
        by_id[jobs[0].id].progress(0.3, "🎉")
        by_id[jobs[1].id].progress(0.4, "half")
        until(lambda: seen(latin1, jobs[1]).progress == 0.4)
        by_id[jobs[2].id].progress(0.5, "more")
        until(lambda: seen(latin1, jobs[2]).progress == 0.5)
        by_id[jobs[0].id].progress(0.6, "plain")
        until(lambda: seen(latin1, jobs[0]).progress == 0.6)
        gate.open()
        until(lambda: statuses(latin1) == ["done"] * 3)


def test_a_renewal_that_is_refused_keeps_no_other_job_from_renewing(postgres_database: Database, store: Store) -> None:
    engine, gate = postgres_database.engine, Gate()
    with engine.begin() as connection:
        for statement in (
            """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF OLD.status = 'running' AND NEW.status = 'running' AND NEW.job_type <> 'note' THEN
                    RAISE EXCEPTION 'refused'; END IF;
                RETURN NEW; END $$""",
            "CREATE TRIGGER refuse BEFORE UPDATE ON content_jobs FOR EACH ROW EXECUTE FUNCTION refuse()",
        ):
            connection.exec_driver_sql(statement)
    bad, good = many(postgres_database, ["refused", "note"])
    with Runner(engine, store.assets, only(gate), lease=1.5):
        gate.entered(2)
        first = seen(engine, good).lease_until
        until(lambda: seen(engine, good).lease_until > first)
        assert (seen(engine, good).rescues, seen(engine, bad).rescues) == (0, 0)  # nor does it rescue its own
        gate.open()
        until(lambda: seen(engine, good).status == "done")
    assert gate.jobs.count(good.id) == 1


def test_a_connection_that_stays_read_only_is_not_used_again(postgres_database: Database, store: Store) -> None:
    # As after a failover: sessions that reached the standby go on being read-only, and answer a ping.
    engine = postgres_database.connect(pool_size=6, max_overflow=0, pool_pre_ping=True)
    renders = Renders()
    with Runner(engine, store.assets, only(renders)) as runner:
        lent = [engine.connect() for _ in range(2)]
        for connection in lent:
            connection.exec_driver_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
            connection.commit()
        mine = [connection.scalar(sa.text("SELECT pg_backend_pid()")) for connection in lent]
        with postgres_database.engine.connect() as admin:  # the runner's own sessions end, and it takes those
            for connection in lent:
                connection.close()
            admin.execute(
                sa.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid() AND pid <> ALL (:mine)"
                ),
                {"mine": mine},
            )
        jobs = many(postgres_database, ["note"] * 8)
        runner.dispatch(jobs[0])
        until(lambda: statuses(engine) == ["done"] * 8)
    assert set(renders.of.values()) == {1}


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnServer]:
    server = start_own_server()
    yield server
    server.stop()


def test_results_survive_a_server_that_is_read_only_for_a_while(own_server: OwnServer, store: Store) -> None:
    database, gate = PostgresDatabase(own_server, None), Gate()
    jobkit.migrations.upgrade(database.engine)
    admin = sa.create_engine(own_server.url, isolation_level="AUTOCOMMIT")
    jobs = many(database, ["note"] * 4)

    def read_only(value: str) -> None:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            connection.exec_driver_sql("SELECT pg_reload_conf()")
        until(lambda: _shows(database, value), "the setting")

    with Runner(database.engine, store.assets, only(gate)) as runner:
        gate.entered(4)
        read_only("on")
        gate.open()
        assert runner._running is not None
        pipeline = runner._running.pipeline
        until(lambda: len(pipeline._postponed._retries) == 4, "four refused ends")
        read_only("off")
        until(lambda: statuses(database.engine) == ["done"] * 4)
    assert sorted(gate.jobs) == sorted(job.id for job in jobs)
    assert violations(database.engine, store.folder) == []
    admin.dispose()
    database.close()


def _shows(database: Database, value: str) -> bool:
    engine = database.connect(poolclass=sa.NullPool)
    with engine.connect() as connection:
        return connection.exec_driver_sql("SHOW default_transaction_read_only").scalar() == value


def test_what_an_error_means(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "x.db")
    with database.engine.connect() as connection:
        found: dict[str, Any] = {}
        for name, statement in {
            "constraint": "INSERT INTO content_jobs (id) VALUES ('x')",
            "syntax": "SELEC",
            "mismatch": "INSERT INTO content_job_events (id) VALUES ('x')",
        }.items():
            with pytest.raises(sa.exc.DBAPIError) as raised:
                connection.exec_driver_sql(statement)
            found[name] = refuses_values(raised.value), is_outage(raised.value)
    assert found == {"constraint": (True, False), "syntax": (False, False), "mismatch": (True, False)}
    database.close()
    assert refuses_values(UnicodeEncodeError("latin-1", "🎉", 0, 1, "no"))
    assert not refuses_values(OSError())
    assert is_outage(OSError())
    assert not refuses_values(MemoryError())


def test_contained_tells_of_each_that_is_refused() -> None:
    told: list[int] = []

    def step(items: Any) -> list[int]:
        if any(item < 0 for item in items):
            raise ValueError
        return list(items)

    assert contained([1, -2, 3, -4], step, lambda item, _: told.append(item)) == [[1], [3]]
    assert told == [-2, -4]

    def away(items: Any) -> None:
        raise OSError

    with pytest.raises(OSError):
        contained([1, 2], away, lambda item, _: told.append(item))
    assert told == [-2, -4]
