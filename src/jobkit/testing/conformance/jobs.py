"""The suite for a database: its engine, with the driver and pool that a host uses."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import signals
from jobkit.assets.store import AssetStore
from jobkit.errors import InvalidTransition, JobNotFound, UserError
from jobkit.jobs.store import JobStore
from jobkit.rendering.renderers import Renderers
from jobkit.runner.runner import Runner
from jobkit.tables import assets, content_job_events, content_jobs
from jobkit.types import CONTENT_JOB_STATUSES, Job, JobEvent, JobRequest, Rendered

COMPANY = "acme"
REFUSED: list[dict[str, Any]] = [
    {"job_type": " "},
    {"job_type": "a\0"},
    {"job_type": "x", "input": {"a": float("nan")}},
    {"job_type": "x", "input": {"a": "\0"}},
    {"job_type": "x", "input": {"a": "\ud800"}},
    {"job_type": "x", "source_task_id": "\0"},
]


class JobStoreConformance:
    """Override ``engine``: as your app creates it, on a database with jobkit's tables, which are empty."""

    @pytest.fixture
    def engine(self) -> sa.Engine:
        raise NotImplementedError("give an engine on a database with jobkit's tables, empty for each test")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> AssetStore:
        return AssetStore(tmp_path / "assets")

    # --- in the host's transaction

    def test_a_job_is_there_with_the_hosts_commit_and_its_event_with_it(self, engine: sa.Engine) -> None:
        with Session(engine) as session:
            job = JobStore(session).create(COMPANY, job_type="note", input={"ü": [1, None, 2.5]}, source_task_id="t")
            assert job_ids(engine) == set()
            session.commit()
        assert job_ids(engine) == {job.id}
        assert look(engine, job.id) == job
        assert (job.status, job.input, job.fence, job.event_seq) == ("queued", {"ü": [1, None, 2.5]}, 0, 1)
        assert events(engine, job.id) == [(1, "queued", {"jobId": str(job.id)})]
        assert abs(job.created_at - datetime.now(UTC)) < timedelta(minutes=5)

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_rolled_back_transaction_or_savepoint_leaves_nothing(self, engine: sa.Engine, nested: bool) -> None:
        with Session(engine) as session:
            kept = JobStore(session).create(COMPANY, job_type="kept") if nested else None
            savepoint = session.begin_nested() if nested else None
            JobStore(session).create(COMPANY, job_type="note")
            JobStore(session).create_many(COMPANY, [JobRequest("note")] * 3)
            if savepoint is not None:
                savepoint.rollback()
                session.commit()
            session.rollback()
        assert job_ids(engine) == ({kept.id} if kept else set())
        assert count(engine, content_job_events) == (1 if kept else 0)

    def test_a_released_savepoint_goes_with_its_transaction(self, engine: sa.Engine) -> None:
        with Session(engine) as session:
            with session.begin_nested():
                JobStore(session).create(COMPANY, job_type="note")
            session.rollback()
        assert (job_ids(engine), count(engine, content_job_events)) == (set(), 0)

    def test_a_read_before_a_write_waits_for_another_writer_and_does_not_fail(self, engine: sa.Engine) -> None:
        ready, failed = threading.Barrier(4), []

        def work() -> None:
            try:
                ready.wait(20)
                for _ in range(10):
                    with Session(engine) as session, session.begin():
                        JobStore(session).list_by_company(COMPANY, limit=1)
                        JobStore(session).create(COMPANY, job_type="note")
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
        assert len(job_ids(engine)) == 40

    def test_bad_input_is_refused_and_the_hosts_transaction_goes_on(self, engine: sa.Engine) -> None:
        with Session(engine) as session, session.begin():
            for arguments in REFUSED:
                with pytest.raises(ValueError, match="job_type|input|source_task_id"):  # noqa: RUF043
                    JobStore(session).create(COMPANY, **arguments)
            job = JobStore(session).create(COMPANY, job_type="note")
        assert job_ids(engine) == {job.id}

    # --- finding

    def test_an_unknown_malformed_or_foreign_id_is_not_found(self, engine: sa.Engine) -> None:
        job = create(engine)
        with Session(engine) as session, session.begin():
            store = JobStore(session)
            for spelling in (job.id, str(job.id), job.id.hex):
                assert store.get_by_id(spelling, company_id=COMPANY) == job
            for unknown in (uuid4(), "", "x", "a\0", "\ud800"):
                assert store.get_by_id(unknown) is None
                with pytest.raises(JobNotFound):
                    store.transition(unknown, status="failed")
            assert store.get_by_id(job.id, company_id="beta") is None
            store.create(COMPANY, job_type="note")

    def test_a_list_is_newest_first_in_pages_and_of_one_company(self, engine: sa.Engine) -> None:
        with Session(engine) as session, session.begin():
            made = JobStore(session).create_many(COMPANY, [JobRequest("note", {"n": n}) for n in range(25)])
            JobStore(session).create("beta", job_type="note")
        pages: list[list[Job]] = [[]]
        with Session(engine) as session:
            store = JobStore(session)
            while page := store.list_by_company(COMPANY, limit=10, before=pages[-1][-1] if pages[-1] else None):
                pages.append(page)
            assert store.list_by_company(COMPANY, status="done") == []
        assert [job for page in pages for job in page] == made[::-1]

    # --- changing

    def test_a_job_goes_by_hand_from_queued_to_done(self, engine: sa.Engine) -> None:
        job = create(engine)
        for status in ("running", "done"):
            with Session(engine) as session, session.begin():
                JobStore(session).transition(job.id, status=status)
        found = look(engine, job.id)
        assert (found.status, found.fence, found.lease_until) == ("done", 1, None)
        assert [kind for _, kind, _ in events(engine, job.id)] == ["queued", "running", "done"]

    def test_a_change_that_is_not_expected_changes_nothing(self, engine: sa.Engine) -> None:
        job = create(engine)
        with Session(engine) as session, session.begin():
            with pytest.raises(InvalidTransition):
                JobStore(session).transition(job.id, expect="running", status="done")
            with pytest.raises(TypeError):
                JobStore(session).transition(job.id, fence=7)
        assert look(engine, job.id) == job

    def test_every_status_can_be_stored(self, engine: sa.Engine) -> None:
        for status in CONTENT_JOB_STATUSES:
            job = create(engine)
            with Session(engine) as session, session.begin():
                JobStore(session).transition(
                    job.id, status=status, error_message="é\n\t日本" if status == "failed" else None
                )
            assert look(engine, job.id).status == status

    # --- running

    def test_many_jobs_run_once_each_and_tell_their_events_in_order(
        self, engine: sa.Engine, folder: AssetStore
    ) -> None:
        with Session(engine) as session, session.begin():
            made = JobStore(session).create_many(COMPANY, [JobRequest("note", {"n": n}) for n in range(30)])
        heard: list[JobEvent] = []
        unsubscribe = signals.subscribe(COMPANY, heard.append)
        try:
            runner = Runner(engine, folder, Renderers(default=lambda ctx: Rendered("a", "text/plain", b"x")))
            assert runner.run_until_idle(timeout=60) == 30
        finally:
            unsubscribe()
        for job in made:
            found = look(engine, job.id)
            assert (found.status, found.fence, found.attempt) == ("done", 1, 1)
            told = [(event.seq, event.type) for event in heard if event.job_id == job.id]
            assert told[-2:] == [(2, "content_job.running"), (3, "content_job.done")]
        assert count(engine, assets) == 30

    def test_a_failing_renderer_fails_its_job_with_a_message_that_can_be_stored(
        self, engine: sa.Engine, folder: AssetStore
    ) -> None:
        def renderer(ctx: Any) -> Rendered:
            raise UserError("bad \0 \ud800 " + "x" * 100_000)

        job = create(engine)
        assert Runner(engine, folder, Renderers(default=renderer)).run_until_idle(timeout=60) == 1
        found = look(engine, job.id)
        assert found.status == "failed"
        assert (found.error_message or "").startswith("bad ")
        assert len(found.error_message or "") <= 2_000
        assert count(engine, assets) == 0

    def test_two_runners_never_share_a_job(self, engine: sa.Engine, folder: AssetStore) -> None:
        with Session(engine) as session, session.begin():
            JobStore(session).create_many(COMPANY, [JobRequest("note")] * 40)
        ran: list[UUID] = []

        def renderer(ctx: Any) -> Rendered:
            ran.append(ctx.job_id)
            return Rendered("a", "text/plain", b"x")

        runners = [Runner(engine, folder, Renderers(default=renderer)) for _ in range(2)]
        threads = [threading.Thread(target=runner.run_until_idle, kwargs={"timeout": 60}) for runner in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert len(ran) == len(set(ran)) == 40
        assert count(engine, assets) == 40


def create(engine: sa.Engine) -> Job:
    with Session(engine) as session, session.begin():
        return JobStore(session).create(COMPANY, job_type="note")


def look(engine: sa.Engine, job_id: UUID) -> Job:
    with Session(engine) as session:
        found = JobStore(session).get_by_id(job_id)
    assert found is not None
    return found


def job_ids(engine: sa.Engine) -> set[UUID]:
    with engine.connect() as connection:
        return set(connection.execute(sa.select(content_jobs.c.id)).scalars())


def count(engine: sa.Engine, table: sa.Table) -> int:
    with engine.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def events(engine: sa.Engine, job_id: UUID) -> list[tuple[int, str, Any]]:
    e = content_job_events.c
    with engine.connect() as connection:
        rows = connection.execute(sa.select(e.seq, e.type, e.payload).where(e.job_id == job_id).order_by(e.seq))
        return [(row.seq, row.type.removeprefix("content_job."), row.payload) for row in rows]
