"""Prune: deletes old ended jobs with their events and, when asked, their assets.

Jobs are read in pages and deleted in batches, each a short transaction that locks only the rows it deletes; a job that
was retried meanwhile is passed over. One row of the log, the mark, keeps the position up to which events may have been
deleted: a reader with an earlier cursor may have missed some.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import sqlalchemy as sa

from jobkit.assets.store import AssetStore
from jobkit.base.clock import CENTURY, Clock, seconds, utcnow
from jobkit.base.logs import job_fields
from jobkit.base.text import error_message
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import PruneCounts
from jobkit.db.host import require_schema, sync_engine
from jobkit.db.sqlite import refuse_deadlock

logger = logging.getLogger("jobkit")
# Jobs that one query reads, that one transaction deletes, and whose ids a report names.
PAGE = 5_000
BATCH = 100
SAMPLE = 10


@dataclass(frozen=True, slots=True)
class PruneReport:
    """How many jobs, events and asset rows ``prune`` deleted or, with ``dry_run``, would delete.

    ``refused``: jobs that were kept whole because rows of the host refer to them or to their assets; they are in no
    other count. ``sample``: the ids of up to ten of the jobs.
    """

    dry_run: bool
    jobs: int = 0
    events: int = 0
    assets: int = 0
    refused: int = 0
    sample: tuple[UUID, ...] = ()


def prune(
    engine: sa.Engine,
    *,
    older_than: timedelta | float,
    assets: AssetStore | None = None,
    dry_run: bool = True,
    on_batch: Callable[[PruneReport], object] | None = None,
    clock: Clock = utcnow,
) -> PruneReport:
    """Delete the jobs that ended (done, failed or cancelled) at least ``older_than`` ago (seconds or timedelta), with
    all their events. With ``dry_run``, only count them.

    A job ended at its ``finished_at``; one without it, ended by hand, at its last change. Idempotency keys of deleted
    jobs are free again. Asset rows stay, with the id of the deleted job, unless ``assets`` is given: then the assets in
    that store are deleted with their job, as by ``AssetStore.delete``, and their objects by a later garbage collection.

    Commits in short transactions of its own, and calls ``on_batch`` after each with the report so far; what that raises
    ends the call between two of them. Killed at any moment, it leaves each job whole or deleted. Rows that a
    host is changing are left to the next call. A ``Relay`` raises ``EventsPruned`` for a cursor before the newest
    deleted event: let ``older_than`` exceed the time that any process lags behind. ``ConfigurationError`` when this
    thread has an SQLite transaction that has written.
    """
    chosen = sync_engine(engine)
    age = seconds(older_than, "older_than", positive=False)
    if assets is not None and not isinstance(assets, AssetStore):
        raise TypeError(f"assets must be an AssetStore, not {type(assets).__name__}")
    refuse_deadlock(chosen, "prune", "call it outside")
    require_schema(chosen)
    before = clock() - timedelta(seconds=min(age, CENTURY))
    provider = None if assets is None else assets.provider
    return _Pruning(chosen, before, provider, dry_run=dry_run, on_batch=on_batch).run()


class _Pruning:
    def __init__(
        self,
        engine: sa.Engine,
        before: datetime,
        provider: str | None,
        *,
        dry_run: bool,
        on_batch: Callable[[PruneReport], object] | None,
    ) -> None:
        self._engine, self._before, self._provider, self._dry_run = engine, before, provider, dry_run
        self._on_batch = on_batch
        self._statements = statements_for(engine)
        self._jobs = self._events = self._assets = self._refused = 0
        self._sample: list[UUID] = []

    def run(self) -> PruneReport:
        last: UUID | None = UUID(int=0)
        while last is not None:
            with self._transaction() as connection:
                found, last = self._statements.ended_before(connection, before=self._before, after=last, limit=PAGE)
            for start in range(0, len(found), BATCH):
                self._batch(found[start : start + BATCH])
                if self._on_batch is not None:
                    self._on_batch(self._report())
        return self._report()

    def _report(self) -> PruneReport:
        return PruneReport(self._dry_run, self._jobs, self._events, self._assets, self._refused, tuple(self._sample))

    def _batch(self, jobs: Sequence[UUID]) -> None:
        if self._dry_run:
            with self._transaction() as connection:
                self._count(self._statements.count_related(connection, jobs, provider=self._provider))
            return
        began = time.monotonic()
        self._delete(jobs)
        if self._statements.one_writer:
            # SQLite's waiters poll for the lock: pause as long as it was held, or they would never find it free.
            time.sleep(time.monotonic() - began)

    def _delete(self, jobs: Sequence[UUID]) -> None:
        try:
            with self._transaction() as connection:
                gone = self._statements.prune(connection, jobs, before=self._before, provider=self._provider)
        except sa.exc.IntegrityError as error:
            # A row of the host refers to one of these jobs: halve the batch until that job is found.
            if len(jobs) > 1:
                middle = len(jobs) // 2
                self._delete(jobs[:middle])
                self._delete(jobs[middle:])
                return
            if not self._refused:
                message, fields = "job %s cannot be pruned, something refers to it: %s", job_fields(jobs[0])
                logger.warning(message, jobs[0], error_message(error), extra=fields)
            self._refused += 1
        else:
            self._count(gone)

    def _count(self, pruned: PruneCounts) -> None:
        self._jobs += len(pruned.jobs)
        self._events += pruned.events
        self._assets += pruned.assets
        self._sample += pruned.jobs[: SAMPLE - len(self._sample)]

    def _transaction(self) -> AbstractContextManager[sa.Connection]:
        engine = self._engine
        if engine.dialect.name == "postgresql":
            # Each statement must see what was committed before it, whatever isolation the host's engine has.
            engine = engine.execution_options(isolation_level="READ COMMITTED")
        return engine.begin()
