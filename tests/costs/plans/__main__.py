"""``python -m tests.costs.plans``: write anew how each hot statement reads tables. Look at what has changed before you
keep it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from jobkit import migrations
from tests.costs.plans import kept
from tests.support.databases import Database, PostgresDatabase, SqliteDatabase
from tests.support.hot import paths, told
from tests.support.postgres import start_server


def write(database: Database, folder: Path) -> None:
    try:
        migrations.upgrade(database.engine)
        text = told(paths(database.engine, folder / "assets"))
        kept(database.engine.dialect.name).write_text(text, encoding="utf-8")
    finally:
        database.close()


def main() -> None:
    server = start_server()
    try:
        with tempfile.TemporaryDirectory(prefix="jobkit-plans-") as folder:
            write(SqliteDatabase(Path(folder) / "host.db"), Path(folder))
            write(PostgresDatabase(server, None), Path(folder))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
