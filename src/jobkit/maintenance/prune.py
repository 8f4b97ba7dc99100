"""Prune: old jobs that are over go, with their events and, when asked, their assets.

The table is read by pages, and what is old in a page is deleted in batches, each a short transaction of its own that
locks only what it deletes: a job that a host has just taken up again is passed over. What pruned events leave behind is
one row of the log, the mark: the position up to which events may be gone. A reader whose cursor lies before it has
missed some.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import sqlalchemy as sa

from jobkit.assets.store import AssetStore
from jobkit.base.clock import CENTURY, Clock, seconds, utcnow
from jobkit.base.text import error_message
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import PruneCounts
from jobkit.db.host import require_schema, sync_engine
from jobkit.db.sqlite import refuse_deadlock

logger = logging.getLogger("jobkit")

# How many jobs one look at the table reads, and how many one transaction deletes.
PAGE = 5_000
BATCH = 100
SAMPLE = 10


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What ``prune`` deleted or, when ``dry_run``, would delete: jobs, their events, and rows of assets.

    ``refused``: jobs that the database did not let go, because rows of the host refer to them or to their assets; they
    are whole, and count nowhere else. ``sample``: the ids of up to ten of the jobs.
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
    clock: Clock = utcnow,
) -> PruneReport:
    """Delete the jobs that ended ``older_than`` ago (seconds or timedelta) or before, done, failed or cancelled, with
    all their events; ``dry_run`` only counts them.

    When a job ended is its ``finished_at``; one that was ended by hand without it counts from its last change. Their
    idempotency keys are free again. Rows of assets stay, naming a job that is gone, unless ``assets`` is given: then
    those in that store go with their job, as by ``AssetStore.delete``, and their objects at a later sweep.

    Blocks on the database, in short transactions; beside everything else, and killed at any moment, it leaves each job
    whole or gone. What a host is changing at that moment is left for the next call. A cursor from before the newest
    event that was deleted is ``EventsPruned`` to a ``Relay``, so let ``older_than`` exceed the time that any process
    is behind. ``ConfigurationError`` within an SQLite transaction of this thread that has written.
    """
    chosen = sync_engine(engine)
    age = seconds(older_than, "older_than", positive=False)
    if assets is not None and not isinstance(assets, AssetStore):
        raise TypeError(f"assets must be an AssetStore, not {type(assets).__name__}")
    refuse_deadlock(chosen, "prune", "call it outside")
    require_schema(chosen)
    before = clock() - timedelta(seconds=min(age, CENTURY))
    return _Pruning(chosen, before, None if assets is None else assets.provider, dry_run=dry_run).run()


class _Pruning:
    def __init__(self, engine: sa.Engine, before: datetime, provider: str | None, *, dry_run: bool) -> None:
        self._engine, self._before, self._provider, self._dry_run = engine, before, provider, dry_run
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
        return PruneReport(self._dry_run, self._jobs, self._events, self._assets, self._refused, tuple(self._sample))

    def _batch(self, jobs: Sequence[UUID]) -> None:
        if self._dry_run:
            with self._transaction() as connection:
                self._count(self._statements.count_related(connection, jobs, provider=self._provider))
            return
        began = time.monotonic()
        self._delete(jobs)
        if self._statements.one_writer:
            # Those that wait for the lock look again only now and then, and would never find it free.
            time.sleep(time.monotonic() - began)

    def _delete(self, jobs: Sequence[UUID]) -> None:
        try:
            with self._transaction() as connection:
                gone = self._statements.prune(connection, jobs, before=self._before, provider=self._provider)
        except sa.exc.IntegrityError as error:
            # A row of the host's refers to one of them: the others go without it.
            if len(jobs) > 1:
                middle = len(jobs) // 2
                self._delete(jobs[:middle])
                self._delete(jobs[middle:])
                return
            if not self._refused:
                logger.warning("job %s cannot be pruned, something refers to it: %s", jobs[0], error_message(error))
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
            # Each statement has to see what was committed before it, whatever the host's transactions are to see.
            engine = engine.execution_options(isolation_level="READ COMMITTED")
        return engine.begin()
