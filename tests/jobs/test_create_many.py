"""``create_many``: many jobs of one company, in order, all of them or none."""

from __future__ import annotations

import enum
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

import jobkit
from jobkit import JobRequest, JobStore
from jobkit.jobs import creation as requests_module
from jobkit.tables import content_job_events, content_jobs
from tests.support.recorder import Recorder
from tests.support.sent import hearing

COMPANY = "acme"
AWKWARD: list[dict[str, Any]] = [
    {},
    {"text": 'quotes " and \\ and \n and é and 🎈', "deep": {"list": [1, 2.5, None, True, "x"]}},
    {"large": 12345678901234567890123, "small": 1e-7, "empty": ""},
]


def stored(engine: sa.Engine) -> list[jobkit.Job]:
    with engine.connect() as connection:
        return list(reversed(JobStore(connection).list_by_company(COMPANY)))


def counted(engine: sa.Engine) -> list[int]:
    with engine.connect() as connection:
        return [
            connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in (content_jobs, content_job_events)
        ]


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
    with engine.connect() as connection:
        told = connection.scalars(sa.select(content_job_events.c.job_id).order_by(content_job_events.c.id)).all()
    assert told == [job.id for job in created]


@pytest.mark.parametrize(("count", "chunks"), [(0, 0), (1, 1), (1_000, 1), (1_001, 2), (12_000, 12)])
def test_a_thousand_jobs_are_one_statement_and_several_are_in_a_savepoint(
    engine: sa.Engine, count: int, chunks: int
) -> None:
    with engine.begin() as connection:
        JobStore(connection).create(COMPANY, job_type="first")  # on SQLite the first write begins the transaction
        sent: list[str] = []
        with hearing(engine, lambda _, statement, __: sent.append(" ".join(statement.split()[:2]))):
            created = JobStore(connection).create_many(COMPANY, (JobRequest("note", {"n": n}) for n in range(count)))
    # SQLite has no INSERT within a WITH: jobs and events are one statement each.
    once = ["WITH r"] if engine.dialect.name == "postgresql" else ["INSERT INTO"] * 2
    whole = [["SAVEPOINT sa_savepoint_1"], ["RELEASE SAVEPOINT"]] if chunks > 1 else [[], []]
    assert sent == whole[0] + once * chunks + whole[1]
    assert counted(engine) == [count + 1] * 2
    assert [job.id for job in created] == sorted(job.id for job in created)


def test_a_hundred_thousand_jobs_are_created_in_order(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        created = JobStore(connection).create_many(COMPANY, (JobRequest("note", {"n": n}) for n in range(100_000)))
    assert [job.input["n"] for job in created] == list(range(100_000))
    assert counted(engine) == [100_000] * 2
    with engine.connect() as connection:
        ids = connection.scalars(sa.select(content_jobs.c.id).order_by(content_jobs.c.created_at, content_jobs.c.id))
        assert ids.all() == [job.id for job in created]


def test_memory_is_that_of_the_jobs_and_one_chunk(engine: sa.Engine) -> None:
    filling = "x" * 100_000
    with engine.connect() as connection:
        store = JobStore(connection)
        store.create_many(COMPANY, [JobRequest("note")])
        tracemalloc.start()
        try:
            created = store.create_many(COMPANY, (JobRequest("note", {"n": n, "text": filling}) for n in range(600)))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert len(created) == 600
    # What is returned, and as much again as JSON; two chunks looked at, one of them as a document and its copies.
    assert peak < 2 * 600 * 100_000 + 7 * requests_module.MAX_CHUNK_CHARACTERS


def test_inputs_larger_than_a_chunk_are_sent_each_by_itself(engine: sa.Engine, session: Session) -> None:
    size = requests_module.MAX_CHUNK_CHARACTERS
    large = [JobRequest("note", {"text": letter * length}) for letter, length in (("é", size), ("b", 10), ("c", size))]
    with pytest.raises(
        ValueError, match=r"^requests\[0\]: input cannot be stored: it is 8388619 bytes of JSON, the limit"
    ):
        JobStore(session).create_many(COMPANY, large)
    created = JobStore(session, max_input_bytes=size * 3).create_many(COMPANY, large)
    session.commit()
    assert stored(engine) == created


def test_the_same_request_makes_jobs_that_share_nothing(engine: sa.Engine, session: Session) -> None:
    request = JobRequest("note", {"list": []})
    first, second, third = JobStore(session).create_many(COMPANY, [request] * 3)
    first.input["list"].append(1)
    session.commit()
    assert (second.input, third.input, request.input) == ({"list": []}, {"list": []}, {"list": []})
    assert [job.input for job in stored(engine)] == [{"list": []}] * 3
    assert len({first.id, second.id, third.id}) == 3


def test_requests_that_stop_half_way_or_use_the_session_themselves(engine: sa.Engine, session: Session) -> None:
    def broken() -> Iterator[JobRequest]:
        yield JobRequest("note")
        raise RuntimeError("no more")

    def creates_another() -> Iterator[JobRequest]:
        JobStore(session).create(COMPANY, job_type="first")
        yield JobRequest("note")

    with pytest.raises(RuntimeError, match="no more"):
        JobStore(session).create_many(COMPANY, broken())
    JobStore(session).create_many(COMPANY, creates_another())
    session.commit()
    assert [job.job_type for job in stored(engine)] == ["first", "note"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    inputs=st.lists(
        st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5), JSON, max_size=3),
        max_size=4,
    ),
    kind=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9).filter(str.strip),
)
def test_any_input_reads_back_as_it_does_after_create(engine: sa.Engine, inputs: list[Any], kind: str) -> None:
    def spelled(jobs: list[jobkit.Job]) -> list[str]:
        return [json.dumps([job.job_type, job.source_task_id, job.input], sort_keys=True) for job in jobs]

    with engine.connect() as connection:  # rolled back
        jobs = JobStore(connection)
        singly = [jobs.create("one", job_type=kind, input=input, source_task_id=kind) for input in inputs]
        together = jobs.create_many("many", [JobRequest(kind, input, kind) for input in inputs])
        read = [[jobs.get_by_id(job.id) for job in made] for made in (singly, together)]
        assert spelled(read[0]) == spelled(read[1]) == spelled(singly) == spelled(together)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (JobRequest(" "), ValueError, r"requests\[2\]: job_type is blank"),
        (JobRequest("note", {"x": float("nan")}), ValueError, r"requests\[2\]: input"),
        (JobRequest("note", {"x": "\0"}), ValueError, r"requests\[2\]: input contains a NUL"),
        (JobRequest("note", None, "\ud800"), ValueError, r"requests\[2\]: source_task_id"),
        (JobRequest(7), TypeError, r"requests\[2\]: job_type"),  # type: ignore[arg-type]
        (
            JobRequest("note", {"x": "y" * (1 << 20)}),
            ValueError,
            r"requests\[2\]: input cannot be stored: it is 1048584",
        ),
        (JobRequest("note", [1]), ValueError, r"requests\[2\]: input must be a JSON object"),  # type: ignore[arg-type]
        ({"job_type": "note"}, TypeError, r"requests\[2\] must be a JobRequest, not dict"),
        (None, TypeError, r"requests\[2\] must be a JobRequest, not NoneType"),
    ],
)
@pytest.mark.parametrize("chunk", [1_000, 1])
def test_one_bad_request_writes_nothing_and_is_named(
    engine: sa.Engine,
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    bad: Any,
    error: type[Exception],
    message: str,
    chunk: int,
) -> None:
    monkeypatch.setattr(requests_module, "MAX_CHUNK_JOBS", chunk)
    good, sent = JobRequest("note"), list[str]()
    with hearing(engine, lambda _, statement, __: sent.append(statement)), pytest.raises(error, match=message):
        JobStore(session).create_many(COMPANY, [good, good, bad, good])
    assert sent == []  # on SQLite the host's transaction has not even begun to write
    session.commit()
    assert stored(engine) == []


def test_every_input_is_copied_as_it_is_drawn_and_before_the_first_is_written(
    engine: sa.Engine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "MAX_CHUNK_JOBS", 2)
    shared: dict[str, Any] = {}

    def reusing() -> Iterator[JobRequest]:
        for number in range(5):
            shared["n"] = number
            yield JobRequest("note", shared)

    assert [job.input["n"] for job in JobStore(session).create_many(COMPANY, reusing())] == [0, 1, 2, 3, 4]
    with hearing(engine, lambda *_: shared.update(n=99)):
        made = JobStore(session).create_many(COMPANY, [JobRequest("note", shared)] * 5)
    assert [job.input["n"] for job in made] == [4] * 5
    session.commit()
    assert [job.input["n"] for job in stored(engine)] == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]


class Urgency(int, enum.Enum):
    HIGH = 5


class Loud(int):
    def __str__(self) -> str:
        return "loud"


@pytest.mark.parametrize("priority", [Urgency.HIGH, Loud(5), 5])
def test_a_priority_is_its_number_whatever_it_prints(engine: sa.Engine, session: Session, priority: int) -> None:
    JobStore(session).create(COMPANY, job_type="note", priority=priority)
    JobStore(session).create_many(COMPANY, [JobRequest("note", priority=priority)] * 2)
    session.commit()
    assert [job.priority for job in stored(engine)] == [5, 5, 5]


def test_everything_that_a_job_has_counts_for_a_chunk(
    engine: sa.Engine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "MAX_CHUNK_CHARACTERS", 10_000)
    longest: list[int] = []
    insert = requests_module.Chunk

    def measured(jobs: Any, keyed: Any, array: str) -> requests_module.Chunk:
        longest.append(len(array))
        return insert(jobs, keyed, array)

    monkeypatch.setattr(requests_module, "Chunk", measured)
    created = JobStore(session).create_many(COMPANY, [JobRequest("note", source_task_id="x" * 3_000)] * 9)
    session.commit()
    assert stored(engine) == created
    assert len(longest) == 3
    assert max(longest) < 10_100


def test_a_chunk_that_the_database_refuses_takes_the_earlier_chunks_with_it(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "MAX_CHUNK_JOBS", 2)
    with engine.begin() as connection:
        JobStore(connection).create(COMPANY, job_type="before")
        first = jobkit.base.ids.new_id()
        ids = iter([first, jobkit.base.ids.new_id(), jobkit.base.ids.new_id(), first])
        monkeypatch.setattr(requests_module, "new_number", lambda: next(ids).int)
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
