"""Prune: old jobs that are over go, with their events and, when asked, their assets.

In batches, each a short transaction of its own that locks only what it deletes: a job that a host has just taken up
again is passed over. What pruned events leave behind is one row of the log, the mark: the position up to which events
may be gone. A reader whose cursor lies before it has missed some.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from jobkit._dialects import statements_for
from jobkit._dialects.base import Position
from jobkit.assets import AssetStore
from jobkit.claims import INTENT_GRACE
from jobkit.clock import Clock, seconds, utcnow
from jobkit.columns import now as database_now
from jobkit.errors import ConfigurationError
from jobkit.ids import new_id
from jobkit.schema import require_schema
from jobkit.sqlite import require_configured, writing_in_this_thread
from jobkit.tables import asset_intents, assets, content_job_events, content_jobs
from jobkit.types import JobStatus

BATCH = 500
TERMINAL = [status.value for status in JobStatus if status.terminal]
_job, _event, _asset = content_jobs.c, content_job_events.c, assets.c


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What ``prune`` deleted, or with ``dry_run`` would delete: jobs, their events, and rows of assets."""

    dry_run: bool
    jobs: int = 0
    events: int = 0
    assets: int = 0


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

    Their idempotency keys are free again. Rows of assets stay, naming a job that is gone, unless ``assets`` is given:
    then those in that store go with their job, and their objects at a later sweep. Blocks on the database, in short
    transactions; beside everything else, and killed at any moment, it leaves each job whole or gone. A cursor from
    before the newest event that was deleted is ``EventsPruned`` to a ``Relay``.
    """
    if not isinstance(engine, sa.Engine):
        raise ConfigurationError(f"prune needs a synchronous Engine, not {type(engine).__name__}")
    require_configured(engine)
    age = timedelta(seconds=min(seconds(older_than, "older_than", positive=False), INTENT_GRACE * 36525))
    if writing_in_this_thread(engine):
        raise ConfigurationError(
            "this thread's SQLite transaction has written, and prune would wait for it for ever: call it outside"
        )
    require_schema(engine)
    before, provider = clock() - age, None if assets is None else assets.provider
    report, last = PruneReport(dry_run), uuid.UUID(int=0)
    step = _count if dry_run else _delete
    while True:
        with engine.connect() as connection, connection.begin():
            found = _old(connection, before, last, lock=not dry_run)
            if not found:
                return report
            jobs, events, gone = step(connection, found, before, provider)
        last = found[-1]
        report = PruneReport(dry_run, report.jobs + jobs, report.events + events, report.assets + gone)


def _old(connection: sa.Connection, before: datetime, last: uuid.UUID, *, lock: bool) -> list[uuid.UUID]:
    query = sa.select(_job.id).where(_job.id > last, _over(before)).order_by(_job.id).limit(BATCH)
    if lock and connection.dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    return list(connection.execute(query).scalars())


def _over(before: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(_job.status.in_(TERMINAL), _job.finished_at <= before)


def _count(
    connection: sa.Connection, found: Sequence[uuid.UUID], before: datetime, provider: str | None
) -> tuple[int, int, int]:
    def rows(column: sa.ColumnElement[Any], *conditions: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.count()).where(column.in_(found), *conditions)
        return int(connection.execute(query).scalar_one())

    of_store = rows(_asset.job_id, _asset.provider == provider) if provider is not None else 0
    return len(found), rows(_event.job_id), of_store


def _delete(
    connection: sa.Connection, found: Sequence[uuid.UUID], before: datetime, provider: str | None
) -> tuple[int, int, int]:
    # What was read decides nothing on SQLite, whose transaction begins only with this write.
    jobs = connection.execute(content_jobs.delete().where(_job.id.in_(found), _over(before)).returning(_job.id))
    gone = list(jobs.scalars())
    events = connection.execute(
        content_job_events.delete().where(_event.job_id.in_(gone)).returning(_event.xid, _event.id)
    ).all()
    if events:
        upto = max(Position(row.xid or 0, row.id) for row in events)
        statements_for(connection).mark_pruned(connection, upto)
    return len(gone), len(events), _bury(connection, gone, provider) if provider is not None else 0


def _bury(connection: sa.Connection, jobs: Sequence[uuid.UUID], provider: str) -> int:
    gone = connection.execute(
        assets.delete()
        .where(_asset.job_id.in_(jobs), _asset.provider == provider)
        .returning(_asset.company_id, _asset.provider, _asset.object_key)
    ).all()
    if gone:
        tombstone = asset_intents.insert().values(state="tombstone", not_before=database_now)
        connection.execute(tombstone, [{"id": new_id(), **row._mapping} for row in gone])
    return len(gone)
