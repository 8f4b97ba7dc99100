"""An ASGI app with one page of events, for a server of its own: ``uvicorn tests.support.streaming:app``."""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa

import jobkit
from jobkit import sse

engine = sa.create_engine(os.environ["DATABASE_URL"])
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await receive()
        sse.end_on_signals()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        engine.dispose()
        await send({"type": "lifespan.shutdown.complete"})
        return
    headers = [(name.lower().encode(), value.encode()) for name, value in sse.HEADERS.items()]
    async with await sse.astream(engine, "acme") as stream:
        await send({"type": "http.response.start", "status": stream.status, "headers": headers})
        async for piece in stream:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
