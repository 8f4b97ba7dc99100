"""Relay: one shared feed a database and process, whoever starts it, and events of other processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobEvent, JobStore, Relay, Runner, signals
from jobkit.events import relay
from tests.support.databases import Database
from tests.support.recorder import Recorder
from tests.support.runners import only, until

Create = Callable[..., jobkit.Job]
WHOLE = ["queued", "running", "done"]


def feeds() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jobkit-relay"]


def test_a_process_that_renders_nothing_hears_of_what_others_commit(
    engine: sa.Engine, create: Create, recorder: Recorder
) -> None:
    with Relay(engine):
        job = create()
        with engine.begin() as connection:
            JobStore(connection).transition(job.id, status="cancelled")
        recorder.wait(lambda types: types == ["queued", "cancelled"])
    assert [event.seq for event in recorder.events] == [1, 2]


OTHER = """
import sys
import sqlalchemy as sa, jobkit
engine = sa.create_engine(sys.argv[1])
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)
renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"x"))
runner = jobkit.Runner(engine, jobkit.AssetStore(sys.argv[2]), renderers)
for _ in range(20):
    runner.submit("acme", job_type="note")
print(runner.run_until_idle(timeout=60))
"""


def test_events_of_another_process_are_seen_by_polling(
    engine: sa.Engine, database: Database, tmp_path: Path, recorder: Recorder
) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    with Relay(engine):
        command = [sys.executable, "-c", OTHER, url, str(tmp_path / "assets")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert ended.stdout == "20\n", ended.stderr
        recorder.wait(lambda types: types.count("done") == 20)
    jobs = dict.fromkeys(event.job_id for event in recorder.events)
    assert [recorder.types(job) for job in jobs] == [WHOLE] * 20
    assert len({event.id for event in recorder.events}) == 60


def test_each_receiver_is_called_once_however_many_runners_and_relays_are_started(
    engine: sa.Engine, database: Database, disk: AssetStore, recorder: Recorder
) -> None:
    second = database.connect()
    hosts: list[Any] = [Runner(engine, disk, only()), Relay(second), Runner(second, disk, only()), Relay(engine)]
    for host in hosts:
        host.start()
    assert len(feeds()) == 1
    jobs = [hosts[number % 2 * 2].submit("acme", job_type="note") for number in range(20)]
    recorder.wait(lambda types: types.count("done") == 20)
    for host in hosts[:3]:
        host.stop()
    assert len(feeds()) == 1
    job = hosts[0].submit("acme", job_type="note")
    assert recorder.types(job.id) == ["queued"]
    hosts[3].stop()
    assert feeds() == []
    assert [recorder.types(job.id) for job in jobs] == [WHOLE] * 20


def test_a_relay_tells_only_what_is_committed_after_it_began_and_nothing_again(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    runner = Runner(engine, disk, only())
    create()
    runner.submit("acme", job_type="note")
    assert runner.run_until_idle(timeout=60) == 2
    before = list(recorder.events)
    assert len(before) == 6
    create()
    with Relay(engine):
        submitted = runner.submit("acme", job_type="note")
        last = create()
        recorder.wait(lambda _: recorder.types(last.id) == ["queued"])
    assert [event.job_id for event in recorder.events[6:]] == [submitted.id, last.id]


def test_a_transaction_open_at_the_start_is_heard_when_it_commits_after_it(
    engine: sa.Engine, database: Database, recorder: Recorder
) -> None:
    with Session(engine) as session:
        job = JobStore(session).create("acme", job_type="note")
        with Relay(database.connect()):
            session.commit()
            recorder.wait(lambda _: recorder.types(job.id) == ["queued"])


def test_a_relay_that_begins_while_submit_commits_tells_its_event_once(
    engine: sa.Engine, disk: AssetStore, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, insert = Relay(engine), JobStore.insert

    def begin_and_insert(self: JobStore, *args: Any, **options: Any) -> Any:
        late.start()
        return insert(self, *args, **options)

    monkeypatch.setattr(JobStore, "insert", begin_and_insert)
    job = Runner(engine, disk, only()).submit("acme", job_type="note")
    monkeypatch.undo()
    last = Runner(engine, disk, only()).submit("acme", job_type="note")
    running = relay.running_feed(engine)
    assert running is not None
    until(lambda: not running._reader.position.delivered_ahead, "a scan past both")
    late.stop()
    assert [event.job_id for event in recorder.events] == [job.id, last.id]


def test_start_and_stop_may_be_repeated_and_stop_waits_for_the_receiver_that_runs(
    engine: sa.Engine, create: Create
) -> None:
    told: list[str] = []
    entered, let_go = threading.Event(), threading.Event()

    def slow(_: str, *, event: JobEvent) -> None:
        entered.set()
        assert let_go.wait(60)
        told.append(event.type)

    one = Relay(engine)
    one.stop()
    with signals.content_job_queued.connected_to(slow):
        for count in (1, 2):
            assert one.start() is one.start()
            entered.clear()
            let_go.clear()
            create()
            assert entered.wait(60)
            threading.Timer(0.05, let_go.set).start()
            one.stop()
            one.stop()
            assert len(told) == count
            assert feeds() == []


def test_a_receiver_may_stop_its_relay(engine: sa.Engine, create: Create, recorder: Recorder) -> None:
    def stop(_: str, *, event: JobEvent) -> None:
        one.stop()

    one = Relay(engine).start()
    with signals.content_job_queued.connected_to(stop):
        create()
        recorder.wait(lambda types: len(types) == 1)
        until(lambda: feeds() == [])


# --- which engines


@pytest.mark.parametrize("pool", [sa.StaticPool, sa.SingletonThreadPool])
@pytest.mark.parametrize("host", [Runner.start, Runner.run_until_idle, lambda runner: Relay(runner.engine).start()])
def test_a_pool_that_shares_one_connection_is_refused(
    pool: Any, host: Callable[[Any], Any], database: Database, tmp_path: Path
) -> None:
    engine = database.connect(poolclass=pool)
    with pytest.raises(jobkit.ConfigurationError, match=f"{pool.__name__}.*poolclass"):
        host(Runner(engine, AssetStore(tmp_path / "assets"), only()))


@pytest.mark.parametrize(
    "options", [{"poolclass": sa.NullPool}, {"pool_size": 5, "max_overflow": 0}, {"pool_pre_ping": True}]
)
def test_other_pools_serve(options: Any, database: Database, tmp_path: Path, recorder: Recorder) -> None:
    engine = database.connect(**options)
    with Runner(engine, AssetStore(tmp_path / "assets"), only(), concurrency=8) as runner:
        jobs = [runner.submit("acme", job_type="note") for _ in range(10)]
        recorder.wait(lambda types: types.count("done") == 10)
    assert [recorder.types(job.id) for job in jobs] == [WHOLE] * 10


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (lambda: create_async_engine("postgresql+psycopg://host/db"), r"AsyncEngine.*postgresql\+psycopg"),
        (lambda: sa.create_engine("sqlite:///x.db"), "configure_sqlite"),
    ],
)
def test_an_engine_that_would_not_do_is_refused(engine: Callable[[], Any], complaint: str) -> None:
    with pytest.raises(jobkit.ConfigurationError, match=complaint):
        Relay(engine())


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_in_memory_is_refused(url: str) -> None:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    jobkit.configure_sqlite(engine)
    with pytest.raises(jobkit.ConfigurationError, match="in memory"):
        Relay(engine).start()


def test_a_database_without_the_tables_is_named_and_the_relay_can_start_later(engine: sa.Engine) -> None:
    jobkit.migrations.downgrade(engine)
    late = Relay(engine)
    with pytest.raises(jobkit.SchemaOutOfDate, match=r"migrations.upgrade\(engine\)"):
        late.start()
    jobkit.migrations.upgrade(engine)
    with late:
        assert len(feeds()) == 1


def test_engines_made_by_a_creator_are_told_apart(
    postgres_database: Database, postgres: Any, postgres_template: str, recorder: Recorder
) -> None:
    import psycopg

    def engine(url: str) -> sa.Engine:
        plain = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        return sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(plain))

    other = postgres.create_database(template=postgres_template)
    engines = [engine(postgres_database.url), engine(other)]
    try:
        with Relay(engines[0]), Relay(engines[1]):
            assert len(feeds()) == 2
            for each in engines:
                with Session(each) as session, session.begin():
                    JobStore(session).create("acme", job_type="note")
            recorder.wait(lambda types: len(types) == 2)
    finally:
        for each in engines:
            each.dispose()
        postgres.drop_database(other)


def test_a_schema_of_its_own_has_a_feed_of_its_own(postgres_database: Database, recorder: Recorder) -> None:
    engine = postgres_database.engine
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("other"))
    jobkit.migrations.upgrade(engine, schema="other")
    other = engine.execution_options(schema_translate_map={None: "other"})
    with Relay(engine), Relay(other), Relay(engine.execution_options(anything=1)):
        assert len(feeds()) == 2
        with Session(other) as session, session.begin():
            JobStore(session).create("acme", job_type="note")
        recorder.wait(lambda types: len(types) == 1)


def test_the_relay_survives_an_outage_of_the_database(
    postgres_database: Database, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    engine = postgres_database.engine
    admin = sa.create_engine(
        sa.make_url(postgres_database.url).set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
    )
    name = sa.make_url(postgres_database.url).database

    def set_allowed(allowed: bool) -> None:
        with admin.connect() as connection:
            connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}"))
            connection.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
            )

    with Relay(engine):
        running = relay.running_feed(engine)
        assert running is not None
        set_allowed(False)
        until(lambda: running._backoff.failures >= 4, "several failures")
        set_allowed(True)
        engine.dispose()
        with Session(engine) as session, session.begin():
            job = JobStore(session).create("acme", job_type="note")
        recorder.wait(lambda _: recorder.types(job.id) == ["queued"])
    assert len([record for record in caplog.records if "could not be read" in record.message]) == 1
