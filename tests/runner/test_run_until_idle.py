"""run_until_idle, and receivers that use the runner they hear of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobEvent, JobStore, Relay, Runner, signals
from jobkit.runner.pipeline import Pipeline
from tests.support.databases import Database
from tests.support.invariants import violations
from tests.support.recorder import Recorder
from tests.support.runners import Gate, note, only, seen, statuses, until

Create = Callable[..., jobkit.Job]
WHOLE = ["queued", "running", "done"]


def no_threads() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("jobkit")]


def test_run_until_idle_does_what_is_queued_and_tells_of_all_of_it(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder, tmp_path: Path
) -> None:
    runner = Runner(engine, disk, only(), concurrency=3)
    assert runner.run_until_idle() == 0
    jobs = [create() for _ in range(20)]
    assert runner.run_until_idle(timeout=60) == 20
    assert [recorder.types(job.id) for job in jobs] == [WHOLE] * 20
    assert runner.run_until_idle(timeout=60) == 0
    until(no_threads)
    assert violations(engine, tmp_path / "assets") == []


def test_run_until_idle_includes_jobs_that_renderers_and_receivers_create(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    def parent(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        if ctx.input.get("children"):
            for _ in range(2):
                create(input={"children": ctx.input["children"] - 1})
        return note(ctx)

    def again(_: str, *, event: JobEvent) -> None:
        if len(echoes) < 5:
            echoes.append(create("echo"))

    echoes: list[jobkit.Job] = []
    create(input={"children": 2})
    with signals.content_job_done.connected_to(again):
        assert Runner(engine, disk, only(parent)).run_until_idle(timeout=60) == 7 + 5
    assert statuses(engine) == ["done"] * 12
    assert sorted(recorder.types()) == sorted(WHOLE * 12)


def test_a_job_that_a_receiver_creates_after_the_last_look_is_done_too(
    engine: sa.Engine, disk: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, original = threading.Event(), Pipeline.wait_idle

    def wait_idle(self: Pipeline, asked: int, timeout: float | None) -> bool:
        idle = original(self, asked, timeout)
        looked.set()
        return idle

    def late(_: str, *, event: JobEvent) -> None:
        if event.job_id == first.id:
            assert looked.wait(60)
            create("late")

    monkeypatch.setattr(Pipeline, "wait_idle", wait_idle)
    first = create()
    with signals.content_job_done.connected_to(late):
        assert Runner(engine, disk, only()).run_until_idle(timeout=60) == 2


def test_run_until_idle_on_a_started_runner_waits_for_its_jobs(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    with Runner(engine, disk, only()) as runner:
        jobs = [create() for _ in range(10)]
        runner.run_until_idle(timeout=60)
        assert [recorder.types(job.id) for job in jobs] == [WHOLE] * 10
        assert runner.run_until_idle(timeout=60) == 0
    until(no_threads)


@pytest.mark.parametrize("started", [False, True])
def test_concurrent_callers_do_every_job_once(
    started: bool, engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder, tmp_path: Path
) -> None:
    rendered: list[Any] = []

    def render(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        rendered.append(ctx.job_id)
        return note(ctx)

    runner = Runner(engine, disk, only(render))
    if started:
        runner.start()
    jobs = [create() for _ in range(40)]
    errors: list[BaseException] = []

    def call() -> None:
        try:
            runner.run_until_idle(timeout=60)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    runner.stop()
    assert sorted(rendered) == sorted(job.id for job in jobs)
    for job in jobs:
        assert recorder.types(job.id) in (WHOLE, WHOLE[1:])
    assert violations(engine, tmp_path / "assets") == []


def test_a_timeout_puts_the_jobs_back_unless_the_runner_is_started(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    job, gate = create(), Gate()
    runner = Runner(engine, disk, only(gate))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"in flight after 0\.3 s; 0 ended"):
        runner.run_until_idle(timeout=0.3)
    assert time.monotonic() - began < 30
    assert (seen(engine, job).status, seen(engine, job).attempt) == ("queued", 0)
    with runner:
        gate.entered(2)
        with pytest.raises(TimeoutError):
            runner.run_until_idle(timeout=0)
        assert seen(engine, job).status == "running"
        gate.open()
    assert seen(engine, job).status == "done"


def test_stop_ends_a_wait_for_idleness(engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    gate = Gate()
    runner = Runner(engine, disk, only(gate)).start()
    create()
    counts: list[int] = []
    waiting = threading.Thread(target=lambda: counts.append(runner.run_until_idle()), daemon=True)
    waiting.start()
    gate.entered()
    until(lambda: runner._running is not None and runner._running.pipeline._idle_requests > 0)
    runner.stop(timeout=0)
    waiting.join(60)
    gate.open()
    assert counts == [0]


def test_a_queued_event_that_a_relay_told_is_not_told_again(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    with Relay(engine):
        told, other = create(), create()
        recorder.wait(lambda types: len(types) == 2)
    later = create()
    assert Runner(engine, disk, only()).run_until_idle(timeout=60) == 3
    assert [recorder.types(job.id) for job in (told, other, later)] == [WHOLE] * 3


def test_a_database_made_anew_is_heard_from_its_first_event(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    runner = Runner(engine, disk, only())
    runner.submit("acme", job_type="note")
    jobkit.metadata.drop_all(engine)
    jobkit.metadata.create_all(engine)
    assert runner.submit("acme", job_type="note").event_seq == 1
    assert recorder.types() == ["queued", "queued"]
    assert {event.id for event in recorder.events} == {1}


# --- receivers that come back


@pytest.mark.parametrize("started", [False, True])
def test_a_receiver_may_submit_run_and_create(
    started: bool, engine: sa.Engine, disk: AssetStore, recorder: Recorder
) -> None:
    depth: list[str] = []

    def receiver(_: str, *, event: JobEvent) -> None:
        if len(depth) < 4:
            depth.append(event.type)
            with Session(engine) as session, session.begin():
                jobkit.JobStore(session).create("acme", job_type="note")
            runner.submit("acme", job_type="note")
            runner.run_until_idle(timeout=60)

    runner = Runner(engine, disk, only())
    with signals.content_job_done.connected_to(receiver):
        if started:
            runner.start()
        runner.submit("acme", job_type="note")
        runner.run_until_idle(timeout=60)
        recorder.wait(lambda types: types.count("done") == 9)
        runner.stop()
    assert len(depth) == 4
    assert statuses(engine) == ["done"] * 9
    by_job: dict[Any, list[int]] = {}
    for event in recorder.events:
        by_job.setdefault(event.job_id, []).append(event.seq)
    assert list(by_job.values()) == [[1, 2, 3]] * 9


def test_a_receiver_may_stop_the_runner(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder
) -> None:
    stopped: list[float] = []

    def receiver(_: str, *, event: JobEvent) -> None:
        began = time.monotonic()
        runner.stop()
        stopped.append(time.monotonic() - began)

    runner = Runner(engine, disk, only()).start()
    with signals.content_job_running.connected_to(receiver):
        job = create()
        runner.dispatch(job)
        recorder.wait(lambda types: "done" in types)
    assert len(stopped) == 1
    assert stopped[0] < 30
    assert recorder.types(job.id) == WHOLE
    until(no_threads)


def test_a_receiver_that_raises_changes_nothing_and_the_others_still_run(
    engine: sa.Engine, disk: AssetStore, create: Create, recorder: Recorder, tmp_path: Path
) -> None:
    def broken(_: str, *, event: JobEvent) -> None:
        raise SystemExit(f"no {event.type}")

    names = ["queued", "running", "done", "failed"]
    for name in names:
        getattr(signals, f"content_job_{name}").connect(broken)
    job = create()
    assert Runner(engine, disk, only()).run_until_idle(timeout=60) == 1
    assert recorder.types(job.id) == WHOLE
    assert (seen(engine, job).status, seen(engine, job).error_message) == ("done", None)
    assert violations(engine, tmp_path / "assets") == []


def test_stop_returns_after_its_events_were_delivered_also_when_a_relay_goes_on(
    engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    heard: list[str] = []

    def slow(_: str, *, event: JobEvent) -> None:
        if event.type == "content_job.running":
            until(lambda: runner._running is None)
            until(lambda: statuses(engine) == ["done"])
            threading.Event().wait(0.2)
        heard.append(event.type)

    runner = Runner(engine, disk, only())
    with Relay(engine), signals.content_job_running.connected_to(slow), signals.content_job_done.connected_to(slow):
        runner.start()
        create()
        until(lambda: statuses(engine) == ["done"])
        runner.stop()
        assert heard == ["content_job.running", "content_job.done"]


def test_two_databases_of_one_process_are_told_apart(
    sqlite_database: Database, postgres_database: Database, tmp_path: Path, recorder: Recorder
) -> None:
    runners = [
        Runner(database.engine, AssetStore(tmp_path / name), only())
        for name, database in (("a", sqlite_database), ("b", postgres_database))
    ]
    with runners[0], runners[1]:
        jobs = [runner.submit("acme", job_type="note") for runner in runners]
        recorder.wait(lambda types: types.count("done") == 2)
    assert [recorder.types(job.id) for job in jobs] == [WHOLE, WHOLE]


@pytest.mark.parametrize("receivers", [False, True])
def test_an_idle_runner_is_woken_by_a_job_that_somebody_else_commits(
    receivers: bool, database: Database, disk: AssetStore, request: pytest.FixtureRequest
) -> None:
    if receivers:
        request.getfixturevalue("recorder")
    other = database.connect()

    def idle() -> bool:
        return runner._running is not None and runner._running.pipeline._next_poll > time.monotonic() + 60

    with Runner(database.engine, disk, only(note), poll_interval=3600) as runner:
        until(idle)
        for count in (1, 2):
            with other.begin() as connection:
                JobStore(connection).create("acme", job_type="note")
            until(lambda count=count: runner.metrics().ended == count)  # type: ignore[misc]
            until(idle)
    assert statuses(database.engine) == ["done"] * 2
