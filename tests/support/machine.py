"""What a state machine stands on: a database, a storage, a model, and a look at all three after every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis.stateful import RuleBasedStateMachine, invariant

import jobkit
from jobkit.assets.intents import GarbageCollector
from jobkit.assets.spool import StagedFile
from jobkit.base.clock import utcnow
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import EventRow
from jobkit.jobs.claims import Claim
from jobkit.tables import metadata
from jobkit.types import StoredObject
from tests.support.files import objects
from tests.support.model import Model, broken_laws, differences, read


class File(NamedTuple):
    """A recorded file, of a claim or of a host."""

    claim: Claim | None
    company: str
    stored: StoredObject
    draft: StagedFile


class RolledBack(Exception):
    """Ends a transaction that is not to be committed."""


class Ground(RuleBasedStateMachine):
    """``engine`` and ``url`` are a database and a storage of this machine alone; what it came upon is counted in
    ``seen``.
    """

    def __init__(self, engine: sa.Engine, url: str, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen
        self.engine, self.url = engine, url
        self.store = jobkit.AssetStore(url, engine=engine)
        self.sweep = GarbageCollector(engine, self.store.storage, older_than=0)
        self.statements = statements_for(engine)
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        self.model = Model()
        self.files: list[File] = []
        self.newest: dict[UUID, Claim] = {}
        self.returned: list[EventRow] = []
        self.log: list[EventRow] = []
        self.heard: list[EventRow] = []
        with engine.begin() as connection:
            # Deleted rows would stay in the way of every later run on PostgreSQL.
            empty = "DELETE FROM" if engine.dialect.name == "sqlite" else "TRUNCATE"
            for table in metadata.tables:
                connection.exec_driver_sql(f"{empty} {table}")
        for key in [key for key in MemoryFileSystem.store if key.startswith(f"/{url.removeprefix('memory://')}/")]:
            del MemoryFileSystem.store[key]
        self.reader = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self.start = self.statements.start(self.reader)
        self.cursor = self.start.position

    # --- the ways to act

    @contextmanager
    def transaction(self, commit: bool = True) -> Iterator[sa.Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
                if not commit:
                    raise RolledBack
        except RolledBack:
            pass

    @contextmanager
    def by_host(self, commit: bool) -> Iterator[jobkit.JobStore]:
        with self.transaction(commit) as connection:
            yield jobkit.JobStore(connection, clock=lambda: self.now)

    def told(self, commit: bool, events: list[EventRow]) -> None:
        self.returned += events if commit else []

    # --- what holds after every step

    @invariant()
    def rows_and_objects_are_as_the_model_says(self) -> None:
        found, there = read(self.reader), objects(self.url)
        assert there == self.model.objects
        assert broken_laws(found, there) == []
        assert differences(self.model, found, utcnow()) == []
        assert found.events[: len(self.log)] == self.log, "I8: the log changed"
        logged = {event.id: event for event in found.events}
        for event in self.returned:
            assert logged[event.id]._replace(xid=0) == event, "I8: a runner would tell of another event"
        self.returned, self.log = [], found.events
        self.listen()

    def listen(self) -> None:
        heard, self.cursor = self.statements.scan(self.reader, self.cursor, self.start, 1000)
        self.heard += heard
