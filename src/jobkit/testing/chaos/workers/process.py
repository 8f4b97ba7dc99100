"""What every process of a run has: its settings, a way to tell the harness, the end that SIGTERM asks for."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from jobkit.assets.store import AssetStore
from jobkit.db.sqlite import configure_sqlite
from jobkit.tables import content_jobs
from jobkit.types import JobEvent

T = TypeVar("T")
# In ``assets.provider``, whichever way a process reaches the storage.
PROVIDER = "chaos"
# The signals for which a process has a handler. They are blocked when it is forked, and delivered once it has them.
HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class Process:
    """This process, as the harness knows it."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings
        self.folder = Path(settings["folder"])
        self._parent = os.getppid()
        self._ending = False
        # An Event takes a lock that the thread which the signal interrupts may hold just then.
        self._bell: SimpleQueue[None] = SimpleQueue()
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        # What every thread is at goes to the log when the harness asks for it, because something is stuck.
        faulthandler.register(signal.SIGUSR1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def tell(self, **told: Any) -> None:
        """Tell the harness. Written in one go to a pipe: it arrives even when this process is killed right after."""
        os.write(1, json.dumps({"from": self.name, **told}).encode() + b"\n")

    def ends_within(self, seconds: float) -> bool:
        """Wait so long; whether this process is to end. Ends it at once when nobody is left to say so."""
        if os.getppid() != self._parent:
            os._exit(1)
        if not self._ending:
            with suppress(Empty):
                self._bell.get(timeout=seconds)
        return self._ending

    def _end(self) -> None:
        self._ending = True
        self._bell.put(None)

    def engine(self, **options: Any) -> sa.Engine:
        """A new engine, as a host makes it."""
        return make_engine(self.settings["database"], **options)

    def assets(self, engine: sa.Engine, url: str | None = None) -> AssetStore:
        """The store of this run; its keys are the same under each ``url`` that leads there."""
        options = self.settings["storage_options"] or None
        return AssetStore(url or self.settings["storage"], engine=engine, storage_options=options, provider=PROVIDER)

    def persist(self, action: Callable[[], T]) -> T:
        """What ``action`` gives, once the database lets it: it may be restarting."""
        while True:
            try:
                return action()
            except DBAPIError:
                if self.ends_within(0.1):
                    raise


def make_engine(url: str, **options: Any) -> sa.Engine:
    """An engine as a host makes it."""
    engine = sa.create_engine(url, **options)
    if engine.dialect.name == "sqlite":
        configure_sqlite(engine)
    return engine


class Witness:
    """Looks, from within a receiver or renderer, at what a new connection sees."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._engine = process.engine(poolclass=sa.NullPool)
        self._looked = 0

    def look(self, event: JobEvent) -> None:
        """Tell the harness when the database is not yet where the event says."""
        query = sa.select(content_jobs.c.event_seq).where(content_jobs.c.id == event.job_id)
        try:
            with self._engine.connect() as connection:
                seen = connection.execute(query).scalar_one_or_none()
        except DBAPIError:  # it is being restarted
            return
        if seen is None or seen < event.seq:
            self._process.tell(early=f"{event.type} of job {event.job_id} was told as {event.seq}, there is {seen}")

    def fence(self, job_id: UUID) -> int | None:
        """The number of the last claim of a job; None when the database does not say."""
        query = sa.select(content_jobs.c.fence).where(content_jobs.c.id == job_id)
        try:
            with self._engine.connect() as connection:
                return connection.execute(query).scalar_one_or_none()
        except DBAPIError:
            return None

    def sometimes(self, event: JobEvent, one_in: int) -> None:
        """Look at one in so many events."""
        self._looked += 1
        if self._looked % one_in == 0:
            self.look(event)


def now() -> float:
    """Seconds since the epoch: the processes of a run share a machine, and its clock."""
    return time.time()
