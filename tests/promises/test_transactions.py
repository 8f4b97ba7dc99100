"""What the host's transaction does with a job. No row, event or signal is left of anything it rolled back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from jobkit import ConfigurationError, Job, JobStore, Relay
from jobkit.tables import content_job_events, content_jobs
from tests.support.databases import Database
from tests.support.recorder import Recorder
from tests.support.shared import empty, shared_database


class Base(DeclarativeBase):
    pass


class Note(Base):
    """A row of the host's own."""

    __tablename__ = "host_notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest) -> Iterator[Database]:
    with shared_database(request) as database:
        Base.metadata.create_all(database.engine)
        yield database


@pytest.fixture
def database(shared: Database) -> Iterator[Database]:
    yield shared
    empty(shared.engine)
    with shared.engine.begin() as connection:
        connection.execute(sa.delete(Note))


def job_in(host: Any) -> Job:
    return JobStore(host).create("acme", job_type="note")


class Sorry(Exception):
    """What a host's view raises."""


# Each does something with jobs in a host's transaction and returns the jobs that must be there afterwards.
Story = Callable[[sa.Engine], list[Job]]
STORIES: list[Story] = []


def story(function: Story) -> Story:
    STORIES.append(function)
    return function


@story
def a_session_that_commits(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session:
        kept = [job_in(session), job_in(session)]
        session.commit()
    return kept


@story
def a_session_that_rolls_back_and_goes_on(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session:
        job_in(session)
        session.rollback()
        kept = job_in(session)
        session.commit()
        job_in(session)
        session.rollback()
    return [kept]


@story
def a_session_that_is_closed_without_a_commit(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session:
        job_in(session)
    return []


@story
def a_session_block_that_raises(engine: sa.Engine) -> list[Job]:
    with suppress(Sorry), Session(engine) as session, session.begin():
        job_in(session)
        raise Sorry
    return []


@story
def a_rolled_back_savepoint_that_came_first(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session:
        savepoint = session.begin_nested()
        job_in(session)
        savepoint.rollback()
        kept = job_in(session)
        session.commit()
    return [kept]


@story
def a_released_savepoint_in_a_committed_transaction(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session, session.begin():
        with session.begin_nested():
            kept = [job_in(session)]
        kept.append(job_in(session))
    return kept


@story
def a_released_savepoint_in_a_rolled_back_transaction(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session:
        with session.begin_nested():
            job_in(session)
        session.rollback()
    return []


@story
def a_released_savepoint_within_a_rolled_back_one(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session, session.begin():
        with session.begin_nested():
            kept = job_in(session)
        outer = session.begin_nested()
        with session.begin_nested():
            job_in(session)
        job_in(session)
        outer.rollback()
    return [kept]


@story
def a_savepoint_block_that_raises_within_a_transaction_that_commits(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session, session.begin():
        kept = job_in(session)
        with suppress(Sorry), session.begin_nested():
            job_in(session)
            raise Sorry
    return [kept]


@story
def a_savepoint_that_an_error_of_the_hosts_own_row_ends(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session, session.begin():
        session.add(Note(title="once"))
        session.flush()
        with suppress(sa.exc.IntegrityError), session.begin_nested():
            job_in(session)
            session.add(Note(title="once"))
        kept = job_in(session)
    assert titles(engine) == ["once"]
    return [kept]


@story
def a_transaction_that_an_error_of_the_hosts_own_row_ends(engine: sa.Engine) -> list[Job]:
    with suppress(sa.exc.IntegrityError), Session(engine) as session, session.begin():
        job_in(session)
        session.add_all([Note(title="twice"), Note(title="twice")])
    assert "twice" not in titles(engine)
    return []


@story
def a_pending_row_of_the_host_that_commits_with_the_job(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session:
        session.add(Note(title="beside"))
        kept = job_in(session)
        assert session.scalars(sa.select(Note.title)).all() == ["beside"]  # flushed by the query, after the job
        session.commit()
    with Session(engine) as session, session.begin():
        session.execute(sa.delete(Note))
        session.add(Note(title="gone"))
        job_in(session)
        session.rollback()
    assert titles(engine) == ["beside"]
    return [kept]


@story
def a_session_without_autoflush(engine: sa.Engine) -> list[Job]:
    with Session(engine, autoflush=False) as session:
        session.add(Note(title="late"))
        kept = job_in(session)
        assert JobStore(session).get_by_id(kept.id) == kept
        session.commit()
    assert "late" in titles(engine)
    return [kept]


@story
def a_scoped_session(engine: sa.Engine) -> list[Job]:
    registry = scoped_session(sessionmaker(engine))
    kept = job_in(registry)
    registry.commit()
    job_in(registry)
    registry.remove()
    return [kept]


@story
def a_connection_that_commits_as_it_goes(engine: sa.Engine) -> list[Job]:
    with engine.connect() as connection:
        kept = job_in(connection)
        connection.commit()
        job_in(connection)
        connection.rollback()
        job_in(connection)
    return [kept]


@story
def a_connection_with_savepoints(engine: sa.Engine) -> list[Job]:
    with engine.connect() as connection, connection.begin():
        with connection.begin_nested():
            kept = job_in(connection)
        savepoint = connection.begin_nested()
        job_in(connection)
        savepoint.rollback()
    with engine.connect() as connection:
        with connection.begin_nested():
            job_in(connection)
        connection.rollback()
    return [kept]


@story
def a_connection_that_the_host_commits_under_a_session(engine: sa.Engine) -> list[Job]:
    with engine.connect() as connection:
        with Session(connection) as session:
            kept = job_in(session)
            session.commit()
        connection.commit()
    return [kept]


@story
def a_session_in_a_test_suites_transaction(engine: sa.Engine) -> list[Job]:
    for mode in ("create_savepoint", "rollback_only", "conditional_savepoint"):
        with engine.connect() as connection, connection.begin() as outer:
            with Session(connection, join_transaction_mode=mode) as session:  # type: ignore[arg-type]
                job = job_in(session)
                session.commit()
                assert JobStore(session).get_by_id(job.id) == job
                with session.begin_nested():
                    job_in(session)
                session.commit()
            outer.rollback()
    return []


@story
def a_session_in_an_outer_transaction_rolls_back_its_part(engine: sa.Engine) -> list[Job]:
    with engine.connect() as connection, connection.begin():
        kept = job_in(connection)
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            job_in(session)
            session.rollback()
            also = job_in(session)
            session.commit()
    return [kept, also]


@story
def a_session_of_several_databases(engine: sa.Engine) -> list[Job]:
    notes = sa.create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(notes)

    class Router(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> sa.Engine:
            return engine if getattr(clause, "table", clause) is content_jobs else notes

    kept = []
    for options in ({"bind": notes, "binds": {content_jobs: engine}}, {"bind": engine, "binds": {Note: notes}}):
        with Session(**options) as session:  # type: ignore[arg-type]
            session.add(Note(title=f"note {len(kept)}"))
            kept.append(job_in(session))
            session.commit()
            job_in(session)
    with Router() as session:
        session.add(Note(title="routed"))
        kept.append(job_in(session))
        session.commit()
    assert len(titles(notes)) == 3
    notes.dispose()
    return kept


@story
def a_change_that_is_rolled_back(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session, session.begin():
        kept = job_in(session)
    with Session(engine) as session:
        with session.begin_nested():
            JobStore(session).transition(kept.id, status="running")
        session.rollback()
        savepoint = session.begin_nested()
        JobStore(session).transition(kept.id, status="done")
        savepoint.rollback()
        session.commit()
        assert JobStore(session).get_by_id(kept.id) == kept
    return [kept]


@story
def a_refused_create_in_a_transaction_that_commits(engine: sa.Engine) -> list[Job]:
    with Session(engine) as session, session.begin():
        with pytest.raises(ValueError):
            JobStore(session).create("acme", job_type="note", input={"a": "\0"})
        kept = job_in(session)
    return [kept]


def titles(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(Note.title).order_by(Note.title)))


@pytest.mark.parametrize("tell", STORIES, ids=lambda tell: tell.__name__)
def test_exactly_the_committed_jobs_are_left_each_with_its_event(engine: sa.Engine, tell: Story) -> None:
    expected = sorted(tell(engine), key=lambda job: job.id)
    with engine.connect() as connection:
        assert JobStore(connection).list_by_company("acme") == expected[::-1]
        events = connection.execute(
            sa.select(content_job_events.c.job_id, content_job_events.c.type).order_by(content_job_events.c.job_id)
        )
        assert [tuple(event) for event in events] == [(job.id, "content_job.queued") for job in expected]


def test_exactly_the_committed_jobs_are_signalled(engine: sa.Engine, recorder: Recorder) -> None:
    expected = []
    with Relay(engine):
        for tell in STORIES:
            expected += tell(engine)
            with engine.begin() as connection:
                connection.execute(sa.delete(Note))
        with engine.begin() as connection:
            last = job_in(connection)
        recorder.wait(lambda _: last.id in {event.job_id for event in recorder.events})
        assert sorted(event.job_id for event in recorder.events) == sorted(job.id for job in [*expected, last])
        assert set(recorder.types()) == {"queued"}


def test_a_job_is_visible_in_its_own_transaction_at_once_and_elsewhere_after_the_commit(engine: sa.Engine) -> None:
    with Session(engine) as session, engine.connect() as other:
        job = job_in(session)
        assert JobStore(session).list_by_company("acme") == [job]
        assert JobStore(other).list_by_company("acme") == []
        other.rollback()
        session.commit()
        assert JobStore(other).list_by_company("acme") == [job]


def test_the_store_neither_commits_nor_opens_a_connection_of_its_own(database: Database) -> None:
    engine = database.connect(pool_size=1, max_overflow=0, pool_timeout=0.1)
    ended: list[str] = []
    for name in ("commit", "rollback"):
        sa.event.listen(engine, name, lambda _connection, name=name: ended.append(name))
    with engine.connect() as connection:
        job = job_in(connection)
        jobs = JobStore(connection)
        jobs.transition(job.id, status="running")
        jobs.get_by_id(job.id)
        jobs.list_by_company("acme", before=job.id)
        assert ended == []
        connection.rollback()
    assert ended == ["rollback"]


def test_a_connection_in_autocommit_is_refused_because_nothing_could_be_rolled_back(engine: sa.Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        jobs = JobStore(connection)
        for change in (lambda: job_in(connection), lambda: jobs.transition("nope", status="done")):
            with pytest.raises(ConfigurationError, match=r'AUTOCOMMIT.* isolation_level="AUTOCOMMIT"$'):
                change()
        assert jobs.list_by_company("acme") == []
    with engine.connect() as connection:  # the same one from the pool, no longer in AUTOCOMMIT
        job_in(connection)


def test_postgresql_is_notified_once_a_committed_transaction_and_only_if_wanted(postgres_database: Database) -> None:
    engine = postgres_database.engine
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as listening:
        listening.exec_driver_sql("LISTEN jobkit")
        driver: Any = listening.connection.driver_connection
        with engine.begin() as connection:
            job_in(connection)
            job_in(connection)
        with engine.connect() as connection:
            job_in(connection)
        with engine.begin() as connection:
            JobStore(connection, notify=False).create("acme", job_type="note")
        with engine.begin() as connection:
            connection.exec_driver_sql("NOTIFY jobkit, 'last'")
        heard = [n.payload for n in driver.notifies(timeout=60, stop_after=2)]
    assert heard == ["", "last"]
