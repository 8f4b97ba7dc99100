"""A worker process that dies by SIGKILL at a named step: ``python doomed.py URL FOLDER STEP [BUG]``.

A BUG is planted in this process only, to prove that the checks would see it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa

import jobkit
from jobkit.assets import intents
from jobkit.events.feed import Feed
from jobkit.jobs import claims
from jobkit.runner.pipeline import Pipeline
from jobkit.storage.local import LocalStorage
from jobkit.tables import assets, content_job_events, content_jobs

FIRST, SECOND = b"first " * 1000, b"second " * 1000


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def then_die(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> None:
        result = original(*args, **kwargs)
        if result != ([], []):  # a claim that found nothing
            die()

    setattr(owner, name, call)


def die_when_told_done() -> None:
    publish = Feed.publish

    def call(feed: Feed, rows: Any, **options: Any) -> None:
        if any(row.type == "content_job.done" for row in rows):
            die()
        publish(feed, rows, **options)

    Feed.publish = call  # type: ignore[method-assign]


STEPS: dict[str, Callable[[], None]] = {
    "in_claim": lambda: then_die(claims, "claim"),
    "after_claim": lambda: setattr(Pipeline, "_begin", die),
    "in_render": lambda: None,
    "after_intents": lambda: setattr(LocalStorage, "publish", die),
    "after_object": lambda: then_die(os, "replace"),
    "after_objects": lambda: then_die(LocalStorage, "publish"),
    "in_finish": lambda: then_die(claims, "finish"),
    "after_commit": die_when_told_done,
}


# --- planted bugs


def no_intents() -> None:
    intents.record_intents = lambda *_: None


def rows_before_the_finish() -> None:
    def call(connection: sa.Connection, completions: Any, **_: Any) -> None:
        done = completions[0]
        file = done.files[0]
        row = {name: getattr(file, name) for name in ("provider", "object_key", "content_type", "byte_size", "sha256")}
        row |= {"id": done.asset_ids[0], "job_id": done.claim.job_id, "company_id": done.claim.company_id}
        with connection.engine.begin() as early:
            early.execute(assets.insert(), row)
        die()

    claims.finish = call  # type: ignore[assignment]


def done_without_event() -> None:
    finish = claims.finish

    def call(connection: sa.Connection, completions: Any, **options: Any) -> Any:
        events = finish(connection, completions, **options)
        connection.execute(content_job_events.delete().where(content_job_events.c.type == "content_job.done"))
        return events

    claims.finish = call


def fence_not_raised() -> None:
    claim = claims.claim

    def call(connection: sa.Connection, **options: Any) -> Any:
        taken = claim(connection, **options)
        connection.execute(content_jobs.update().values(fence=0))
        return taken

    claims.claim = call


def written_in_place() -> None:
    def publish(storage: LocalStorage, uploads: Any) -> None:
        target = storage.root / uploads[0].key
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.write(uploads[0].path.read_bytes()[:100])
            file.flush()
            die()

    LocalStorage.publish = publish  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    "no_intents": no_intents,
    "rows_before_the_finish": rows_before_the_finish,
    "done_without_event": done_without_event,
    "fence_not_raised": fence_not_raised,
    "written_in_place": written_in_place,
}


def main(url: str, folder: str, step: str, bug: str | None = None) -> None:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        jobkit.configure_sqlite(engine)
    renderers = jobkit.Renderers()

    @renderers.register("pair")
    def pair(ctx: jobkit.RenderContext) -> Iterator[jobkit.Rendered]:
        yield jobkit.Rendered("first.txt", "text/plain", FIRST)
        if step == "in_render":
            yield jobkit.Rendered("second.txt", "text/plain", half())
        yield jobkit.Rendered("second.txt", "text/plain", SECOND)

    STEPS[step]()
    if bug is not None:
        BUGS[bug]()
    jobkit.signals.content_job_done.connect(print)
    jobkit.Runner(engine, jobkit.AssetStore(folder), renderers).run_until_idle(timeout=60)


def half() -> Iterator[bytes]:
    yield SECOND[: len(SECOND) // 2]
    die()


if __name__ == "__main__":
    main(*sys.argv[1:])
