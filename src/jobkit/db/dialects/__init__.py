"""The statements that differ between SQLite and PostgreSQL, each written out. Every function works in the caller's
transaction.

A batch crosses as one JSON document: both databases read it as rows, with any driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobkit.db.dialects import postgresql, sqlite
from jobkit.errors import ConfigurationError

if TYPE_CHECKING:
    import sqlalchemy as sa

    from jobkit.db.dialects.base import Dialect

_KNOWN: dict[str, Dialect] = {"postgresql": postgresql.Postgresql(), "sqlite": sqlite.Sqlite()}


def statements_for(bind: sa.Connection | sa.Engine) -> Dialect:
    """The statements of ``bind``'s database; ``ConfigurationError`` when it is neither SQLite nor PostgreSQL."""
    try:
        return _KNOWN[bind.dialect.name]
    except KeyError:
        raise ConfigurationError(f"jobkit works on SQLite and PostgreSQL, not on {bind.dialect.name}") from None
