"""Relay: committed events become signals in this process. One feed per database, shared and counted."""

from __future__ import annotations

import threading
from typing import Self

import sqlalchemy as sa

from jobkit import signals
from jobkit.base.forks import reset_in_children
from jobkit.db.dialects.base import EventRow
from jobkit.db.dialects.position import Position
from jobkit.db.host import leave_connections, refuse_inherited, require_schema, sync_engine
from jobkit.db.logs import known_log, log_of
from jobkit.db.sqlite import is_memory
from jobkit.errors import ConfigurationError
from jobkit.events.feed import Feed
from jobkit.events.log import DeliveredEvents, event_of, require_whole


class _Shared:
    """What relays and runners of a process share: the feeds, each with its number of users; what was delivered."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.feeds: dict[str, tuple[Feed, int]] = {}
        self.delivered = DeliveredEvents()
        reset_in_children(self)

    def _after_fork(self) -> None:
        """No feed runs in a child, and a lock that another thread held at the fork is held there for ever."""
        self.lock, self.delivered = threading.RLock(), DeliveredEvents()
        self.feeds.clear()


_shared = _Shared()


class Relay:
    """Signals in a process that renders nothing; a started ``Runner`` has its own.

    However many relays and runners of one database are started, the process has one thread that reads its event log,
    and each receiver is called once per event. ``start`` and ``stop`` in any order and number; safe from any thread.

    ``after``: the ``cursor`` of an event that another process, or an earlier run of this one, received: every event
    since is delivered first, once there is a receiver. It repeats a few events, known by ``JobEvent.id``, and skips
    none. Within a replay the events of one job keep their order; where another relay or runner of this process was
    started before, later ones may have been delivered already. ``ValueError`` for what is not a cursor.
    """

    def __init__(self, engine: sa.Engine, *, after: str | None = None) -> None:
        self.engine = sync_engine(engine)
        self._after = None if after is None else Position.parse(after)
        self._feed: Feed | None = None
        self._inherited = False
        reset_in_children(self)

    def start(self) -> Self:
        """Signals for whatever is committed from now on, by any process; with ``after`` also for what was committed
        since that cursor and was not delivered in this process. Raises when the database or its tables are not there,
        and ``EventsPruned`` when some of those events are gone.
        """
        refuse_inherited(self.engine, self._inherited)
        with _shared.lock:
            if self._feed is None:
                self._feed = acquire(self.engine, self._after)
        return self

    def stop(self, timeout: float = 5.0) -> None:
        """No more signals, unless another relay or runner of this database is started. Waits for a running receiver."""
        with _shared.lock:
            feed, self._feed = self._feed, None
        if feed is not None:
            release(feed, timeout)

    def _after_fork(self) -> None:
        """Be as if never started: called in a forked child, whose ``start`` then begins anew."""
        leave_connections(self.engine)
        self._inherited, self._feed = self._feed is not None or self._inherited, None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def acquire(engine: sa.Engine, after: Position | None = None) -> Feed:
    """The started feed of ``engine``'s database, counted once more. ``after``: it replays what follows this."""
    if is_memory(engine):
        raise ConfigurationError("an SQLite database in memory cannot be shared by threads: use a file")
    if isinstance(engine.pool, sa.StaticPool | sa.SingletonThreadPool):
        raise ConfigurationError(
            f"{type(engine.pool).__name__} gives one connection to several users at once, who would commit each "
            "other's transactions: leave poolclass= out of create_engine"
        )
    if known_log(engine) not in _shared.feeds:
        require_schema(engine)  # before ``log_of``, whose own connection hides what a hook has set
    log = log_of(engine)
    with _shared.lock:
        feed, count = _shared.feeds.get(log, (None, 0))
        place = None
        if after is not None:
            with engine.connect() as connection:
                place = require_whole(connection, after)
        if feed is None:
            feed = Feed(engine, _shared.delivered, log, place)
            feed.start()
        elif place is not None:
            feed.replay(place)
        _shared.feeds[log] = feed, count + 1
        return feed


def release(feed: Feed, timeout: float) -> None:
    """Count once less; the last one ends the feed. Returns when what was published is delivered, or at the timeout."""
    with _shared.lock:
        _, count = _shared.feeds[feed.log]
        if count > 1:
            _shared.feeds[feed.log] = feed, count - 1
        else:
            del _shared.feeds[feed.log]
    if count > 1:
        feed.flush(timeout)
    else:
        feed.close(timeout)


def running_feed(engine: sa.Engine) -> Feed | None:
    """The feed of ``engine``'s log, when this process has one. Asks the database which log that is when it has not been
    asked before and this process has some feed.
    """
    if not _shared.feeds:
        return None
    return feed_of(log_of(engine))


def feed_of(log: str) -> Feed | None:
    """The feed of this log, when this process has one. Never blocks on the database."""
    with _shared.lock:
        found = _shared.feeds.get(log)
    return found[0] if found else None


def deliver_here(engine: sa.Engine, rows: list[EventRow], cursor: Position) -> None:
    """Signals for events this process just committed while it has no feed, in the calling thread."""
    signals.deliver((event_of(row, cursor) for row in _shared.delivered.add(rows)), known_log(engine))
