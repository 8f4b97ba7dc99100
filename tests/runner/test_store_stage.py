"""Which jobs' files one thread stores together, and what becomes of each of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, Rendered, Runner
from jobkit.base.ids import new_id
from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import Registration, RenderEnvironment
from jobkit.runner.store_stage import MOST, StoreBatch, store_batches
from tests.support.invariants import violations
from tests.support.runners import only, seen, statuses

Create = Callable[..., jobkit.Job]


def attempt(store: AssetStore, *sizes: int) -> Attempt:
    """One whose renderer gave files of these sizes."""
    never: Any = None
    made = Attempt(
        Claim(new_id(), "acme", "note", {}, None, 1, 1),
        Registration(lambda ctx: [Rendered("a.txt", "text/plain", b"x" * size) for size in sizes]),
        RenderEnvironment(store, never, never),
    )
    made.run()
    return made


def test_an_attempt_that_is_over_is_gone_without_the_garbage_collector(disk: AssetStore) -> None:
    gc.disable()
    try:
        made = attempt(disk, 10)
        assert StoreBatch([made]).publish() == {}
        gone = weakref.ref(made)
        del made
        assert gone() is None
    finally:
        gc.enable()


def test_small_jobs_share_a_batch_and_each_large_one_has_its_own(disk: AssetStore) -> None:
    small, pair, large = attempt(disk, 10), attempt(disk, 5, 5), attempt(disk, 6, 5)
    try:
        assert [batch.attempts for batch in store_batches([small, large, pair], 10)] == [(small, pair), (large,)]
        assert [batch.attempts for batch in store_batches([small, pair], 0)] == [(small,), (pair,)]
        assert [len(batch.attempts) for batch in store_batches([small] * (2 * MOST + 1), 10)] == [MOST, MOST, 1]
        assert store_batches([], 10) == []
    finally:
        for made in (small, pair, large):
            made.discard()


def test_a_job_fails_with_any_of_its_files_and_the_spool_is_empty(
    disk: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = attempt(disk, 1, 2), attempt(disk, 3)
    error, publish = OSError("no room"), disk.storage.publish

    def failing(uploads: Any) -> Any:
        return publish([uploads[0], uploads[2]]) | {uploads[1].key: error}

    monkeypatch.setattr(disk.storage, "publish", failing)
    assert StoreBatch([first, second]).publish() == {first: error}
    assert list(disk.spool_folder().iterdir()) == []


def test_what_a_storage_raises_fails_every_job_of_the_batch(disk: AssetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, error = attempt(disk, 1), attempt(disk, 3), SystemExit("gone")

    def raises(uploads: Any) -> Any:
        raise error

    monkeypatch.setattr(disk.storage, "publish", raises)
    assert StoreBatch([first, second]).publish() == {first: error, second: error}
    assert list(disk.spool_folder().iterdir()) == []


def test_a_spool_file_that_cannot_be_removed_harms_no_job_of_the_batch(
    disk: AssetStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = attempt(disk, 1), attempt(disk, 3)
    error, publish, path = OSError("no room"), disk.storage.publish, first.drafts[0].spool.path
    path.unlink()
    path.mkdir()  # which unlink refuses
    monkeypatch.setattr(disk.storage, "publish", lambda uploads: publish(uploads[1:]) | {uploads[0].key: error})
    assert StoreBatch([first, second]).publish() == {first: error}
    assert list(disk.spool_folder().iterdir()) == [path]
    assert path.name in caplog.text
    path.rmdir()


def test_of_jobs_that_are_stored_together_one_fails_alone(
    engine: sa.Engine, disk: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [create(input={"n": number}) for number in range(12)]
    publish, sizes = disk.storage.publish, []

    def failing(uploads: Any) -> Any:
        sizes.append(len(uploads))
        bad = [upload for upload in uploads if "7" in upload.key.rpartition("-")[2]]
        return publish([upload for upload in uploads if upload not in bad]) | {
            upload.key: OSError("no room") for upload in bad
        }

    monkeypatch.setattr(disk.storage, "publish", failing)
    renderers = only(lambda ctx: Rendered(f"{ctx.input['n']}.txt", "text/plain", b"x"))
    assert Runner(engine, disk, renderers, concurrency=12).run_until_idle(timeout=60) == 12
    assert sum(sizes) == 12
    assert max(sizes) > 1
    assert statuses(engine).count("done") == 11
    assert seen(engine, jobs[7]).error_message == "no room"
    assert violations(engine, disk.spool_folder().parents[1]) == []
