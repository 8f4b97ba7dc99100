"""A worker on SQLite, written by hand with SQLAlchemy Core: the statements are those of the one without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.benchmarks.workers.loop import drain
from tests.benchmarks.workers.report import Report
from tests.benchmarks.workers.sqlite import SqliteTables


class Driver:
    """A Core connection with the methods of sqlite3's."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sa.CursorResult[Any]:
        return self._connection.exec_driver_sql(statement, values)

    def executemany(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> sa.CursorResult[Any]:
        return self._connection.exec_driver_sql(statement, list(rows))


def work(url: str, root: Path, jobs: int, report: Report) -> None:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")  # the statements say where a transaction begins
    with engine.connect() as connection:
        drain(SqliteTables(Driver(connection)), root, jobs, report)
    engine.dispose()
