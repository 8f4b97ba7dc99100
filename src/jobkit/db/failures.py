"""What an error of the database means for the step that met it: come back later, without these values, or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import sqlalchemy as sa

from jobkit.errors import JobkitError

T = TypeVar("T")
R = TypeVar("R")

# Classes of SQLSTATE (PostgreSQL's Appendix A). Values: data exceptions and violated constraints.
_VALUES = ("22", "23")
# The whole server: connection exceptions, insufficient resources, operator intervention (a shutdown, a cancelled
# statement), system errors; and 40, transactions that were rolled back to let others go on.
_SERVER = ("08", "40", "53", "57", "58")
# Of a connection that may be at fault itself: it leads to a server that became read-only (25006), or has lost its
# prepared statements (26000, 42P05, and 0A000, whose plan is outdated).
_STALE = ("08", "25", "26", "57P", "0A", "42P05", "XX")
# SQLite's primary result codes: too big, constraint, mismatch, range. Those of one statement alone: SQLITE_ERROR.
_SQLITE_VALUES, _SQLITE_ERROR = (18, 19, 20, 25), 1


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE that the server sent, with psycopg, psycopg2 or pg8000; None where the client raised the error."""
    original = getattr(error, "orig", None) or error
    found = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    if found is None and original.args and isinstance(original.args[0], dict):  # pg8000
        found = original.args[0].get("C")
    return found if isinstance(found, str) else None


def refuses_values(error: BaseException) -> bool:
    """Whether the same values would be refused again: the error is theirs, not the database's."""
    if not isinstance(error, sa.exc.DBAPIError):
        if isinstance(error, sa.exc.StatementError) and error.orig is not None:
            return refuses_values(error.orig)
        return isinstance(error, ValueError | TypeError | ArithmeticError | LookupError | JobkitError)
    if (state := sqlstate(error)) is not None:
        return state.startswith(_VALUES)
    if (code := _sqlite_code(error)) is not None:
        return code in _SQLITE_VALUES
    return not is_outage(error) and isinstance(
        error, sa.exc.DataError | sa.exc.IntegrityError | sa.exc.ProgrammingError | sa.exc.NotSupportedError
    )


def is_outage(error: BaseException) -> bool:
    """Whether the database itself failed, so that any step may succeed later; False when it refused this one."""
    if not isinstance(error, sa.exc.DBAPIError):
        return isinstance(error, sa.exc.TimeoutError | OSError)
    if error.connection_invalidated:
        return True
    if (state := sqlstate(error)) is not None:
        return state.startswith(_SERVER)
    if (code := _sqlite_code(error)) is not None:
        return code not in (*_SQLITE_VALUES, _SQLITE_ERROR)
    return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError)


def may_pass(error: BaseException) -> bool:
    """Whether a reader of the log should try again: not after a table or a right is missing (class 42)."""
    database = isinstance(error, sa.exc.DBAPIError | sa.exc.TimeoutError | OSError)
    absent = (sqlstate(error) or "").startswith("42") or _sqlite_code(error) == _SQLITE_ERROR
    return database and not absent and not refuses_values(error)


def is_stale(error: BaseException) -> bool:
    """Whether another connection may succeed where this one failed, so that it must not go back to its pool."""
    return (sqlstate(error) or "").startswith(_STALE)


def was_rolled_back(error: BaseException) -> bool:
    """Whether nothing of the transaction that failed with ``error`` can have been committed: the server said so."""
    if not isinstance(error, sa.exc.DBAPIError) or error.connection_invalidated:
        return False
    state = sqlstate(error)
    return not is_outage(error) if state is None else not state.startswith(("08", "57P", "40003"))


def contained(
    items: Sequence[T], step: Callable[[Sequence[T]], R], refused: Callable[[T, Exception], object]
) -> list[R]:
    """What ``step`` gives for ``items``: for all at once or, where the database refuses that, for each alone, so that
    one of them cannot hold up the others; ``refused`` is told of those. Raises an outage.
    """
    try:
        return [step(items)]
    except Exception as error:
        if is_outage(error):
            raise
        if len(items) == 1:
            refused(items[0], error)
            return []
    return [result for item in items for result in contained([item], step, refused)]


def _sqlite_code(error: BaseException) -> int | None:
    code = getattr(getattr(error, "orig", None) or error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
