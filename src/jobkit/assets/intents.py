"""The sweep: removes objects that no row names, by the records of ``asset_intents`` alone. Nothing is listed.

Each key is visited twice. At the first visit it becomes ``collected`` in a transaction that gives it to this sweep and
takes it from everyone else: no row can be made for it any more. Then its object is removed. A publisher that was slow
may still store it afterwards; so the record stays for a quarantine, and the second visit removes the object again and
then the record. A sweep that dies in between leaves a collected key, which a later one visits.
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
# How long a second visit keeps other sweeps from the keys of its batch, in seconds. Should it take longer, another one
# removes the same objects again, which does no harm.
VISIT = 900.0
SAMPLE = 10
_ALL = 2**31 - 1
_START = datetime(1970, 1, 1, tzinfo=UTC)
# Second visits come first: a key that a call has visited is not visited again by it.
STATES = ("collected", "tombstone", "pending")


class GarbageCollector:
    """Sweeps one storage by the records in one database.

    In seconds of the database's clock: a recorded key counts as abandoned after ``older_than``, and is in
    ``quarantine`` (as long) between its two visits. Each must exceed the time that any file takes from its record to
    its row: the first or it gets none, the second or its object may outlive its record.
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
        """What ``run`` would visit. Changes nothing."""
        tally = _Tally()
        for state in STATES:
            with self._engine.connect().execution_options(stream_results=True, yield_per=BATCH) as connection:
                for due in self._due(connection, state, _START, _ALL):
                    try:
                        tally.count(state, due.object_key, self._size(due))
                    except Exception:  # a key that is not one of ours: nothing would remove it
                        tally.failed += 1
        return tally.report(dry_run=True)

    def run(self) -> GarbageReport:
        """Visit every key that is due, in batches. Also remove the unfinished files of dead processes from this machine."""
        self._storage.scratch.sweep()
        tally = _Tally()
        for state in STATES:
            after: datetime | None = _START
            while after is not None:
                after = self._batch(tally, state, after)
        return tally.report()

    def _batch(self, tally: _Tally, state: str, after: datetime) -> datetime | None:
        """Visit the next keys from ``after`` on. Where to go on, None at the end."""
        refuse_deadlock(self._engine, "a sweep", "call collect_garbage outside of it")
        with self._connect() as connection:
            found = list(self._due(connection, state, after, BATCH))
        if not found:
            return None
        # What was read may be outdated already. The claim decides, and it is a write.
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
        """Remove the objects of claimed keys; no transaction is open meanwhile. Then record what failed, and at the
        second visit forget what did not.
        """
        gone: list[str] = []
        failures: list[dict[str, str]] = []
        for due in keys:
            try:
                size = self._size(due)
                self._storage.remove(due.object_key)
            except (Exception, CancelledError) as error:  # storages run event loops, whose CancelledError is neither
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
            connection,
            provider=self._storage.provider,
            state=state,
            early=self._early(state),
            after=after,
            limit=limit,
        )

    def _early(self, state: str) -> float:
        # A key is recorded with a time that is INTENT_GRACE later. That is its age, whatever grace the caller wants.
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


# How long nothing sweeps a key whose object may still be on its way.
INTENT_GRACE = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Intent:
    """A key that may soon hold an object."""

    company_id: str
    provider: str
    object_key: str


def record_intents(connection: sa.Connection, intents: Sequence[Intent]) -> None:
    """Record every key before its object can exist. The caller commits, and only then publishes."""
    rows = [{"id": new_id().hex, "company": i.company_id, "provider": i.provider, "key": i.object_key} for i in intents]
    statements_for(connection).record_intents(connection, rows, grace=INTENT_GRACE)
