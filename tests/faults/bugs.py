"""Bugs to plant into the workers of a chaos run, each as a function that the process calls from which they are forked.

Without the test that each of them is seen, a verdict would prove nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobkit import signals
from jobkit.assets import intents
from jobkit.assets.intents import GarbageCollector
from jobkit.assets.spool import StagedFile
from jobkit.db.dialects.base import EventRow
from jobkit.db.dialects.postgresql import jobs as postgresql
from jobkit.db.dialects.sql import Sql
from jobkit.db.dialects.sqlite import jobs as sqlite
from jobkit.db.host import connection_of
from jobkit.jobs import claims
from jobkit.jobs.store import JobStore
from jobkit.runner.pipeline import Pipeline
from jobkit.runner.turns import Committer
from jobkit.storage.local import LocalStorage
from jobkit.storage.remote import FsspecStorage
from jobkit.tables import content_job_events, content_jobs
from jobkit.tables import now as database_now

VARIABLE = "JOBKIT_TEST_PLANTED"


def plant() -> None:
    """Plant the bugs that the environment names."""
    for name in os.environ[VARIABLE].split():
        globals()[name]()


def rewrite(statement: Sql, before: str, after: str) -> None:
    """Put ``after`` in the place of ``before``, which must be there."""
    assert before in statement._template, before
    statement._template = statement._template.replace(before, after)


def unfenced_finish() -> None:
    """A worker ends its job whoever has claimed it since, as long as that is running."""
    rewrite(sqlite.FINISH, "AND fence = json_extract(f.value, '$.fence')", "")
    rewrite(postgresql.FINISH, "AND j.fence = f.fence", "")


def finish_by_id() -> None:
    """A worker ends its job whatever has become of it."""
    unfenced_finish()
    rewrite(sqlite.FINISH, "AND {s}content_jobs.status = 'running'", "")
    rewrite(postgresql.FINISH, "AND j.status = 'running'", "")


def unguarded_rescue() -> None:
    """Which jobs are lost is read first; when they are taken, nobody looks again."""
    guarded, c = claims.rescue, content_jobs.c

    def rescue(connection: sa.Connection, **options: Any) -> list[EventRow]:
        lost = sa.select(c.id).where(c.status == "running", c.lease_until < database_now)
        found = connection.execute(lost).scalars().all()
        threading.Event().wait(0.3)
        taken = content_jobs.update().where(c.id.in_(found))
        connection.execute(taken.values(status="running", lease_until=database_now))
        threading.Event().wait(0.01)  # by which the lease is over
        return guarded(connection, **options)

    claims.rescue = rescue


def fence_reset() -> None:
    """Who rescues a job starts counting its claims anew."""
    rewrite(sqlite.RESCUE, "SET status = CASE", "SET fence = 0, status = CASE")
    rewrite(postgresql.RESCUE, "SET status = CASE", "SET fence = 0, status = CASE")


def attempt_charged() -> None:
    """A lost worker counts as an attempt."""
    rewrite(sqlite.RESCUE, "THEN attempt - 1 ELSE attempt END", "THEN attempt ELSE attempt END")
    rewrite(postgresql.RESCUE, "THEN j.attempt - 1", "THEN j.attempt")


def no_rescue() -> None:
    """Nobody takes the jobs of lost workers."""
    claims.rescue = lambda *_, **__: []


def no_intents() -> None:
    """A file is stored though nobody has recorded its key."""
    seal = StagedFile.seal
    StagedFile.seal = lambda draft, *, recorded: seal(draft, recorded=False)  # type: ignore[method-assign]
    intents.record_intents = lambda *_: None


def hasty_sweep() -> None:
    """A sweep takes the keys of files that are just being stored."""
    GarbageCollector._early = lambda sweep, state: intents.INTENT_GRACE if state == "pending" else 0.0  # type: ignore[method-assign]


def event_outside() -> None:
    """The event of an end follows in a transaction of its own."""
    finish, commit = claims.finish, Committer.commit
    late: list[dict[str, Any]] = []

    def finish_without(connection: sa.Connection, completions: Any, **options: Any) -> claims.Ended:
        ended = finish(connection, completions, **options)
        which = content_job_events.c.id.in_([event.id for event in ended.events])
        late.extend(dict(row) for row in connection.execute(sa.select(content_job_events).where(which)).mappings())
        connection.execute(content_job_events.delete().where(which))
        return ended

    def commit_and_tell(self: Committer, turn: Any) -> Any:
        committed = commit(self, turn)
        if late:
            with self.link.use() as connection, connection.begin():
                connection.execute(content_job_events.insert(), late)
            late.clear()
        return committed

    claims.finish = finish_without
    Committer.commit = commit_and_tell  # type: ignore[method-assign]


def told_before_the_commit() -> None:
    """Receivers hear of an end while its transaction is open."""
    finish, start = claims.finish, Pipeline.__init__
    tell: list[Any] = []

    def remember(self: Pipeline, *args: Any, **options: Any) -> None:
        tell.append(options["on_commit"])
        start(self, *args, **options)

    def finish_and_tell(connection: sa.Connection, completions: Any, **options: Any) -> claims.Ended:
        ended = finish(connection, completions, **options)
        tell[-1](ended.events)
        threading.Event().wait(0.02)
        return ended

    claims.finish = finish_and_tell
    Pipeline.__init__ = remember  # type: ignore[method-assign]


def deaf() -> None:
    """One in thirty events becomes no signal."""
    deliver = signals.deliver
    signals.deliver = lambda events, *origin: deliver((event for event in events if event.id % 30), *origin)


def hurried() -> None:
    """A receiver hears two events of a batch in the wrong order."""
    deliver = signals.deliver
    signals.deliver = lambda events, *origin: deliver(reversed(list(events)), *origin)


def spoiled() -> None:
    """A storage keeps as many bytes as it got, and not the same ones."""
    for storage in (LocalStorage, FsspecStorage):
        publish = storage.publish

        def spoil(self: Any, uploads: Any, publish: Any = publish) -> Any:
            for path, key, _ in uploads:
                if UUID(key.rpartition("/")[2][:36]).int % 10 == 0:
                    path.write_bytes(path.read_bytes()[:-1] + b"?")
            return publish(self, uploads)

        storage.publish = spoil  # type: ignore[method-assign]


def committed_by_the_store() -> None:
    """``create`` commits by itself, so the host's rollback comes too late."""
    create = JobStore.create

    def create_and_commit(self: JobStore, *args: Any, **options: Any) -> Any:
        with connection_of(self._session).engine.begin() as connection:
            return create(JobStore(connection), *args, **options)

    JobStore.create = create_and_commit  # type: ignore[method-assign]


def last_file_as_result() -> None:
    """The result of a job is its last file."""
    job = claims._job

    def wrong(completion: Any) -> dict[str, Any]:
        ids: Sequence[UUID] = completion.asset_ids
        return {**job(completion), "asset": ids[-1].hex if ids else None}

    claims._job = wrong


def another_companys_event() -> None:
    """The event of a claim bears the name of another company."""
    claim = claims.claim

    def misname(connection: sa.Connection, **options: Any) -> Any:
        taken, events = claim(connection, **options)
        which = content_job_events.c.id.in_([event.id for event in events])
        connection.execute(content_job_events.update().where(which).values(company_id="nobody"))
        return taken, events

    claims.claim = misname
