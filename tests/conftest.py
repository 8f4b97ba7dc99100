"""Every database and storage the tests run on: SQLite files and a real PostgreSQL, a folder, memory and
S3 servers; and a real browser."""

from __future__ import annotations

from tests.support import surroundings, tiers

surroundings.settle()  # before jobkit and its libraries, which read the environment when they are imported

import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit.runner import store_stage
from tests.support.asynchronous import DRIVERS, Lane
from tests.support.browser import browser as a_browser
from tests.support.browser import page as a_page
from tests.support.databases import Database, PostgresDatabase, SqliteDatabase
from tests.support.peak import Peaks, return_large_blocks
from tests.support.postgres import Server, start_server
from tests.support.recorder import ALL, Recorder
from tests.support.s3 import Moto, Rclone, environment

COMPANY = "acme"
NO_CASE = SimpleNamespace(params={})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(tiers.OPTION, action="store_true", help="write tests/slow.txt anew: run all tests with it")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    surroundings.settle_colours()
    return_large_blocks()
    store_stage.RETRY_MOST = 0.0  # see ``patient``
    config.pluginmanager.register(Peaks())
    config.pluginmanager.register(tiers.Tiers())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep what a test printed and logged only if it failed: pytest keeps reports and items until the run ends, and
    some tests log megabytes. Reports travel between processes as UTF-8; what tests log need not be.
    """
    report = yield
    if report.passed and not set("PA") & set(item.config.option.reportchars):
        report.sections = []
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    if report.when == "teardown":
        item._report_sections.clear()
        for value in getattr(item, "callspec", NO_CASE).params.values():
            if isinstance(value, BaseException):  # the frames it was raised through hold engines and files
                value.__traceback__ = value.__context__ = None
    return report


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server for the whole run; the run fails, and says how to get one, when there is none."""
    server = start_server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_template(postgres: Server) -> str:
    """The URL of a migrated database that others are copied from."""
    url = postgres.create_database()
    engine = sa.create_engine(url)
    jobkit.migrations.upgrade(engine)
    engine.dispose()
    return url


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    database = SqliteDatabase(tmp_path / "host.db")
    yield database
    database.close()


@pytest.fixture
def postgres_database(postgres: Server, postgres_template: str) -> Iterator[Database]:
    database = PostgresDatabase(postgres, postgres_template)
    yield database
    database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A migrated database of this test alone, on each kind in turn."""
    name = {"sqlite": "sqlite_database", "postgresql": "postgres_database"}[request.param]
    found: Database = request.getfixturevalue(name)
    return found


@pytest.fixture
def engine(database: Database) -> sa.Engine:
    return database.engine


@pytest.fixture(params=DRIVERS)
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    """A migrated database of this test alone, under each asynchronous driver in turn."""
    lane = Lane(request.getfixturevalue(DRIVERS[request.param]), request.param)
    yield lane
    lane.close()


@pytest.fixture
def session(engine: sa.Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    server = Moto()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rclone() -> Iterator[Rclone]:
    server = Rclone()
    yield server
    server.stop()


@pytest.fixture(params=["disk", "memory", "s3"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty storage of this test alone; what S3 needs besides its URL is in the environment."""
    if request.param == "disk":
        return (tmp_path / "assets").as_uri()
    if request.param == "memory":
        return f"memory://{uuid.uuid4()}"
    server: Moto = request.getfixturevalue("moto")
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{server.bucket}/{uuid.uuid4()}"


@pytest.fixture
def assets(engine: sa.Engine, storage_url: str) -> jobkit.AssetStore:
    return jobkit.AssetStore(storage_url, engine=engine)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners ask a storage that fails again, for a lease; in other tests once, as they are about what follows."""
    monkeypatch.setattr(store_stage, "RETRY_MOST", 3600.0)


@pytest.fixture
def disk(engine: sa.Engine, tmp_path: Path) -> jobkit.AssetStore:
    """Assets in a folder, where a test is about something else."""
    return jobkit.AssetStore(tmp_path / "assets", engine=engine)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium; the test fails, and says how to get one, when there is none. Of a module, not of the whole run: no
    test that has no browser is run beside its threads and processes."""
    with a_browser() as started:
        yield started


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page in a profile of this test alone."""
    with a_page(browser) as opened:
        yield opened


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Every signal that this process sends while the test runs."""
    with Recorder() as recorder:
        yield recorder


@pytest.fixture
def create(engine: sa.Engine) -> Callable[..., jobkit.Job]:
    """Create a job in a transaction of its own."""

    def create(job_type: str = "note", company_id: object = COMPANY, **options: object) -> jobkit.Job:
        with Session(engine) as session, session.begin():
            return jobkit.JobStore(session).create(company_id, job_type=job_type, **options)  # type: ignore[arg-type]

    return create


@pytest.fixture(autouse=True)
def no_receiver_left() -> Iterator[None]:
    """What a test leaves connected, such as the receivers of an example it loaded, hears nothing of the next test."""
    yield
    for signal in ALL:
        signal._clear_state()


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """A test that leaves a runner or relay behind fails: the next test would hear its signals."""
    yield
    names = {
        f"jobkit-{name}" for name in ("runner", "relay", "relay-watch", "listen", "leases", "rescue", "sweep", "watch")
    }
    left = [thread for thread in threading.enumerate() if thread.name in names]
    for thread in left:
        thread.join(60)
    assert not [thread for thread in left if thread.is_alive()]
