"""Whether the database has the tables this version works with."""

from __future__ import annotations

import sqlalchemy as sa

from jobkit.errors import SchemaOutOfDate
from jobkit.tables import metadata


def require_schema(engine: sa.Engine) -> None:
    """Return when every table has every column; ``SchemaOutOfDate`` naming what is missing and what to call. Reads no
    row.
    """
    with engine.connect() as connection:
        for table in metadata.sorted_tables:
            try:
                connection.execute(sa.select(table).limit(0))
            except (sa.exc.ProgrammingError, sa.exc.OperationalError) as error:
                reason = str(error.orig).splitlines()[0]
                if isinstance(error, sa.exc.OperationalError) and "no such" not in reason:
                    raise
                raise SchemaOutOfDate(
                    f"{reason}: call jobkit.migrations.upgrade(engine), or run jobkit migrate"
                ) from None
