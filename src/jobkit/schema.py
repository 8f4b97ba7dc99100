"""Whether the database has the tables this version works with."""

from __future__ import annotations

import sqlalchemy as sa

from jobkit.errors import SchemaOutOfDate
from jobkit.sqlite import require_configured
from jobkit.tables import metadata

# PostgreSQL's undefined_table, undefined_column and invalid_schema_name.
_ABSENT = ("42P01", "42703", "3F000")


def require_schema(engine: sa.Engine) -> None:
    """Return when every table has every column; ``SchemaOutOfDate`` naming what is missing and what to call. Reads no
    row. ``ConfigurationError`` when SQLite's connections commit by themselves.
    """
    with engine.connect() as connection:
        require_configured(connection)
        for table in metadata.sorted_tables:
            try:
                connection.execute(sa.select(table).limit(0))
            except (sa.exc.ProgrammingError, sa.exc.OperationalError) as error:
                reason = str(error.orig).splitlines()[0]
                state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
                if state not in _ABSENT and not reason.startswith("no such"):
                    raise
                raise SchemaOutOfDate(
                    f"{reason}: call jobkit.migrations.upgrade(engine), or run jobkit migrate"
                ) from None
