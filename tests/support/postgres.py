"""TEMPORARY: replaced by the real one."""

from __future__ import annotations

import os
import uuid

import sqlalchemy as sa


class Server:
    owned = False

    def __init__(self) -> None:
        self.url = os.environ["JOBKIT_TEST_POSTGRES_URL"]

    def create_database(self, template: str | None = None) -> str:
        name = "jobkit_" + uuid.uuid4().hex
        engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as c:
            c.exec_driver_sql(
                f"create database {name}" + (f" template {sa.make_url(template).database}" if template else "")
            )
        engine.dispose()
        return sa.make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def drop_database(self, url: str) -> None:
        engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as c:
            c.exec_driver_sql(f"drop database {sa.make_url(url).database} with (force)")
        engine.dispose()

    def stop(self) -> None:
        pass


def start_server() -> Server:
    return Server()
