"""How a database reads jobkit's tables to carry out what is sent to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa

from jobkit.tables import metadata
from tests.support.sent import hearing

# One of the tables has a row for each server that the log has been on: how that is read is no matter.
TABLES = set(metadata.tables) - {"content_job_epochs"}


class Paths(dict[str, float]):
    """The ways in which tables are read, and how many of their rows at most, 0 where the database does not say.

    ``content_jobs: index NAME`` when a condition picks entries of the index, ``content_jobs: from one end of index
    NAME`` when none does, ``content_jobs: all`` when the table is read as it lies. Whether the rows are looked at
    besides the index, and in which order, depends on versions and is left out.
    """

    def add(self, table: str, index: str | None, *, picked: bool, rows: float = 0) -> None:
        way = "all" if index is None else f"index {index}" if picked else f"from one end of index {index}"
        self[f"{table}: {way}"] = max(rows, self.get(f"{table}: {way}", 0))


@contextmanager
def explained(engine: sa.Engine, *, prepared: bool = False) -> Iterator[Paths]:
    """The paths of everything that is sent meanwhile. On PostgreSQL each statement is carried out twice, the first time
    in a savepoint that is rolled back.

    ``prepared``, on PostgreSQL only: as a statement that was prepared, once the server has seen it often enough to
    choose between a plan for each call and one for any values.
    """
    paths = Paths()
    explain = _sqlite if engine.dialect.name == "sqlite" else _prepared if prepared else _planned
    with hearing(
        engine, lambda connection, statement, values: explain(paths, connection.connection, statement, values)
    ):
        yield paths


# --- SQLite

_ALIAS = re.compile(rf"\b({'|'.join(TABLES)}) (?:AS )?(\w+)")
_STEP = re.compile(r"(SCAN|SEARCH) (?:TABLE )?(\w+)(?:.* USING (?:COVERING )?(?:INDEX (\w+)|(INTEGER PRIMARY KEY)))?")


def _sqlite(paths: Paths, driver: Any, statement: str, values: Any) -> None:
    names = {alias: table for table, alias in _ALIAS.findall(statement)} | {table: table for table in TABLES}
    with closing(driver.cursor()) as cursor:
        cursor.execute(f"EXPLAIN QUERY PLAN {statement}", values)
        for row in cursor.fetchall():
            if (step := _STEP.match(row[-1])) and step[2] in names:
                paths.add(names[step[2]], step[3] or step[4], picked=step[1] == "SEARCH")


# --- PostgreSQL

# Carried out, because before that a plan does not show what is below a recursive part.
_EXPLAIN = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, FORMAT JSON)"


def _planned(paths: Paths, driver: Any, statement: str, values: Any) -> None:
    with _undone(driver.driver_connection.cursor()) as cursor:
        cursor.execute(f"{_EXPLAIN} {statement}", values)
        _add(paths, cursor.fetchone()[0][0]["Plan"])


def _prepared(paths: Paths, driver: Any, statement: str, values: Any) -> None:
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
    numbered = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", statement).replace("%%", "%")
    marks = f"({', '.join(['%s'] * len(names))})" if names else ""
    with _undone(psycopg.ClientCursor(driver.driver_connection)) as cursor:
        cursor.execute(f"PREPARE prepared AS {numbered}")
        execute = f"EXECUTE prepared {marks}", [values[name] for name in names]
        for _ in range(5):
            cursor.execute(f"EXPLAIN {execute[0]}", execute[1])
        cursor.execute(f"{_EXPLAIN} {execute[0]}", execute[1])
        _add(paths, cursor.fetchone()[0][0]["Plan"])
        cursor.execute("DEALLOCATE prepared")


@contextmanager
def _undone(cursor: Any) -> Iterator[Any]:
    with closing(cursor):
        cursor.execute("SAVEPOINT explained")
        try:
            yield cursor
        finally:
            cursor.execute("ROLLBACK TO SAVEPOINT explained")


def _add(paths: Paths, node: dict[str, Any], table: str = "") -> None:
    # The rows of a bitmap scan are counted where its index is read, below it.
    table = node.get("Relation Name", table)
    rows = node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
    if table in TABLES and (node["Node Type"] == "Seq Scan" or "Index Name" in node):
        paths.add(table, node.get("Index Name"), picked="Index Cond" in node, rows=rows)
    for part in node.get("Plans", ()):
        _add(paths, part, table)
