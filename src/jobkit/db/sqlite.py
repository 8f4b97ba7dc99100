"""SQLite set up so that a write never fails with an instant "database is locked", and a read takes no lock.

Left to itself, Python's sqlite3 opens a transaction before the first INSERT, but not before a SAVEPOINT, and opens it
DEFERRED: a write that follows a read may then fail at once, whatever the busy timeout, because the snapshot it read
is old; and a savepoint's rows stay after the outer rollback. Here ``BEGIN IMMEDIATE`` is sent before a transaction's
first write or savepoint, and nothing before it.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy

from jobkit.base.clock import seconds
from jobkit.errors import ConfigurationError

if TYPE_CHECKING:
    from datetime import timedelta

    from sqlalchemy.ext.asyncio import AsyncEngine

_COMMENT = re.compile(r"\s+|--[^\n]*\n|/\*.*?\*/|[(;]", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")
# Statements that take no write lock, or that SQLite refuses inside a transaction.
_NO_WRITE = re.compile("SELECT|VALUES|EXPLAIN|PRAGMA|BEGIN|COMMIT|END|ROLLBACK|RELEASE|ATTACH|DETACH|VACUUM")
_CHANGES = re.compile(r"\b(?:INSERT|UPDATE|DELETE|REPLACE)\b", re.IGNORECASE)

# A dialect outlives its pool and is shared by the engines that execution_options() makes.
_settings: weakref.WeakKeyDictionary[sa.Dialect, tuple[int, str]] = weakref.WeakKeyDictionary()
# The file that an engine's connections have opened, whatever its URL says: create_engine(creator=...); "" for memory.
_opened: weakref.WeakKeyDictionary[sa.Dialect, str] = weakref.WeakKeyDictionary()
# By database file: the last thread that began a write transaction, its connection and its asyncio task. The connection
# says whether that is still open, so nothing has to be removed.
_writers: dict[str, tuple[int, Any, weakref.ref[Any] | None]] = {}
os.register_at_fork(after_in_child=_writers.clear)  # they are the parent's


def configure_sqlite(
    engine: sa.Engine | AsyncEngine,
    *,
    busy_timeout: timedelta | float = 10.0,
    synchronous: Literal["FULL", "NORMAL", "EXTRA"] = "FULL",
) -> None:
    """Make every connection of ``engine`` keep what jobkit promises on SQLite. Call it once, right after
    ``create_engine``.

    Afterwards: write-ahead log; writers wait up to ``busy_timeout`` for each other; ``BEGIN IMMEDIATE`` at a
    transaction's first write or savepoint, and no open transaction before it. A result is read whole, unless the
    statement has ``stream_results`` or ``yield_per``: a half-read one would keep an old snapshot, and a write beside it
    fails. ``synchronous="NORMAL"`` commits about five times as fast and may lose the last commits when the machine
    loses power. Idempotent; of several calls the last one's values count. Connections in AUTOCOMMIT are left alone.

    ``ConfigurationError`` for an engine of another database.
    """
    sync_engine: Any = getattr(engine, "sync_engine", engine)
    if not isinstance(sync_engine, sa.Engine) or sync_engine.dialect.name != "sqlite":
        raise ConfigurationError(f"configure_sqlite takes an SQLite engine, not {engine!r}")
    if synchronous not in ("FULL", "NORMAL", "EXTRA"):
        raise ValueError(f"synchronous must be FULL, NORMAL or EXTRA, not {synchronous!r}")
    milliseconds = int(seconds(busy_timeout, "busy_timeout", positive=False) * 1000)
    # What engine.execution_options() returned is a view of the engine; listeners on the latter serve both.
    while (origin := getattr(sync_engine, "_proxied", None)) is not None:
        sync_engine = origin
    known = sync_engine.dialect in _settings
    _settings[sync_engine.dialect] = (milliseconds, synchronous)
    if not known:
        sa.event.listen(sync_engine, "engine_connect", _prepare)
        sa.event.listen(sync_engine, "before_cursor_execute", _begin_before_write)
        sa.event.listen(sync_engine, "after_cursor_execute", _read_whole)
        if sync_engine.dialect.is_async:
            sa.event.listen(sync_engine, "invalidate", _roll_back_first)


def require_configured(bind: sa.Engine | sa.Connection) -> None:
    """Return when ``bind`` keeps the guarantees: it is not SQLite, or ``configure_sqlite`` was called and it does not
    commit by itself, or it is lent by someone else, such as Django, who has opened its transaction.

    ``ConfigurationError`` with the line that helps otherwise.
    """
    if bind.dialect.name != "sqlite":
        return
    if bind.dialect not in _settings:
        if isinstance(bind, sa.Connection) and _driver(bind).isolation_level is None:
            _require_lent(bind)
            return
        raise ConfigurationError(
            "this SQLite engine is not set up for jobkit: call jobkit.configure_sqlite(engine) after create_engine"
        )
    if isinstance(bind, sa.Connection) and _driver(bind).isolation_level is None:
        raise ConfigurationError(
            "this SQLite connection is in AUTOCOMMIT, or a hook sets isolation_level = None: jobkit needs a "
            'transaction, which jobkit.configure_sqlite(engine) opens; remove the hook or isolation_level="AUTOCOMMIT"'
        )


def is_memory(engine: sa.Engine) -> bool:
    """Whether ``engine`` is an SQLite database that lives in memory, which threads and processes cannot share."""
    if engine.dialect.name != "sqlite":
        return False
    return not _file_of(engine)


def writing_in_this_thread(engine: sa.Engine) -> bool:
    """Whether this thread holds the write lock of ``engine``'s SQLite file: a second connection would wait for ever."""
    if engine.dialect.name != "sqlite":
        return False
    found = _writers.get(_database(engine))
    return found is not None and found[0] == threading.get_ident() and _is_open(engine, found)


def writing_in_this_task(engine: sa.Engine) -> bool:
    """As ``writing_in_this_thread``, for the asyncio task that runs now: the thread's other tasks do not count."""
    if engine.dialect.name != "sqlite":
        return False
    found, task = _writers.get(_database(engine)), _current_task()
    if found is None or task is None or found[2] is None or found[2]() is not task:
        return False
    return _is_open(engine, found)


def refuse_deadlock(engine: sa.Engine, waiting: str, instead: str, *, task: bool = False) -> None:
    """``ConfigurationError`` when the SQLite transaction of this thread, or with ``task`` of this asyncio task, has
    written: ``waiting``, which uses another connection, would wait for it for ever. ``instead`` says what to do.
    """
    if (writing_in_this_task if task else writing_in_this_thread)(engine):
        raise ConfigurationError(
            f"this {'task' if task else 'thread'}'s SQLite transaction has written, and {waiting} would wait for it "
            f"for ever: {instead}"
        )


class FileWatch:
    """Notices that an SQLite file was replaced or deleted since this was made. What is written then, on connections
    that have the former one open, is lost or damages the new one, whose log has the same name.
    """

    def __init__(self, file: str) -> None:
        """``file``: "" for a database without a file."""
        self._file, self._inode = file, _inode(file)

    @classmethod
    def of(cls, engine: sa.Engine) -> FileWatch:
        return cls(_file_of(engine) if engine.dialect.name == "sqlite" else "")

    def __bool__(self) -> bool:
        return self._inode is not None

    def lost(self) -> str | None:
        """What happened; None when it is the same file. Blocks on no database."""
        if self._inode is None or (now := _inode(self._file)) == self._inode:
            return None
        happened = "deleted" if now is None else "replaced by another file"
        return f"{self._file} was {happened} while it was open: nothing more is written; start the process again"


def _inode(file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _require_lent(connection: sa.Connection) -> None:
    """``ConfigurationError`` unless a write on this connection waits for others, and is kept or lost with its open
    transaction. Whoever opened it says when that ends.
    """
    driver = _driver(connection)
    if not driver.in_transaction:
        raise ConfigurationError(
            "this SQLite connection is not in a transaction, and would commit each row by itself: call this within "
            "one, in Django within transaction.atomic()"
        )
    mode, timeout = (connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "busy_timeout"))
    if mode not in ("wal", "memory"):
        raise ConfigurationError(
            f"this SQLite connection has journal_mode {mode}, in which readers and writers refuse each other: execute "
            "PRAGMA journal_mode = WAL, in Django by init_command in its OPTIONS"
        )
    if not timeout:
        raise ConfigurationError(
            "this SQLite connection has no busy timeout, and would be refused at once while another writes: set "
            "timeout, in Django in its OPTIONS"
        )
    file = _main_file(connection.exec_driver_sql("PRAGMA database_list"))
    if file and _may_write(file):
        raise ConfigurationError(
            "this SQLite connection's transaction began DEFERRED: a write after a read would be refused at once when "
            "another has written. Begin it by BEGIN IMMEDIATE, in Django by transaction_mode: IMMEDIATE in its OPTIONS"
        )
    _writers[os.path.realpath(file)] = _mine(driver)


def _may_write(file: str) -> bool:
    """Whether another connection gets the write lock of ``file`` at this moment: nobody has it."""
    try:
        with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
    except sqlite3.Error:
        return False
    return True


def _is_open(engine: sa.Engine, found: tuple[int, Any, weakref.ref[Any] | None]) -> bool:
    try:
        writing = bool(found[1].in_transaction)
    except Exception:  # a closed connection holds nothing
        return False
    # The pool may have given the connection to another thread, which says so before it begins.
    return writing and _writers.get(_database(engine)) is found


def _prepare(connection: sa.Connection) -> None:
    """Set the pragmas, once on each database connection, also on those pooled before ``configure_sqlite``."""
    settings = _settings[connection.dialect]
    if connection.info.get("jobkit.prepared") == settings:
        return
    try:
        _set_pragmas(connection, *settings)
    except BaseException:
        connection.close()  # nobody gets it, and an asynchronous pool cannot reclaim one that is only dropped
        raise
    connection.info["jobkit.prepared"] = settings


def _set_pragmas(connection: sa.Connection, milliseconds: int, synchronous: str) -> None:
    driver = _driver(connection)
    if getattr(getattr(driver, "_conn", driver), "autocommit", -1) != -1:  # aiosqlite keeps the connection in _conn
        raise ConfigurationError(
            "jobkit needs sqlite3's legacy transaction control: remove autocommit= from connect_args"
        )
    with closing(connection.connection.cursor()) as cursor, _wrapping(connection, "PRAGMA journal_mode = WAL"):
        cursor.execute(f"PRAGMA busy_timeout = {milliseconds}")
        cursor.execute(f"PRAGMA synchronous = {synchronous}")
        mode = _use_wal(cursor, time.monotonic() + milliseconds / 1000)
        cursor.execute("PRAGMA database_list")
        _opened[connection.dialect] = file = _main_file(cursor.fetchall())
        connection.info["jobkit.file"] = FileWatch(file)
    if mode not in ("wal", "memory"):
        raise ConfigurationError(
            f"this SQLite database keeps journal_mode {mode} instead of the write-ahead log, without which readers and "
            "writers refuse each other: use another vfs than the one in its URL, and a local disk"
        )


def _use_wal(cursor: Any, deadline: float) -> str:
    # Two connections that switch a new file at once can be told "locked" without waiting, so the switch is retried
    # here.
    while True:
        try:
            for pragma in ("PRAGMA journal_mode", "PRAGMA journal_mode = WAL"):
                cursor.execute(pragma)
                if (mode := str(cursor.fetchone()[0])) in ("wal", "memory"):
                    break
            return mode
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_before_write(connection: sa.Connection, cursor: Any, statement: str, *_: object) -> None:
    driver = _driver(connection)
    if driver.in_transaction or driver.isolation_level is None or not is_write(statement):
        return
    if (reason := connection.info["jobkit.file"].lost()) is not None:
        raise ConfigurationError(reason)
    mine = _mine(driver)
    database = _database(connection.engine)
    if _writers.get(database, mine)[1] is driver:
        _writers[database] = mine  # before BEGIN, or the connection's last user would seem to write
    with _wrapping(connection, "BEGIN IMMEDIATE"):
        cursor.execute("BEGIN IMMEDIATE")
    _writers[database] = mine


def _mine(driver: Any) -> tuple[int, Any, weakref.ref[Any] | None]:
    task = _current_task()
    return threading.get_ident(), driver, None if task is None else weakref.ref(task)


@contextmanager
def _wrapping(connection: sa.Connection, statement: str) -> Iterator[None]:
    """Errors of the driver as SQLAlchemy's, which does not wrap what a listener raises."""
    dialect = connection.dialect
    try:
        yield
    except dialect.loaded_dbapi.Error as error:
        raise sa.exc.DBAPIError.instance(statement, None, error, dialect.loaded_dbapi.Error, dialect=dialect) from error


def _read_whole(
    connection: sa.Connection, cursor: Any, statement: str, parameters: object, context: Any, executemany: bool
) -> None:
    """Read a result now, as other databases' drivers do: a half-read SELECT holds its snapshot, and once another
    connection has committed, ``BEGIN IMMEDIATE`` beside it fails at once.
    """
    # Not the defaults that SQLAlchemy reads on the same cursor before a write, nor within a transaction that has
    # written, whose snapshot is the newest.
    if cursor.description is None or context.isinsert or context.isupdate or _driver(connection).in_transaction:
        return
    options = context.execution_options
    if not options.get("stream_results") and options.get("yield_per") is None:
        context.cursor_fetch_strategy = FullyBufferedCursorFetchStrategy(cursor, cursor.description)


def _roll_back_first(connection: Any, record: object, error: BaseException | None) -> None:
    """Let aiosqlite's thread roll back before it closes the connection of a cancelled task: as long as anything holds a
    cursor, such as the task's traceback, SQLite keeps the closed connection, and with it its transaction's lock.
    """
    with suppress(Exception):  # it may be closed already, or no loop may run any more
        driver = connection.driver_connection
        done = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda future: future.exception())
        driver._tx.put_nowait((done, driver._conn.rollback))


def is_write(statement: str) -> bool:
    """Whether an SQL statement may need SQLite's write lock; True when in doubt."""
    position = 0
    while match := _COMMENT.match(statement, position):
        position = match.end()
    word = _WORD.match(statement, position)
    if word is None:
        return False
    first = word.group().upper()
    return bool(_CHANGES.search(statement, position)) if first == "WITH" else not _NO_WRITE.fullmatch(first)


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def _driver(connection: sa.Connection) -> Any:
    return connection.connection.driver_connection


def _database(engine: sa.Engine) -> str:
    return _file_of(engine) or f"memory:{id(engine.pool)}"


def _file_of(engine: sa.Engine) -> str:
    """The file of an SQLite engine; "" for a database in memory."""
    url = engine.url
    if url.query.get("mode") == "memory" or url.database in (":memory:", "file::memory:"):
        return ""
    if url.database:
        return _file(url.database)
    if engine.dialect not in _opened and engine.dialect in _settings and not engine.dialect.is_async:
        engine.connect().close()
    return _opened.get(engine.dialect, "")


def _main_file(rows: Iterable[Any]) -> str:
    """Of the rows of PRAGMA database_list."""
    return next((str(file or "") for _, name, file in rows if name == "main"), "")


@lru_cache(maxsize=64)
def _file(name: str) -> str:
    return os.path.realpath(unquote(urlsplit(name).path) if name.startswith("file:") else name)
