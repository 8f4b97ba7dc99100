"""``create_many``: many jobs of one company, in order, all of them or none."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobRequest, JobStore
from jobkit import requests as requests_module
from jobkit.tables import content_job_events, content_jobs
from tests.support.recorder import Recorder

COMPANY = "acme"
AWKWARD: list[dict[str, Any]] = [
    {},
    {"text": 'quotes " and \\ and \n and é and 🎈', "deep": {"list": [1, 2.5, None, True, "x"]}},
    {"large": 12345678901234567890123, "small": 1e-7, "empty": ""},
]


def stored(engine: sa.Engine) -> list[jobkit.Job]:
    with engine.connect() as connection:
        return list(reversed(JobStore(connection).list_by_company(COMPANY)))


def test_jobs_and_events_are_those_that_create_makes(engine: sa.Engine, session: Session) -> None:
    requests = [JobRequest("note", input, f"task {n}") for n, input in enumerate(AWKWARD)]
    created = JobStore(session).create_many(COMPANY, requests)
    session.commit()
    assert stored(engine) == created
    assert [job.input for job in created] == AWKWARD
    with engine.connect() as connection:
        rows = connection.execute(sa.select(content_job_events).order_by(content_job_events.c.job_id)).all()
    assert [(r.job_id, r.seq, r.type, r.payload, r.company_id) for r in rows] == [
        (job.id, 1, "content_job.queued", {"jobId": str(job.id)}, COMPANY) for job in created
    ]


def test_order_is_kept_over_chunks_by_number_and_by_size(
    engine: sa.Engine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "MAX_CHUNK_JOBS", 7)
    monkeypatch.setattr(requests_module, "MAX_CHUNK_CHARACTERS", 1_000)
    requests = [JobRequest("note", {"n": n, "filling": "x" * (n % 5) * 100}) for n in range(60)]
    created = JobStore(session).create_many(COMPANY, iter(requests))
    session.commit()
    assert [job.input["n"] for job in stored(engine)] == list(range(60))
    assert stored(engine) == created


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (JobRequest(" "), ValueError, r"requests\[2\]: job_type is blank"),
        (JobRequest("note", {"x": float("nan")}), ValueError, r"requests\[2\]: input"),
        (JobRequest("note", {"x": "\0"}), ValueError, r"requests\[2\]: input contains a NUL"),
        (JobRequest("note", None, "\ud800"), ValueError, r"requests\[2\]: source_task_id"),
        (JobRequest(7), TypeError, r"requests\[2\]: job_type"),  # type: ignore[arg-type]
        ({"job_type": "note"}, TypeError, r"requests\[2\] must be a JobRequest, not dict"),
    ],
)
def test_one_bad_request_writes_nothing_and_is_named(
    engine: sa.Engine, session: Session, bad: Any, error: type[Exception], message: str
) -> None:
    good = JobRequest("note")
    with pytest.raises(error, match=message):
        JobStore(session).create_many(COMPANY, [good, good, bad, good])
    session.commit()
    assert stored(engine) == []


def test_a_chunk_that_the_database_refuses_takes_the_earlier_chunks_with_it(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "MAX_CHUNK_JOBS", 2)
    with engine.begin() as connection:
        JobStore(connection).create(COMPANY, job_type="before")
        first = jobkit.ids.new_id()
        ids = iter([first, jobkit.ids.new_id(), jobkit.ids.new_id(), first])
        monkeypatch.setattr(requests_module, "new_id", lambda: next(ids))
        with pytest.raises(sa.exc.IntegrityError):
            JobStore(connection).create_many(COMPANY, [JobRequest("note")] * 4)
    assert [job.job_type for job in stored(engine)] == ["before"]


def test_nothing_to_create_is_no_error_and_a_rollback_leaves_nothing(engine: sa.Engine, session: Session) -> None:
    assert JobStore(session).create_many(COMPANY, []) == []
    with session.begin_nested() as savepoint:
        JobStore(session).create_many(COMPANY, [JobRequest("note")] * 3)
        savepoint.rollback()
    session.commit()
    with engine.connect() as connection:
        for table in (content_jobs, content_job_events):
            assert connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() == 0


def test_created_together_they_are_rendered_once_each(
    engine: sa.Engine, disk: jobkit.AssetStore, recorder: Recorder
) -> None:
    with Session(engine) as session, session.begin():
        created = JobStore(session).create_many(COMPANY, [JobRequest("note", {"n": n}) for n in range(50)])
    renderers = jobkit.Renderers(
        default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", str(ctx.input["n"]).encode())
    )
    assert jobkit.Runner(engine, disk, renderers).run_until_idle(timeout=60) == 50
    for job in created:
        assert recorder.types(job.id) == ["queued", "running", "done"]
