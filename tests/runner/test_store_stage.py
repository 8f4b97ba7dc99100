"""Which jobs' files one thread stores together, and what becomes of each of them."""

from __future__ import annotations

import errno
import gc
import os
import stat
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
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
from tests.support.runners import note, only, seen, statuses, until

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


def test_a_job_fails_with_any_of_its_files_and_its_spool_files_can_be_discarded(
    disk: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = attempt(disk, 1, 2), attempt(disk, 3)
    error, publish = OSError("no room"), disk.storage.publish

    def failing(uploads: Any) -> Any:
        return publish([uploads[0], uploads[2]]) | {uploads[1].key: error}

    monkeypatch.setattr(disk.storage, "publish", failing)
    assert StoreBatch([first, second]).publish() == {first: error}
    first.discard()
    assert list(disk.spool_folder().iterdir()) == []


def test_what_a_storage_raises_fails_every_job_of_the_batch(disk: AssetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, error = attempt(disk, 1), attempt(disk, 3), SystemExit("gone")

    def raises(uploads: Any) -> Any:
        raise error

    monkeypatch.setattr(disk.storage, "publish", raises)
    assert StoreBatch([first, second]).publish() == {first: error, second: error}
    monkeypatch.undo()
    assert StoreBatch([first, second]).publish() == {}  # the files were kept, and can be stored again
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
    first.discard()
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


# --- a storage that fails for a while


class Away:
    """A storage that fails from its first call until it is let go."""

    def __init__(self, store: AssetStore, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.tries, self.away = 0, True
        publish = store.storage.publish

        def failing(uploads: Any) -> Any:
            if not self.away:
                return publish(uploads)
            self.tries += 1
            return {upload.key: error for upload in uploads}

        monkeypatch.setattr(store.storage, "publish", failing)


def unfinished(store: AssetStore) -> list[Path]:
    """The spool files."""
    return [path for path in store.spool_folder().iterdir() if path.is_file()]


@pytest.fixture
def store(patient: None, tmp_path: Path) -> AssetStore:
    return AssetStore(tmp_path / "assets")


@pytest.mark.parametrize(
    "error", [OSError("no route"), PermissionError("expired"), TimeoutError(), jobkit.AssetError("kept 3 of 5 bytes")]
)
def test_a_storage_that_is_away_for_a_while_costs_no_job(
    error: BaseException, engine: sa.Engine, store: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    renders: Counter[Any] = Counter()

    def renderer(ctx: jobkit.RenderContext) -> list[Rendered]:
        renders[ctx.job_id] += 1
        return [note(ctx), Rendered("b.txt", "text/plain", b"b")]

    away = Away(store, monkeypatch, error)
    jobs = [create() for _ in range(9)]
    with Runner(engine, store, only(renderer)):
        until(lambda: away.tries >= 6, "tries")
        away.away = False
        until(lambda: statuses(engine) == ["done"] * 9)
    assert renders == {job.id: 1 for job in jobs}
    assert violations(engine, store.spool_folder().parents[1]) == []
    assert unfinished(store) == []


def test_a_storage_that_stays_away_fails_the_job_after_a_lease_and_leaves_no_spool_file(
    engine: sa.Engine, store: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, job = Away(store, monkeypatch, OSError("no route")), create()
    with Runner(engine, store, only(note), lease=1.5):
        until(lambda: seen(engine, job).status == "failed")
        assert away.tries > 1
        assert unfinished(store) == []
    assert seen(engine, job).error_message


@pytest.mark.parametrize("error", [jobkit.AssetKeyRefused("a link"), ValueError("no"), OSError(errno.EIO, "lost")])
def test_what_a_storage_refuses_for_good_is_not_tried_again(
    error: BaseException, engine: sa.Engine, store: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, job = Away(store, monkeypatch, error), create()
    assert Runner(engine, store, only(note)).run_until_idle(60) == 1
    assert (seen(engine, job).status, away.tries) == ("failed", 1)


def test_a_job_that_is_cancelled_while_its_files_wait_is_cancelled(
    engine: sa.Engine, store: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, job = Away(store, monkeypatch, OSError("no route")), create()
    with Runner(engine, store, only(note)):
        until(lambda: away.tries > 0)
        with engine.begin() as connection:
            jobkit.JobStore(connection).cancel(job.id)
        until(lambda: seen(engine, job).status == "cancelled")
        assert unfinished(store) == []


def test_a_runner_that_stops_while_files_wait_gives_the_job_back_and_leaves_no_spool_file(
    engine: sa.Engine, store: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, job = Away(store, monkeypatch, OSError("no route")), create()
    runner = Runner(engine, store, only(note)).start()
    until(lambda: away.tries > 0)
    runner.stop(0)
    assert seen(engine, job).status == "queued"
    assert unfinished(store) == []


def test_a_folder_that_could_not_be_flushed_is_flushed_again(
    engine: sa.Engine, store: AssetStore, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file was renamed to its key, and the error came afterwards: there is nothing left to move.
    fsync, failed = os.fsync, []

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and not failed:
            failed.append(descriptor)
            raise OSError(errno.ENOSPC, "no room")
        fsync(descriptor)

    first = create()
    with Runner(engine, store, only(note)):
        until(lambda: seen(engine, first).status == "done")  # the folders exist from now on
        monkeypatch.setattr(os, "fsync", failing)
        second = create()
        until(lambda: seen(engine, second).status == "done")
    assert failed
    assert violations(engine, store.spool_folder().parents[1]) == []
