"""What is rendered and stored here is counted until it is through, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, Rendered, Runner
from jobkit.rendering.attempt import Attempt
from jobkit.runner.turns import Committed, Committer, Turn
from tests.support.invariants import violations
from tests.support.runners import note, only, seen, until

Create = Callable[..., jobkit.Job]


def test_a_job_claimed_again_while_its_first_files_are_stored_is_at_work_until_it_has_ended(
    engine: sa.Engine, disk: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storing, stored, publish = threading.Event(), threading.Event(), disk.storage.publish
    second, door, attempts = threading.Event(), threading.Event(), []

    def slow(uploads: Any) -> Any:
        if not storing.is_set():
            storing.set()
            assert stored.wait(60)
        return publish(uploads)

    def render(ctx: jobkit.RenderContext) -> Rendered:
        attempts.append(ctx)
        if len(attempts) > 1:
            second.set()
            assert door.wait(60)
        return note(ctx)

    monkeypatch.setattr(disk.storage, "publish", slow)
    with Runner(engine, disk, only(render), concurrency=1, poll_interval=0.05) as runner:
        job = create()
        assert storing.wait(60)
        with engine.begin() as connection:
            jobkit.JobStore(connection).transition(job.id, expect="running", status="queued")
        assert second.wait(60)
        assert runner._running is not None
        pipeline = runner._running.pipeline
        stored.set()
        try:
            until(lambda: not pipeline._store_stage._storing, "what was stored is forgotten")
            assert len(pipeline._render_stage.rendering) == 1
        finally:
            door.set()
        runner.run_until_idle(timeout=60)
    assert (seen(engine, job).status, seen(engine, job).fence) == ("done", 2)
    assert violations(engine, tmp_path / "assets") == []


def test_what_was_rendered_and_not_stored_when_a_runner_stops_leaves_no_file(
    engine: sa.Engine, disk: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, commit = threading.Event(), Committer.commit

    def away(self: Committer, turn: Turn) -> Committed:
        if turn.rendered:
            failed.set()
            raise sa.exc.OperationalError("COMMIT", {}, OSError("no route to host"))
        return commit(self, turn)

    discard = Attempt.discard

    def slowly(self: Attempt) -> None:
        threading.Event().wait(0.2)  # long enough for a stop that does not wait for it
        discard(self)

    monkeypatch.setattr(Committer, "commit", away)
    monkeypatch.setattr(Attempt, "discard", slowly)
    job = create()
    with Runner(engine, disk, only(note)) as runner:
        assert failed.wait(60)
        runner.stop(timeout=0)
    assert seen(engine, job).status == "queued"
    assert list(disk.spool_folder().iterdir()) == []
