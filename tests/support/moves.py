"""Ways in which a database of PostgreSQL comes to another server, and the numbers of transactions there."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import psycopg
import sqlalchemy as sa

from jobkit import migrations
from jobkit.tables import content_job_epochs, metadata
from tests.support.postgres import OwnServer
from tests.support.runners import until


def numbered(url: str) -> int:
    """The next number of a transaction on that server."""
    with closing(psycopg.connect(plain(url))) as connection:
        found: Any = connection.execute("SELECT CAST(CAST(pg_current_xact_id() AS text) AS bigint)").fetchone()
        return int(found[0])


def spend(url: str, upto: int) -> None:
    """Let that server give the numbers up to this one."""
    with closing(psycopg.connect(plain(url), autocommit=True)) as connection:
        connection.execute(
            "DO $$ BEGIN WHILE CAST(CAST(pg_current_xact_id() AS text) AS bigint) < "
            f"{upto} LOOP COMMIT; END LOOP; END $$"
        )


def plain(url: str) -> str:
    """The URL as PostgreSQL's own programs take it."""
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def dump(source: str, old: OwnServer, target: str, new: OwnServer) -> None:
    """By ``pg_dump`` and ``psql``."""
    script = old.folder / "dump.sql"
    old.run("pg_dump", "--file", str(script), plain(source))
    new.run("psql", "--quiet", "--set", "ON_ERROR_STOP=1", "--file", str(script), plain(target))


def copy(source: str, old: OwnServer, target: str, new: OwnServer, *, without: tuple[str, ...] = ()) -> None:
    """By COPY into the tables of a new database."""
    _create(target)
    with closing(psycopg.connect(plain(source))) as here, closing(psycopg.connect(plain(target))) as there:
        for table in metadata.tables:
            if table not in without:
                _copy(here, there, table)
        there.commit()
    _go_on_numbering(target)


def copy_of_0_1(source: str, old: OwnServer, target: str, new: OwnServer) -> None:
    """By COPY of the tables that version 0.1 has."""
    copy(source, old, target, new, without=(content_job_epochs.name,))


def replicate(source: str, old: OwnServer, target: str, new: OwnServer) -> None:
    """By logical replication of what is there."""
    _create(target)
    tables = ", ".join(metadata.tables)
    with closing(psycopg.connect(plain(source), autocommit=True)) as here:
        here.execute(f"CREATE PUBLICATION moving FOR TABLE {tables}")
    with closing(psycopg.connect(plain(target), autocommit=True)) as there:
        there.execute(f"CREATE SUBSCRIPTION moving CONNECTION '{plain(source)}' PUBLICATION moving")
        waiting = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'"
        until(lambda: there.execute(waiting).fetchone() == (0,), "the first copies", 60)
        there.execute("DROP SUBSCRIPTION moving")
    _go_on_numbering(target)


WAYS = [dump, copy, copy_of_0_1, replicate]


def _create(url: str) -> None:
    engine = sa.create_engine(url)
    migrations.upgrade(engine)
    engine.dispose()


def _copy(here: psycopg.Connection[Any], there: psycopg.Connection[Any], table: str) -> None:
    out, into = f"COPY {table} TO STDOUT", f"COPY {table} FROM STDIN"
    with here.cursor().copy(out) as rows, there.cursor().copy(into) as sink:
        for row in rows:
            sink.write(row)


def _go_on_numbering(url: str) -> None:
    """Neither COPY nor replication brings a sequence."""
    sequence = "pg_get_serial_sequence('content_job_events', 'id')"
    with closing(psycopg.connect(plain(url), autocommit=True)) as connection:
        connection.execute(f"SELECT setval({sequence}, (SELECT max(id) FROM content_job_events))")
