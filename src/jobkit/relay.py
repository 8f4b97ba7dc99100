"""Relay: committed events become signals in this process. One feed per database, shared and counted."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from types import TracebackType
from typing import Self

import sqlalchemy as sa

from jobkit import signals
from jobkit._dialects.base import EventRow, Position
from jobkit.errors import ConfigurationError
from jobkit.feed import Feed
from jobkit.outbox import event_of
from jobkit.schema import require_schema
from jobkit.sqlite import is_memory, require_configured

REMEMBERED_EVENTS = 1_000

_lock = threading.RLock()
_feeds: dict[str, tuple[Feed, int]] = {}
# What was delivered without a feed, by database: a feed that begins later does not repeat it.
_delivered: dict[str, OrderedDict[int, None]] = {}


class Relay:
    """Signals in a process that renders nothing; a started ``Runner`` has its own.

    However many relays and runners of one database are started, the process has one thread that reads its event log,
    and each receiver is called once per event. ``start`` and ``stop`` in any order and number; safe from any thread.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = sync_engine(engine)
        self._held = False

    def start(self) -> Self:
        """Signals for whatever is committed from now on, by any process. Raises when the database or its tables are not
        there.
        """
        with _lock:
            if not self._held:
                acquire(self._engine)
                self._held = True
        return self

    def stop(self, timeout: float = 5.0) -> None:
        """No more signals, unless another relay or runner of this database is started. Waits for the receiver that runs
        now.
        """
        with _lock:
            held, self._held = self._held, False
        if held:
            release(self._engine, timeout)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def sync_engine(engine: object) -> sa.Engine:
    """``engine`` when a runner or relay can use it; ``ConfigurationError`` with what helps otherwise."""
    if hasattr(engine, "sync_engine"):
        raise ConfigurationError(
            "a Runner or Relay needs a synchronous Engine, not an AsyncEngine: make one with create_engine(), on the "
            "same URL; postgresql+psycopg:// serves both kinds"
        )
    if not isinstance(engine, sa.Engine):
        raise ConfigurationError(f"expected an SQLAlchemy Engine, not {type(engine).__name__}")
    require_configured(engine)
    return engine


def acquire(engine: sa.Engine) -> Feed:
    """The started feed of ``engine``'s database, counted once more."""
    if is_memory(engine):
        raise ConfigurationError("an SQLite database in memory cannot be shared by threads: use a file")
    key = _key(engine)
    with _lock:
        feed, count = _feeds.get(key, (None, 0))
        if feed is None:
            require_schema(engine)
            feed = Feed(engine, before=_delivered.setdefault(key, OrderedDict()))
            feed.start()
        _feeds[key] = feed, count + 1
        return feed


def release(engine: sa.Engine, timeout: float) -> None:
    """Count once less; the last one ends the feed, after what was offered to it."""
    key = _key(engine)
    with _lock:
        feed, count = _feeds[key]
        if count > 1:
            _feeds[key] = feed, count - 1
            return
        del _feeds[key]
    feed.close(timeout)


def running_feed(engine: sa.Engine) -> Feed | None:
    """The feed of ``engine``'s database, when this process has one."""
    with _lock:
        found = _feeds.get(_key(engine))
    return found[0] if found else None


def deliver_here(engine: sa.Engine, rows: list[EventRow], cursor: Position) -> None:
    """Signals for events this process just committed while it has no feed, in the calling thread."""
    with _lock:
        remembered = _delivered.setdefault(_key(engine), OrderedDict())
        fresh = [row for row in rows if row.id not in remembered]
        remembered.update((row.id, None) for row in fresh)
        while len(remembered) > REMEMBERED_EVENTS:
            remembered.popitem(last=False)
    signals.deliver(event_of(row, cursor) for row in fresh)


def _key(engine: sa.Engine) -> str:
    url = engine.url
    schemas = engine.get_execution_options().get("schema_translate_map") or {}
    if engine.dialect.name == "sqlite":
        name = str(id(engine.pool)) if is_memory(engine) else os.path.realpath(url.database or "")
        return f"sqlite:{name}:{schemas.get(None)}"
    return f"{engine.dialect.name}:{url.host}:{url.port}:{url.database}:{sorted(url.query.items())}:{schemas.get(None)}"
