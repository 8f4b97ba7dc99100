"""Relay: committed events become signals in this process. One feed per database, shared and counted."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Self

import sqlalchemy as sa

from jobkit import signals
from jobkit._dialects.base import EventRow, Position
from jobkit.errors import ConfigurationError
from jobkit.feed import Feed, Memory
from jobkit.forks import forget_in_children, refuse_inherited
from jobkit.outbox import event_of
from jobkit.schema import require_schema
from jobkit.sqlite import is_memory, require_configured

_lock = threading.RLock()
_feeds: dict[str, tuple[Feed, int]] = {}
_memory = Memory()


class Relay:
    """Signals in a process that renders nothing; a started ``Runner`` has its own.

    However many relays and runners of one database are started, the process has one thread that reads its event log,
    and each receiver is called once per event. ``start`` and ``stop`` in any order and number; safe from any thread.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = sync_engine(engine)
        self._held = self._inherited = False
        forget_in_children(self)

    def start(self) -> Self:
        """Signals for whatever is committed from now on, by any process. Raises when the database or its tables are not
        there.
        """
        refuse_inherited(self.engine, self._inherited)
        with _lock:
            if not self._held:
                acquire(self.engine)
                self._held = True
        return self

    def stop(self, timeout: float = 5.0) -> None:
        """No more signals, unless another relay or runner of this database is started. Waits for the receiver that runs
        now.
        """
        with _lock:
            held, self._held = self._held, False
        if held:
            release(self.engine, timeout)

    def _after_fork(self) -> None:
        """Be as if never started: called in a forked child, whose ``start`` then begins anew."""
        self._inherited, self._held = self._held or self._inherited, False

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _forget() -> None:
    """No feed runs in a forked child, and a lock that another thread held there is held for ever."""
    global _lock, _memory
    _lock, _memory = threading.RLock(), Memory()
    _feeds.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


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
    if isinstance(engine.pool, sa.StaticPool | sa.SingletonThreadPool):
        raise ConfigurationError(
            f"{type(engine.pool).__name__} gives one connection to several users at once, who would commit each "
            "other's transactions: leave poolclass= out of create_engine"
        )
    key = _key(engine)
    with _lock:
        feed, count = _feeds.get(key, (None, 0))
        if feed is None:
            require_schema(engine)
            feed = Feed(engine, _memory)
            feed.start()
        _feeds[key] = feed, count + 1
        return feed


def release(engine: sa.Engine, timeout: float) -> None:
    """Count once less; the last one ends the feed. What was offered to it was delivered, or ``timeout`` is over."""
    key = _key(engine)
    with _lock:
        feed, count = _feeds[key]
        last = count == 1
        if last:
            del _feeds[key]
        else:
            _feeds[key] = feed, count - 1
    if last:
        feed.close(timeout)
    else:
        feed.flush(timeout)


def running_feed(engine: sa.Engine) -> Feed | None:
    """The feed of ``engine``'s database, when this process has one."""
    with _lock:
        found = _feeds.get(_key(engine))
    return found[0] if found else None


def deliver_here(engine: sa.Engine, rows: list[EventRow], cursor: Position) -> None:
    """Signals for events this process just committed while it has no feed, in the calling thread."""
    signals.deliver(event_of(row, cursor) for row in _memory.add(rows))


def _key(engine: sa.Engine) -> str:
    url, kind = engine.url, engine.dialect.name
    schema = (engine.get_execution_options().get("schema_translate_map") or {}).get(None)
    if is_memory(engine) or not (url.host or url.database or url.query):  # the latter: create_engine(creator=...)
        return f"{kind}:{id(engine.dialect)}:{schema}"
    if kind == "sqlite":
        return f"{kind}:{os.path.realpath(url.database or '')}:{schema}"
    return f"{kind}:{url.host}:{url.port}:{url.database}:{sorted(url.query.items())}:{schema}"
