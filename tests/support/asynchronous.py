"""Databases under asynchronous drivers, each with the event loop that its connections belong to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import greenlet_spawn

import jobkit
from tests.support.databases import Database

T = TypeVar("T")
DRIVERS = {"aiosqlite": "sqlite_database", "asyncpg": "postgres_database", "psycopg": "postgres_database"}


class Lane:
    """One database, its synchronous engine, and an asynchronous one on the same rows."""

    def __init__(self, database: Database, driver: str) -> None:
        self.database, self.driver = database, driver
        self.engine = database.engine
        self.loop = asyncio.Runner()
        self._made: list[AsyncEngine] = []
        self.async_engine = self.connect()

    def connect(self, **options: Any) -> AsyncEngine:
        """Another asynchronous engine, as a host makes it."""
        url = sa.make_url(self.database.url)
        engine = create_async_engine(url.set(drivername=f"{url.get_backend_name()}+{self.driver}"), **options)
        if self.driver == "aiosqlite":
            jobkit.configure_sqlite(engine, synchronous="NORMAL")
        self._made.append(engine)
        return engine

    def run(self, story: Callable[[], Awaitable[T]], timeout: float = 60) -> T:
        """Run an asynchronous story to its end."""

        async def bounded() -> T:
            async with asyncio.timeout(timeout):
                return await story()

        return self.loop.run(bounded())

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a plain function that uses ``async_engine.sync_engine`` as any other engine."""
        return self.loop.run(greenlet_spawn(function, *args, **kwargs))

    def close(self) -> None:
        async def dispose() -> None:
            for engine in self._made:
                await engine.dispose()

        self.loop.run(dispose())
        self.loop.close()
