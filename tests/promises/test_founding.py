"""The founding contract, row by row: each test names the row it holds, and runs on every database and storage."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Job, JobEvent, JobStore, Rendered, Renderers, Runner
from jobkit.base.text import error_message
from jobkit.tables import assets as assets_table
from jobkit.tables import content_jobs
from tests.support.recorder import Recorder

COMPANY = "acme"
Create = Callable[..., Job]


@pytest.fixture
def renderers() -> Renderers:
    """The seed's renderer for every job type."""
    return Renderers(default=lambda ctx: Rendered("placeholder.txt", "text/plain", b"placeholder output"))


@pytest.fixture
def runner(engine: sa.Engine, assets: AssetStore, renderers: Renderers) -> Iterator[Runner]:
    runner = Runner(engine, assets, renderers, poll_interval=0.05)
    yield runner
    runner.stop()


def fresh(engine: sa.Engine, job: Job) -> Job:
    with engine.connect() as connection:
        found = JobStore(connection).get_by_id(job.id)
    assert found is not None
    return found


# --- 4.1 and 4.2: the tables

COLUMNS = {
    "content_jobs": {
        "id": False,
        "company_id": False,
        "job_type": False,
        "status": False,
        "input": False,
        "result_asset_id": True,
        "error_message": True,
        "source_task_id": True,
        "started_at": True,
        "finished_at": True,
        "created_at": False,
        "updated_at": False,
    },
    "assets": {
        "id": False,
        "company_id": False,
        "provider": False,
        "object_key": False,
        "content_type": False,
        "byte_size": False,
        "sha256": False,
        "original_filename": True,
        "created_by_agent_id": True,
        "created_by_user_id": True,
        "source_task_id": True,
        "created_at": False,
        "updated_at": False,
    },
}


@pytest.mark.parametrize("table", COLUMNS)
def test_4_1_4_2_tables_have_the_columns_in_the_seeds_order_and_no_foreign_key(engine: sa.Engine, table: str) -> None:
    inspector = sa.inspect(engine)
    columns = {c["name"]: c["nullable"] for c in inspector.get_columns(table) if c["name"] in COLUMNS[table]}
    assert columns == COLUMNS[table]
    assert list(columns) == list(COLUMNS[table])
    assert inspector.get_foreign_keys(table) == []


def test_4_1_the_indexes_have_the_seeds_names_and_columns(engine: sa.Engine) -> None:
    found = {index["name"]: index["column_names"] for index in sa.inspect(engine).get_indexes("content_jobs")}
    assert found["content_jobs_company_status_idx"] == ["company_id", "status"]
    assert found["content_jobs_company_created_idx"] == ["company_id", "created_at"]


def test_4_1_statuses_are_the_seeds_four_in_order_then_cancelled() -> None:
    assert jobkit.CONTENT_JOB_STATUSES == ("queued", "running", "done", "failed", "cancelled")
    assert [jobkit.ContentJobStatus(status).value for status in jobkit.CONTENT_JOB_STATUSES] == [*jobkit.JobStatus]


def test_4_1_a_row_that_the_host_inserts_gets_the_seeds_defaults(engine: sa.Engine) -> None:
    job_id = jobkit.base.ids.new_id()
    with engine.begin() as connection:
        values = {"id": job_id, "company_id": COMPANY, "job_type": "diagram"}
        connection.execute(sa.insert(content_jobs).values(values))
        job = JobStore(connection).get_by_id(job_id)
    assert job is not None
    assert (job.status, job.input, job.fence, job.attempt) == ("queued", {}, 0, 0)
    assert abs(job.created_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert job.updated_at.utcoffset() == timedelta(0)


def test_4_2_object_keys_are_unique_in_a_company_and_sizes_pass_four_gigabytes(
    engine: sa.Engine, assets: AssetStore
) -> None:
    stored = assets.put_file(COMPANY, original_filename="a.txt", content_type="text/plain", body=b"x")
    with engine.begin() as connection:
        asset = assets.create(connection, COMPANY, stored, source_task_id="task-7")
        connection.execute(assets_table.update().values(byte_size=5 << 30))
        found = assets.get_by_id(connection, asset.id)
        assert found is not None
        assert (found.byte_size, found.source_task_id) == (5 << 30, "task-7")
        row = dict(connection.execute(sa.select(assets_table)).mappings().one()) | {"id": jobkit.base.ids.new_id()}
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
        connection.execute(assets_table.insert(), row)


def test_4_2_source_task_id_has_to_be_said_when_an_asset_is_created(engine: sa.Engine, assets: AssetStore) -> None:
    stored = assets.put_file(COMPANY, original_filename="a.txt", content_type="text/plain", body=b"x")
    with engine.begin() as connection, pytest.raises(TypeError, match="source_task_id"):
        assets.create(connection, COMPANY, stored)  # type: ignore[call-arg]


# --- 4.3, 4.4: constants


def test_4_3_event_types_begin_with_the_seeds_four_in_order() -> None:
    seeds = ("content_job.queued", "content_job.running", "content_job.done", "content_job.failed")
    assert jobkit.CONTENT_JOB_EVENTS[:4] == seeds
    for name in jobkit.CONTENT_JOB_EVENTS:
        assert getattr(jobkit.signals, name.replace(".", "_")).name == name


def test_4_4_the_limit_is_500_mebibytes_read_once_and_independent_of_attachments() -> None:
    code = (
        "import os; os.environ['PAPERCLIP_ATTACHMENT_MAX_BYTES'] = '7'; import jobkit; "
        "os.environ['PAPERCLIP_GENERATED_ASSET_MAX_BYTES'] = '9'; print(jobkit.MAX_GENERATED_ASSET_BYTES)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    assert ran.stdout.strip() == str(500 * 1024 * 1024) == "524288000"


@pytest.mark.parametrize(("size", "status"), [(100, "done"), (101, "failed")])
def test_4_4_a_file_of_exactly_the_limit_passes_and_one_byte_more_fails_before_storage(
    engine: sa.Engine, storage_url: str, tmp_path: Path, create: Create, size: int, status: str
) -> None:
    store = AssetStore(storage_url, max_bytes=100)
    renderers = Renderers(default=lambda ctx: Rendered("a.bin", "application/octet-stream", b"x" * size))
    job = create()
    Runner(engine, store, renderers).run_until_idle(timeout=60)
    job = fresh(engine, job)
    assert job.status == status
    with engine.connect() as connection:
        intents = connection.execute(sa.select(sa.func.count()).select_from(jobkit.tables.asset_intents)).scalar_one()
    assert intents == 0
    if status == "failed":
        assert re.search(r"'a.bin' .* 100 bytes", job.error_message or "")


# --- 4.5: the store


def test_4_5_create_returns_the_row_with_status_and_times(engine: sa.Engine, session: Session) -> None:
    job = JobStore(session).create(
        COMPANY, job_type="diagram", input={"text": "a -> b"}, source_task_id="conversation-1"
    )
    session.commit()
    assert (job.status, job.input, job.source_task_id) == ("queued", {"text": "a -> b"}, "conversation-1")
    assert (job.started_at, job.finished_at, job.result_asset_id, job.error_message) == (None, None, None, None)
    assert fresh(engine, job) == job


@pytest.mark.parametrize("job_id", ["", "42", "not-a-uuid", "00000000-0000-0000-0000-00000000000g"])
def test_4_5_a_malformed_id_is_not_found_and_leaves_the_transaction_usable(session: Session, job_id: str) -> None:
    jobs = JobStore(session)
    assert jobs.get_by_id(job_id) is None
    with pytest.raises(jobkit.JobNotFound):
        jobs.transition(job_id, status="failed")
    assert jobs.create(COMPANY, job_type="diagram").status == "queued"


def test_4_5_a_company_lists_its_own_jobs_newest_first(session: Session) -> None:
    jobs = JobStore(session)
    created = [jobs.create(COMPANY, job_type="diagram", input={"n": n}) for n in range(5)]
    jobs.create("other", job_type="diagram")
    assert [job.id for job in jobs.list_by_company(COMPANY)] == [job.id for job in reversed(created)]
    assert jobs.list_by_company("unknown") == []


def test_4_5_transition_patches_only_the_seeds_columns_sets_updated_at_and_returns_the_row(session: Session) -> None:
    later = datetime(2040, 1, 1, tzinfo=UTC)
    job = JobStore(session).create(COMPANY, job_type="diagram")
    jobs = JobStore(session, clock=lambda: later)
    changed = jobs.transition(job.id, status="failed", error_message="no", finished_at=later)
    assert (changed.status, changed.error_message, changed.finished_at, changed.updated_at) == (
        "failed",
        "no",
        later,
        later,
    )
    for forbidden in ("id", "job_type", "created_at", "updated_at", "fence"):
        with pytest.raises(TypeError, match=forbidden):
            jobs.transition(job.id, **{forbidden: "x"})
    with pytest.raises(ValueError, match="nonsense"):
        jobs.transition(job.id, expect="failed", status="nonsense")
    with pytest.raises(jobkit.JobNotFound):
        jobs.transition(jobkit.base.ids.new_id(), status="failed")
    with pytest.raises(jobkit.InvalidTransition):
        jobs.transition(job.id, status="queued")


# --- 4.6: renderers


def test_4_6_the_default_renderer_serves_every_job_type(renderers: Renderers) -> None:
    for job_type in ("diagram", "presentation"):
        assert renderers.render(job_type, {}) == [Rendered("placeholder.txt", "text/plain", b"placeholder output")]


def test_4_6_without_a_default_an_unknown_type_fails_the_job_and_names_it(
    engine: sa.Engine, assets: AssetStore, create: Create, recorder: Recorder
) -> None:
    job = create("wall-paper")
    Runner(engine, assets, Renderers()).run_until_idle(timeout=60)
    assert "'wall-paper'" in (fresh(engine, job).error_message or "")
    assert recorder.types(job.id) == ["queued", "running", "failed"]


def test_4_6_an_empty_file_fails_the_job(engine: sa.Engine, assets: AssetStore, create: Create) -> None:
    job = create()
    Runner(engine, assets, Renderers(default=lambda ctx: Rendered("a.txt", "text/plain", b""))).run_until_idle(
        timeout=60
    )
    assert fresh(engine, job).error_message == "'a.txt' is empty"


# --- 4.7: the runner


def test_4_7_dispatch_returns_nothing_at_once_and_the_work_happens_later(runner: Runner, create: Create) -> None:
    released = threading.Event()
    runner.renderers.register("slow")(lambda ctx: released.wait(60) and Rendered("a.txt", "text/plain", b"x"))
    job = create("slow")
    runner.start()
    try:
        assert runner.dispatch(job) is None  # type: ignore[func-returns-value]
        assert fresh(runner.engine, job).status in ("queued", "running")
    finally:
        released.set()
    runner.run_until_idle(timeout=60)
    assert fresh(runner.engine, job).status == "done"


def test_4_7_a_job_runs_queued_running_done_with_its_file_and_its_conversation(
    runner: Runner, assets: AssetStore, recorder: Recorder
) -> None:
    job = runner.submit(COMPANY, job_type="diagram", input={}, source_task_id="conversation-1")
    assert runner.run_until_idle(timeout=60) == 1
    done = fresh(runner.engine, job)
    with runner.engine.connect() as connection:
        (asset,) = assets.list_by_job(connection, job.id)
    assert (done.status, done.result_asset_id, done.error_message) == ("done", asset.id, None)
    assert done.started_at is not None
    assert done.finished_at is not None
    assert job.created_at <= done.started_at <= done.finished_at
    assert recorder.types(job.id) == ["queued", "running", "done"]
    assert recorder.events[-1].payload == {"jobId": str(job.id), "assetId": str(asset.id)}


def test_4_7_any_error_fails_the_job_with_its_message_and_without_a_file(
    engine: sa.Engine, assets: AssetStore, create: Create, recorder: Recorder
) -> None:
    def broken(ctx: jobkit.RenderContext) -> Rendered:
        raise KeyError("no such slide")

    job = create()
    Runner(engine, assets, Renderers(default=broken, describe_error=error_message)).run_until_idle(timeout=60)
    failed = fresh(engine, job)
    assert (failed.status, failed.error_message, failed.result_asset_id) == ("failed", "'no such slide'", None)
    assert failed.finished_at is not None
    assert recorder.events[-1].payload == {"jobId": str(job.id), "errorMessage": "'no such slide'"}
    with engine.connect() as connection:
        assert assets.list_by_company(connection, COMPANY) == []


def test_4_7_the_state_is_committed_before_it_is_published(runner: Runner) -> None:
    told: list[tuple[str, str]] = []

    def receive(company_id: str, *, event: JobEvent) -> None:
        with runner.engine.connect() as connection:
            job = JobStore(connection).get_by_id(event.job_id)
        assert job is not None
        told.append((event.type.removeprefix("content_job."), job.status.value))

    for signal in (
        jobkit.signals.content_job_queued,
        jobkit.signals.content_job_running,
        jobkit.signals.content_job_done,
    ):
        signal.connect(receive)
    for _ in range(20):
        runner.submit(COMPANY, job_type="diagram")
    runner.run_until_idle(timeout=60)
    order = list(jobkit.CONTENT_JOB_STATUSES)
    assert len(told) == 60
    assert all(order.index(state) >= order.index(kind) for kind, state in told)


def test_4_7_a_listener_that_throws_changes_nothing(runner: Runner, recorder: Recorder) -> None:
    def throw(company_id: str, *, event: JobEvent) -> None:
        raise RuntimeError("listener")

    jobkit.signals.content_job_done.connect(throw)
    job = runner.submit(COMPANY, job_type="diagram")
    runner.run_until_idle(timeout=60)
    assert fresh(runner.engine, job).status == "done"
    assert recorder.types(job.id) == ["queued", "running", "done"]


def test_4_7_dispatched_twice_or_when_terminal_it_runs_once(runner: Runner, recorder: Recorder) -> None:
    job = runner.submit(COMPANY, job_type="diagram")
    with runner:
        for _ in range(5):
            runner.dispatch(job)
        runner.run_until_idle(timeout=60)
        runner.dispatch(fresh(runner.engine, job))
        runner.run_until_idle(timeout=60)
    assert recorder.types(job.id) == ["queued", "running", "done"]


def test_4_7_a_job_whose_row_is_gone_is_left_alone(runner: Runner, create: Create, recorder: Recorder) -> None:
    job = create()
    with runner.engine.begin() as connection:
        connection.execute(sa.delete(content_jobs).where(content_jobs.c.id == job.id))
        connection.execute(sa.delete(jobkit.tables.content_job_events))
    with runner:
        runner.dispatch(job)
        runner.run_until_idle(timeout=60)
    assert recorder.types(job.id) == []


# --- 4.8: storing


def test_4_8_the_object_is_in_the_generated_namespace_and_the_row_says_what_was_stored(
    runner: Runner, assets: AssetStore, storage_url: str
) -> None:
    job = runner.submit(COMPANY, job_type="diagram", source_task_id="t")
    runner.run_until_idle(timeout=60)
    with runner.engine.connect() as connection:
        (asset,) = assets.list_by_job(connection, job.id, company_id=COMPANY)
    assert re.fullmatch(r"acme/generated/\d{4}/\d\d/\d\d/[0-9a-f-]{36}-placeholder\.txt", asset.object_key)
    body = b"placeholder output"
    assert (asset.content_type, asset.byte_size) == ("text/plain", len(body))
    assert (asset.sha256, asset.original_filename) == (hashlib.sha256(body).hexdigest(), "placeholder.txt")
    assert (asset.created_by_agent_id, asset.created_by_user_id, asset.source_task_id) == (None, None, "t")
    protocol = storage_url.partition("://")[0]
    assert asset.provider == {"file": "local_disk"}.get(protocol, protocol)
    with assets.open(asset) as file:
        assert file.read() == body


def test_4_8_a_file_over_ten_megabytes_is_stored_and_read_back(
    engine: sa.Engine, assets: AssetStore, create: Create
) -> None:
    body = bytes(range(256)) * 48_000
    job = create()
    renderers = Renderers(default=lambda ctx: Rendered("a.mp4", "video/mp4", body))
    Runner(engine, assets, renderers).run_until_idle(timeout=60)
    with engine.connect() as connection:
        (asset,) = assets.list_by_job(connection, job.id)
    assets.verify(asset)
    with assets.open(asset, start=12_000_000, end=12_000_256) as file:
        assert file.read() == body[12_000_000:12_000_256]


# --- 4.9: the bus


def test_4_9_payloads_and_the_wire_form_are_the_seeds(runner: Runner, recorder: Recorder) -> None:
    job = runner.submit(COMPANY, job_type="diagram")
    runner.run_until_idle(timeout=60)
    queued, running, done = (json.loads(json.dumps(event.to_dict())) for event in recorder.events)
    assert queued["payload"] == running["payload"] == {"jobId": str(job.id)}
    assert list(done) == ["id", "companyId", "type", "createdAt", "payload"]
    assert (done["companyId"], done["type"]) == (COMPANY, "content_job.done")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", done["createdAt"])
    assert [event.seq for event in recorder.events] == [1, 2, 3]
    assert len({event.id for event in recorder.events}) == 3


def test_4_9_a_subscriber_hears_its_company_only_until_it_unsubscribes(runner: Runner) -> None:
    heard: list[JobEvent] = []
    unsubscribe = jobkit.signals.subscribe(COMPANY, heard.append)
    runner.submit(COMPANY, job_type="diagram")
    runner.submit("other", job_type="diagram")
    runner.run_until_idle(timeout=60)
    unsubscribe()
    runner.submit(COMPANY, job_type="diagram")
    runner.run_until_idle(timeout=60)
    assert [(event.company_id, event.seq) for event in heard] == [(COMPANY, 1), (COMPANY, 2), (COMPANY, 3)]


# --- 4.11 and 4.12: prohibitions and surface


def test_4_12_what_the_seed_exports_is_at_the_top_level() -> None:
    for name in ("CONTENT_JOB_STATUSES", "ContentJobStatus", "MAX_GENERATED_ASSET_BYTES", "JobStore", "Runner"):
        assert name in jobkit.__all__
    assert jobkit.tables.content_jobs is jobkit.metadata.tables["content_jobs"]
    assert Renderers.render is not None


def test_4_12_the_lifecycle_by_hand_works_on_the_store_alone(session: Session) -> None:
    jobs = JobStore(session)
    now = datetime.now(UTC)
    job: Any = jobs.create(COMPANY, job_type="diagram")
    job = jobs.transition(job.id, expect="queued", status="running", started_at=now)
    assert (job.status, job.fence, job.lease_until) == ("running", 1, None)
    job = jobs.transition(job.id, expect="running", status="done", finished_at=now)
    assert (job.status, job.event_seq) == ("done", 3)
