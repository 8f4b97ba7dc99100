"""Which event log an engine leads to. The database is asked: two addresses may be one log, and one may be two."""

from __future__ import annotations

from contextlib import closing
from weakref import WeakKeyDictionary, ref

import sqlalchemy as sa

from jobkit.db.connections import DedicatedConnection
from jobkit.db.dialects import statements_for
from jobkit.db.host import require_schema
from jobkit.db.sqlite import is_memory
from jobkit.tables import content_job_epochs

# By engine: its pool when it was asked, which ``dispose`` replaces, or None to ask again; and the answer.
_known: WeakKeyDictionary[sa.Engine, tuple[ref[sa.Pool] | None, str]] = WeakKeyDictionary()


def log_of(engine: sa.Engine) -> str:
    """The identity of the event log, the same for all engines of this process that lead to it. Blocks on the database
    at an engine's first time, and then makes positions hold if the log has come from another server; raises what it
    raises, ``SchemaOutOfDate`` without the tables.
    """
    pool, name = _known.get(engine, (None, ""))
    if pool is None or pool() is not engine.pool:
        name, settled = _asked(engine)
        _known[engine] = (ref(engine.pool) if settled else None), name
    return name


def known_log(engine: sa.Engine) -> str:
    """The last answer of ``log_of``, empty when it was never asked. Never blocks."""
    return _known.get(engine, (None, ""))[1]


def _asked(engine: sa.Engine) -> tuple[str, bool]:
    other = f"{engine.dialect.name}:{id(engine.dialect)}"
    if is_memory(engine):
        return other, True
    statements = statements_for(engine)
    # On SQLite as it comes: what is changed of it would hide a hook of the host that jobkit refuses.
    with closing(DedicatedConnection(engine, autocommit=engine.dialect.name == "postgresql")) as link:
        try:
            with link.use() as connection:
                connection.execute(sa.select(content_job_epochs.c.epoch).limit(0))
                name = statements.log_name(connection)
                settled = statements.note_moves(connection)
        except sa.exc.DBAPIError:
            require_schema(engine)
            raise
    return name or other, settled
