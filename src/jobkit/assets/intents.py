"""Intents record a key before its object exists; garbage collection removes objects that no asset row names.

It reads the records in ``asset_intents`` and lists no storage. Each key is visited twice. The first visit marks the key
``collected`` in a transaction, after which no row can be made for it, and removes the object. A slow writer may still
store the object afterwards; so the record stays for a quarantine, and the second visit removes the object again, then
the record. When a collector dies in between, a later one makes the second visit.
"""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from jobkit.assets.names import check_key
from jobkit.base.clock import CENTURY
from jobkit.base.ids import new_id
from jobkit.base.text import error_message
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import DueKey
from jobkit.db.host import sync_engine
from jobkit.db.sqlite import refuse_deadlock
from jobkit.storage.base import Storage
from jobkit.types import GarbageReport

logger = logging.getLogger("jobkit")

BATCH = 500
# Seconds for which a second visit reserves the keys of its batch. Should it take longer, another collector removes the
# same objects again, which does no harm.
VISIT = 900.0
# Keys that a report names.
SAMPLE = 10
_ALL = 2**31 - 1
_START = datetime(1970, 1, 1, tzinfo=UTC)
# Second visits first: no call visits a key twice.
STATES = ("collected", "tombstone", "pending")


class GarbageCollector:
    """Removes the objects of one storage that have no row, by the records in one database.

    Seconds of the database's clock: a key without a row counts as abandoned ``older_than`` after its record, and stays
    in ``quarantine`` (default: as long) between its two visits. Both must exceed the time from a file's record to its
    row. With a shorter ``older_than`` the file gets no row; with a shorter ``quarantine`` its object may stay for ever.
    """

    def __init__(
        self,
        engine: sa.Engine,
        storage: Storage,
        *,
        older_than: float,
        quarantine: float | None = None,
        connect: Callable[[], AbstractContextManager[sa.Connection]] | None = None,
    ) -> None:
        self._engine, self._storage, self._connect = sync_engine(engine), storage, connect or engine.connect
        self._statements = statements_for(engine)
        self._grace = min(older_than, CENTURY)
        self._quarantine = self._grace if quarantine is None else min(quarantine, CENTURY)

    def preview(self) -> GarbageReport:
        """Report what ``run`` would visit. Changes nothing."""
        tally = _Tally()
        for state in STATES:
            with self._engine.connect().execution_options(stream_results=True, yield_per=BATCH) as connection:
                for due in self._due(connection, state, _START, _ALL):
                    try:
                        tally.count(state, due.object_key, self._size(due))
                    except Exception:  # not a key of jobkit: ``run`` would not remove it
                        tally.failed += 1
        return tally.report(dry_run=True)

    def run(self, on_batch: Callable[[GarbageReport], object] | None = None) -> GarbageReport:
        """Visit every key that is due, in batches; remove unfinished files of dead processes from this machine.
        ``on_batch`` is called after each with the report so far; what it raises ends the run.
        """
        self._storage.scratch.sweep()
        tally = _Tally()
        for state in STATES:
            after: datetime | None = _START
            while after is not None:
                after = self._batch(tally, state, after)
                if on_batch is not None:
                    on_batch(tally.report())
        return tally.report()

    def _batch(self, tally: _Tally, state: str, after: datetime) -> datetime | None:
        """Visit the next keys due from ``after`` on. Where to go on, None at the end."""
        refuse_deadlock(self._engine, "garbage collection", "call collect_garbage outside of it")
        with self._connect() as connection:
            found = list(self._due(connection, state, after, BATCH))
        if not found:
            return None
        # The rows read may be outdated. The claim decides, for it is a write.
        with self._connect() as connection, connection.begin():
            claimed = set(
                self._statements.claim_intents(
                    connection,
                    [due.object_key for due in found],
                    provider=self._storage.provider,
                    state=state,
                    early=self._early(state),
                    hold=VISIT if state == "collected" else self._quarantine,
                )
            )
        self._visit(tally, state, [due for due in found if due.object_key in claimed])
        last = found[-1].not_before
        return last if len(found) == BATCH and (claimed or last > after) else None

    def _visit(self, tally: _Tally, state: str, keys: Sequence[DueKey]) -> None:
        """Remove the objects of claimed keys, with no transaction open. Then record the failures, and at the second
        visit delete the records of the others.
        """
        gone: list[str] = []
        failures: list[dict[str, str]] = []
        for due in keys:
            try:
                size = self._size(due)
                self._storage.remove(due.object_key)
            except (Exception, CancelledError) as error:  # fsspec runs an event loop: CancelledError is no Exception
                failures.append({"key": due.object_key, "error": error_message(error)})
            else:
                gone.append(due.object_key)
                tally.count(state, due.object_key, size)
        forgotten = gone if state == "collected" else []
        if forgotten or failures:
            with self._connect() as connection, connection.begin():
                if failures:
                    self._statements.postpone_intents(connection, failures, provider=self._storage.provider)
                if forgotten:
                    self._statements.drop_intents(connection, forgotten, provider=self._storage.provider)
        if failures:
            tally.failed += len(failures)
            logger.warning(
                "%d of %d objects could not be removed and are tried again later; %s: %s",
                *(len(failures), len(keys), failures[0]["key"], failures[0]["error"]),
            )

    def _due(self, connection: sa.Connection, state: str, after: datetime, limit: int) -> Iterator[DueKey]:
        return self._statements.due_intents(
            connection, provider=self._storage.provider, state=state, early=self._early(state), after=after, limit=limit
        )

    def _early(self, state: str) -> float:
        # ``not_before`` is INTENT_GRACE after the record: look this many seconds ahead of it for another grace.
        return INTENT_GRACE - self._grace if state == "pending" else 0.0

    def _size(self, due: DueKey) -> int | None:
        check_key(due.company_id, due.object_key)
        return self._storage.size(due.object_key)


class _Tally:
    def __init__(self) -> None:
        self.visited = dict.fromkeys(STATES, 0)
        self.failed = 0
        self._size: int | None = 0
        self._sample: list[str] = []

    def count(self, state: str, key: str, size: int | None) -> None:
        self.visited[state] += 1
        self._size = None if size is None or self._size is None else self._size + size
        if state != "collected" and len(self._sample) < SAMPLE:
            self._sample.append(key)

    def report(self, *, dry_run: bool = False) -> GarbageReport:
        return GarbageReport(
            dry_run=dry_run,
            abandoned=self.visited["pending"],
            deleted=self.visited["tombstone"],
            settled=self.visited["collected"],
            failed=self.failed,
            byte_size=self._size,
            sample=tuple(self._sample),
        )


# Seconds from the record of a key until its object counts as abandoned.
INTENT_GRACE = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Intent:
    """A key under which an object may be stored soon."""

    company_id: str
    provider: str
    object_key: str


def record_intents(connection: sa.Connection, intents: Sequence[Intent]) -> None:
    """Record keys before their objects can exist. The caller commits, and only then publishes."""
    rows = [{"id": new_id().hex, "company": i.company_id, "provider": i.provider, "key": i.object_key} for i in intents]
    statements_for(connection).record_intents(connection, rows, grace=INTENT_GRACE)
