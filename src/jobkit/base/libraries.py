"""The private names of libraries that jobkit uses, each with the reason.

Each may change with any release of its library; ``tests/test_shape.py`` checks that the installed release still has it
and that no module uses another.
"""

from __future__ import annotations

PRIVATE_NAMES = {
    "blinker:Signal._by_sender": "which receivers a sender has: receivers_for() builds a list by a slower way",
    "blinker:Signal._by_receiver": "written by the override of the method that removes a receiver",
    "blinker:Signal._clear_state": "overridden, so that a cleared signal forgets the receivers it kept",
    "alembic.runtime.migration:MigrationContext._ensure_version_table": "public only through run_migrations, see below",
    "alembic.runtime.migration:MigrationContext._version": "the version table, which downgrade drops",
    "alembic.script:ScriptDirectory._upgrade_revs": "run_migrations replaces the global op of a host's own migration",
    "alembic.script:ScriptDirectory._downgrade_revs": "as _upgrade_revs",
    "aiosqlite:Connection._tx": "its thread's queue: a rollback may have to be queued where nothing can be awaited",
    "aiosqlite:Connection._conn": "the sqlite3 connection whose rollback is queued",
    "sqlalchemy.engine.base:OptionEngineMixin._proxied": "the engine that execution_options() was called on",
    "sqlalchemy.pool:QueuePool._max_overflow": "how many connections a pool gives out at once",
    "sqlalchemy.engine.default:DefaultDialect._on_connect_isolation_level": "create_engine(isolation_level=)",
    "fsspec:AbstractFileSystem._strip_protocol": "overridden: a faulty filesystem takes the URLs of its target",
    "fsspec:AbstractFileSystem._get_kwargs_from_urls": "as _strip_protocol",
    "fsspec.registry._registry": "how the implementation of a protocol is put back after a test",
}
