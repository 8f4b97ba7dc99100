"""JobStore on both databases: what it creates, finds and changes, and every error with the same words on both."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import CONTENT_JOB_STATUSES, ContentJobStatus, InvalidTransition, Job, JobNotFound, JobStatus, JobStore
from jobkit.base.ids import new_id
from jobkit.jobs import claims
from jobkit.tables import assets, content_job_events, content_jobs
from tests.support import shared as module_database

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ABSENT = UUID("0190163d-8694-739b-aea5-966c26f8ad91")

Create = Callable[..., Job]


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def tick(self, **duration: float) -> datetime:
        self.now += timedelta(**(duration or {"seconds": 1}))
        return self.now


shared, database = module_database.shared, module_database.database


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(session: Session, clock: Clock) -> JobStore:
    return JobStore(session, clock=clock)


def events(session: Session, job_id: UUID) -> list[tuple[int, str, dict[str, Any]]]:
    """The job's event log: seq, type without its prefix, payload."""
    table = content_job_events
    rows = session.execute(sa.select(table).where(table.c.job_id == job_id).order_by(table.c.seq))
    return [(row.seq, row.type.removeprefix("content_job."), row.payload) for row in rows]


# --- statuses


def test_the_statuses_are_the_seeds_four_in_its_order_and_cancelled() -> None:
    assert CONTENT_JOB_STATUSES == ("queued", "running", "done", "failed", "cancelled")
    assert tuple(JobStatus) == CONTENT_JOB_STATUSES
    assert ContentJobStatus is JobStatus
    assert f"{JobStatus.DONE}" == "done"
    assert JobStatus("queued") is JobStatus.QUEUED
    assert [status for status in JobStatus if status.terminal] == ["done", "failed", "cancelled"]


# --- create


@pytest.mark.parametrize("company_id", ["acme", 7, UUID(int=7)])
def test_a_created_job_is_queued_and_reads_back_as_returned(
    session: Session, jobs: JobStore, clock: Clock, company_id: object
) -> None:
    job = jobs.create(company_id, job_type="note", input={"title": "Hi"}, source_task_id="task-1")
    assert (job.company_id, job.job_type, job.status) == (str(company_id), "note", JobStatus.QUEUED)
    assert (job.input, job.source_task_id) == ({"title": "Hi"}, "task-1")
    assert (job.created_at, job.updated_at) == (clock.now, clock.now)
    assert (job.fence, job.attempt, job.rescues, job.priority, job.event_seq) == (0, 0, 0, 0, 1)
    assert isinstance(job.id, UUID)
    assert jobs.get_by_id(job.id) == job
    assert events(session, job.id) == [(1, "queued", {"jobId": str(job.id)})]


def test_input_and_task_may_be_left_out(jobs: JobStore) -> None:
    job = jobs.create("acme", job_type="note")
    assert (job.input, job.source_task_id, jobs.create("acme", job_type="note", source_task_id="").source_task_id) == (
        {},
        None,
        "",
    )


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"job_type": ""}, ValueError, "job_type is blank"),
    ({"job_type": " \t"}, ValueError, "job_type is blank"),
    ({"job_type": "a\0"}, ValueError, "job_type contains a NUL character"),
    ({"job_type": "\ud800"}, ValueError, "job_type contains a lone surrogate"),
    ({"job_type": "t" * 256}, ValueError, "job_type has 256 characters, the limit is 255"),
    ({"job_type": None}, TypeError, "job_type must be text, not NoneType"),
    ({"job_type": 7}, TypeError, "job_type must be text, not int"),
    ({"company_id": None}, ValueError, "company_id is missing"),
    ({"company_id": " "}, ValueError, "company_id is blank"),
    ({"company_id": "a\0"}, ValueError, "company_id contains a NUL character"),
    ({"company_id": "\ud800"}, ValueError, "company_id contains a lone surrogate"),
    ({"input": []}, ValueError, "input must be a JSON object (a dict), not list"),
    ({"source_task_id": "a\0"}, ValueError, "source_task_id contains a NUL character"),
    ({"source_task_id": "\udfff"}, ValueError, "source_task_id contains a lone surrogate"),
    ({"source_task_id": 7}, TypeError, "source_task_id must be text, not int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_refused_create_names_the_field_and_the_hosts_transaction_goes_on(
    session: Session, jobs: JobStore, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    kept = jobs.create("acme", job_type="kept")
    with pytest.raises(error) as refused:
        jobs.create(**{"company_id": "acme", "job_type": "note", **arguments})
    assert (refused.type, str(refused.value)) == (error, message)
    session.commit()
    assert session.scalars(sa.select(content_jobs.c.id)).all() == [kept.id]
    assert session.scalars(sa.select(content_job_events.c.job_id)).all() == [kept.id]


# --- get_by_id


def test_an_id_is_found_as_uuid_and_in_every_spelling(jobs: JobStore) -> None:
    job = jobs.create("acme", job_type="note")
    assert [jobs.get_by_id(i) for i in (job.id, str(job.id), str(job.id).upper(), job.id.hex)] == [job] * 4  # type: ignore[arg-type]


MALFORMED = ["", "nope", "\0", "\ud800", "1" * 33, "%", "' OR ''='", None, 7, 7.5, b"0" * 16, [], {}]


@pytest.mark.parametrize("job_id", [ABSENT, str(ABSENT), *MALFORMED], ids=repr)
def test_an_unknown_or_malformed_id_is_not_found_and_breaks_no_transaction(
    session: Session, jobs: JobStore, job_id: Any
) -> None:
    kept = jobs.create("acme", job_type="kept")
    assert jobs.get_by_id(job_id) is None
    if job_id is not None:
        with pytest.raises(JobNotFound) as before:
            jobs.list_by_company("acme", before=job_id)
        assert str(before.value) == f"no job {job_id}"
    with pytest.raises(JobNotFound) as changed:
        jobs.transition(job_id, status="running")
    assert str(changed.value) == f"no job {job_id}"
    assert isinstance(changed.value, LookupError)
    session.commit()
    assert jobs.get_by_id(kept.id) == kept


def test_a_job_is_found_only_under_its_own_company_when_one_is_named(jobs: JobStore) -> None:
    job = jobs.create(7, job_type="note")
    assert jobs.get_by_id(job.id, company_id=7) == jobs.get_by_id(job.id, company_id="7") == job
    assert jobs.get_by_id(job.id, company_id="8") is None
    assert jobs.get_by_id(job.id, company_id="' OR ''='") is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"company_id": None}, ValueError, "company_id is missing"),
        ({"job_type": "a\0"}, ValueError, "job_type contains a NUL character"),
        ({"job_type": 7}, TypeError, "job_type must be text, not int"),
        ({"status": "lost"}, ValueError, "status must be one of queued, running, done, failed, cancelled, not 'lost'"),
        ({"status": 7}, ValueError, "status must be one of queued, running, done, failed, cancelled, not 7"),
        ({"limit": -1}, ValueError, "limit must be a count, not -1"),
        ({"limit": True}, ValueError, "limit must be a count, not True"),
        ({"limit": 2.0}, ValueError, "limit must be a count, not 2.0"),
        ({"limit": "5"}, ValueError, "limit must be a count, not '5'"),
    ],
    ids=repr,
)
def test_a_wrong_filter_is_refused_alike_and_breaks_no_transaction(
    session: Session, jobs: JobStore, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    kept = jobs.create("acme", job_type="kept")
    with pytest.raises(error) as refused:
        jobs.list_by_company(**{"company_id": "acme", **arguments})
    assert str(refused.value) == message
    session.commit()
    assert jobs.list_by_company("acme") == [kept]


@pytest.mark.parametrize("company_id", ["a\0b", "\ud800", "x" * 256], ids=ascii)
def test_a_company_that_no_job_can_have_has_none_and_breaks_no_transaction(
    session: Session, jobs: JobStore, company_id: str
) -> None:
    job = jobs.create("acme", job_type="note")
    assert jobs.get_by_id(job.id, company_id=company_id) is None
    assert jobs.list_by_company(company_id) == []
    for refused in (
        lambda: jobs.list_by_company(company_id, before=job),
        lambda: jobs.cancel(job.id, company_id=company_id),
        lambda: jobs.retry(job.id, company_id=company_id),
    ):
        with pytest.raises(JobNotFound, match=str(job.id)):
            refused()
    session.commit()
    assert jobs.get_by_id(job.id) == job


# --- list_by_company


def test_a_list_has_the_companys_jobs_newest_first(jobs: JobStore, clock: Clock) -> None:
    made = [(clock.tick(), jobs.create("acme", job_type=kind))[1] for kind in ("note", "report", "note")]
    jobs.create("other", job_type="note")
    assert jobs.list_by_company("acme") == made[::-1]
    assert jobs.list_by_company("acme", job_type="note") == [made[2], made[0]]
    assert jobs.list_by_company("acme", limit=2) == [made[2], made[1]]
    assert jobs.list_by_company("acme", limit=0) == []
    assert jobs.list_by_company("acme", limit=10**30) == made[::-1]
    assert jobs.list_by_company("acme", before=made[1]) == [made[0]]
    assert jobs.list_by_company("nobody") == []
    running = jobs.transition(made[1].id, status="running")
    assert jobs.list_by_company("acme", status="running") == [running]
    assert jobs.list_by_company("acme", status=JobStatus.QUEUED, job_type="note", limit=1) == [made[2]]


def test_the_place_in_a_list_may_be_a_job_or_its_id_but_of_no_other_company(jobs: JobStore, clock: Clock) -> None:
    older, newer = ((clock.tick(), jobs.create("acme", job_type="note"))[1] for _ in range(2))
    foreign = jobs.create("other", job_type="note")
    for before in (newer, newer.id, str(newer.id)):
        assert jobs.list_by_company("acme", before=before) == [older]
    for before in (foreign, foreign.id, str(foreign.id)):
        with pytest.raises(JobNotFound) as refused:
            jobs.list_by_company("acme", before=before)
        assert str(refused.value) == f"no job {foreign.id}"


def test_a_thousand_jobs_of_one_moment_are_paged_through_without_loss_or_repeat(
    session: Session, jobs: JobStore, clock: Clock
) -> None:
    made = [jobs.create("acme", job_type="note") for _ in range(1_000)]
    session.commit()
    for by_id in (False, True):
        seen: list[UUID] = []
        before: Job | UUID | None = None
        while page := jobs.list_by_company("acme", limit=37, before=before):
            seen += [job.id for job in page]
            before = page[-1].id if by_id else page[-1]
        assert seen == [job.id for job in reversed(made)]


# --- transition


def test_entering_running_by_hand_is_a_claim_without_a_lease(session: Session, jobs: JobStore, clock: Clock) -> None:
    job = jobs.create("acme", job_type="note")
    moment = clock.tick()
    started = NOON.astimezone(timezone(timedelta(hours=9)))
    running = jobs.transition(str(job.id), expect="queued", status="running", started_at=started)
    assert (running.status, running.fence, running.lease_until, running.worker_id) == (JobStatus.RUNNING, 1, None, None)
    assert (running.started_at, running.updated_at, running.created_at) == (NOON, moment, job.created_at)
    assert jobs.get_by_id(job.id) == running
    assert jobs.transition(job.id, expect="running", status="queued").fence == 1
    assert jobs.transition(job.id, status=JobStatus.RUNNING).fence == 2
    assert [(seq, kind) for seq, kind, _ in events(session, job.id)] == list(
        enumerate(["queued", "running", "queued", "running"], start=1)
    )


@pytest.mark.parametrize(
    ("patch", "payload"),
    [
        ({"status": "done", "result_asset_id": str(ABSENT)}, {"assetId": str(ABSENT)}),
        ({"status": "done"}, {"assetId": None}),
        ({"status": "failed", "error_message": "no font"}, {"errorMessage": "no font"}),
        ({"status": "failed"}, {"errorMessage": None}),
        ({"status": "cancelled"}, {}),
    ],
)
def test_an_end_by_hand_tells_the_event_of_its_status(
    session: Session, jobs: JobStore, patch: dict[str, Any], payload: dict[str, Any]
) -> None:
    job = jobs.create("acme", job_type="note")
    ended = jobs.transition(job.id, finished_at=NOON, **patch)
    assert (ended.status, ended.finished_at, ended.event_seq) == (patch["status"], NOON, 2)
    assert events(session, job.id)[1:] == [(2, patch["status"], {"jobId": str(job.id), **payload})]


def test_a_change_without_a_change_of_status_tells_nothing(session: Session, jobs: JobStore, clock: Clock) -> None:
    job = jobs.create("acme", job_type="note")
    moment = clock.tick()
    changed = jobs.transition(job.id, status="queued", source_task_id="t", error_message="nul \0 and \ud800")
    assert (changed.source_task_id, changed.error_message) == ("t", "nul \ufffd and \ufffd")
    assert (changed.updated_at, changed.event_seq, changed.fence) == (moment, 1, 0)
    cleared = jobs.transition(job.id, source_task_id=None, error_message=None, started_at=None, result_asset_id=None)
    assert (cleared.source_task_id, cleared.error_message) == (None, None)
    assert len(events(session, job.id)) == 1


@pytest.mark.parametrize(
    ("patch", "error", "message"),
    [
        (
            {"fence": 9, "job_type": "x"},
            TypeError,
            "transition cannot change fence, job_type; it takes error_message, finished_at, result_asset_id, "
            "source_task_id, started_at, status",
        ),
        ({"status": "lost"}, ValueError, "status must be one of queued, running, done, failed, cancelled, not 'lost'"),
        ({"status": None}, ValueError, "status must be one of queued, running, done, failed, cancelled, not None"),
        ({"expect": "lost"}, ValueError, "status must be one of queued, running, done, failed, cancelled, not 'lost'"),
        (
            {"started_at": datetime(2026, 1, 1)},
            ValueError,
            "started_at must have a time zone, datetime.datetime(2026, 1, 1, 0, 0) has none",
        ),
        ({"finished_at": "2026-01-01"}, TypeError, "finished_at must be a datetime, not str"),
        ({"result_asset_id": "nope"}, ValueError, "result_asset_id is not a UUID: 'nope'"),
        ({"result_asset_id": 7}, ValueError, "result_asset_id is not a UUID: 7"),
        ({"source_task_id": "a\0"}, ValueError, "source_task_id contains a NUL character"),
        ({"source_task_id": 7}, TypeError, "source_task_id must be text, not int"),
    ],
    ids=repr,
)
def test_a_refused_change_changes_nothing_and_the_hosts_transaction_goes_on(
    session: Session, jobs: JobStore, clock: Clock, patch: dict[str, Any], error: type[Exception], message: str
) -> None:
    job = jobs.create("acme", job_type="note")
    clock.tick()
    with pytest.raises(error) as refused:
        jobs.transition(job.id, **{"error_message": "not written", **patch})
    assert (refused.type, str(refused.value)) == (error, message)
    session.commit()
    assert jobs.get_by_id(job.id) == job
    assert len(events(session, job.id)) == 1


@pytest.mark.parametrize(
    ("expect", "wanted"),
    [("running", "running"), (["running", JobStatus.DONE], "done, running"), ({"failed"}, "failed"), ((), "nothing")],
)
def test_a_job_that_is_not_as_expected_stays_as_it_is(
    session: Session, jobs: JobStore, clock: Clock, expect: Any, wanted: str
) -> None:
    job = jobs.create("acme", job_type="note")
    clock.tick()
    with pytest.raises(InvalidTransition) as refused:
        jobs.transition(job.id, expect=expect, status="done")
    assert str(refused.value) == f"job {job.id} is 'queued': expected {wanted}"
    session.commit()
    assert jobs.get_by_id(job.id) == job


@pytest.mark.parametrize("end", ["done", "failed", "cancelled"])
@pytest.mark.parametrize("status", CONTENT_JOB_STATUSES)
def test_an_ended_job_is_reopened_only_by_who_expects_its_end(jobs: JobStore, end: str, status: str) -> None:
    job = jobs.create("acme", job_type="note")
    ended = jobs.transition(job.id, status=end)
    if status == end:  # no change of status, so it needs no permission
        assert jobs.transition(job.id, status=status, error_message="more").event_seq == 2
        return
    with pytest.raises(InvalidTransition) as refused:
        jobs.transition(job.id, status=status)
    assert str(refused.value) == f"job {job.id} is {end!r}: name it in expect= to make it {status!r}"
    assert jobs.get_by_id(job.id) == ended
    assert jobs.transition(job.id, expect=end, status=status).status == status


@pytest.mark.parametrize("status", ["queued", "failed", "done", "cancelled"])
def test_leaving_running_by_hand_ends_the_runners_claim(engine: sa.Engine, create: Create, status: str) -> None:
    job = create()
    with engine.begin() as connection:
        [claim], _ = claims.claim(connection, limit=1, worker_id="w", lease=60, now=NOON)
    with engine.begin() as connection:
        left = JobStore(connection).transition(job.id, expect="running", status=status)
    assert (left.fence, left.lease_until, left.worker_id) == (1, None, None)
    file = jobkit.StoredObject("local_disk", "acme/k", "text/plain", 1, "0" * 64, None, recorded=False)
    with engine.begin() as connection:
        assert claims.finish(connection, [claims.Completion(claim, (file,))], now=NOON).events == []
        assert claims.finish(connection, [claims.failed(claim, "late")], now=NOON).events == []
        assert claims.release(connection, [claim], now=NOON) == []
        assert JobStore(connection).get_by_id(job.id) == left
        assert connection.scalar(sa.select(sa.func.count()).select_from(assets)) == 0


def test_a_claim_by_hand_outdates_a_claim_that_was_taken_back(engine: sa.Engine, create: Create) -> None:
    job = create()
    with engine.begin() as connection:
        [claim], _ = claims.claim(connection, limit=1, worker_id="w", lease=60, now=NOON)
    with engine.begin() as connection:
        JobStore(connection).transition(job.id, expect="running", status="queued")
        mine = JobStore(connection).transition(job.id, expect="queued", status="running")
    assert mine.fence == 2
    with engine.begin() as connection:
        assert claims.finish(connection, [claims.failed(claim, "late")], now=NOON).events == []
        assert JobStore(connection).get_by_id(job.id) == mine


@pytest.mark.parametrize("claimed", [False, True])
def test_a_change_made_between_the_look_and_the_write_is_seen(engine: sa.Engine, create: Create, claimed: bool) -> None:
    job = create()
    taken: list[claims.Claim] = []

    def move() -> None:
        """A runner's next step: claim, or fail, which leaves the fence as it is."""
        with engine.begin() as other:
            if taken:
                assert claims.finish(other, [claims.failed(taken[0], "no font")], now=NOON).events
            else:
                taken.extend(claims.claim(other, limit=1, worker_id="w", lease=60, now=NOON)[0])

    class Late(Clock):
        """Read between the look and the write; by then the runner has moved, once."""

        def __call__(self) -> datetime:
            if self.now == NOON:
                self.tick()
                move()
            return self.now

    if claimed:
        move()
    expected, found = ("running", "failed") if claimed else ("queued", "running")
    with engine.begin() as connection:
        with pytest.raises(InvalidTransition) as refused:
            JobStore(connection, clock=Late()).transition(job.id, expect=expected, status="cancelled")
        assert str(refused.value) == f"job {job.id} is {found!r}: expected {expected}"
        assert JobStore(connection).get_by_id(job.id).status == found  # type: ignore[union-attr]


# --- what a store works in


def test_the_store_takes_what_has_a_connection_and_says_so_otherwise(engine: sa.Engine) -> None:
    for wrong in (engine, None, "sqlite://"):
        with pytest.raises(TypeError, match=f"^expected a Session, .*, not {type(wrong).__name__}$"):
            JobStore(wrong).get_by_id(new_id())  # type: ignore[arg-type]
