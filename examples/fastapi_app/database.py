"""The host's database: two engines on one URL, and its own table beside jobkit's.

DATABASE_URL says where it is, ``postgresql+psycopg://…`` or ``sqlite:///…``; without it, it is an SQLite file.
"""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateTable

from jobkit import configure_sqlite, migrations

FOLDER = Path("jobkit-demo")


def _url() -> sa.URL:
    if named := os.environ.get("DATABASE_URL"):
        return sa.make_url(named)
    FOLDER.mkdir(exist_ok=True)
    return sa.make_url(f"sqlite:///{FOLDER}/fastapi.db")


url = _url()
on_sqlite = url.get_backend_name() == "sqlite"

# The runner's threads use the first, requests use the second. psycopg serves both; SQLite needs a driver for each.
engine = sa.create_engine(url)
requests = create_async_engine(url.set(drivername="sqlite+aiosqlite") if on_sqlite else url)
if on_sqlite:
    configure_sqlite(engine)
    configure_sqlite(requests)

new_session = async_sessionmaker(requests, expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class Report(Base):
    """The host's own row. It repeats nothing of the job's row."""

    __tablename__ = "fastapi_reports"
    __table_args__ = (sa.UniqueConstraint("company", "title"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    company: Mapped[str]
    title: Mapped[str]
    job_id: Mapped[UUID]


def migrate() -> None:
    """Create the tables of jobkit and of the host. All workers do it at their start. A real host has Alembic."""
    migrations.upgrade(engine)
    with engine.begin() as connection:
        if not on_sqlite:  # IF NOT EXISTS alone fails when two processes check at the same moment
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(9020)))
        connection.execute(CreateTable(Report.__table__, if_not_exists=True))
