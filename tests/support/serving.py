"""An app for real servers, as WSGI and as ASGI: ``/events`` is a stream of acme's, and a job never ends by itself.

In the folder that ``SERVED`` names each process writes its pid to ``begun`` when it renders.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import jobkit
from jobkit import sse

FOLDER = Path(os.environ["SERVED"])
engine = sa.create_engine(os.environ["DATABASE_URL"])
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)


def never(ctx: jobkit.RenderContext) -> jobkit.Rendered:
    with (FOLDER / "begun").open("a") as begun:
        begun.write(f"{os.getpid()}\n")
    while not (FOLDER / "go").exists():
        ctx.check()
        time.sleep(0.01)
    return jobkit.Rendered("a.txt", "text/plain", b"x")


runner = jobkit.Runner(
    engine, jobkit.AssetStore(FOLDER / "assets", engine=engine), jobkit.Renderers(default=never), poll_interval=0.05
)


def wsgi(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    if environ["PATH_INFO"] != "/events":
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]
    stream = sse.stream(engine, "acme")
    start_response("200 OK", list(sse.HEADERS.items()))
    return stream


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """Without a lifespan, as Django's."""
    if scope["type"] != "http":
        raise ValueError(f"only HTTP, not {scope['type']}")
    headers = [(name.lower().encode(), value.encode()) for name, value in sse.HEADERS.items()]
    if scope["path"] != "/events":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        return
    async with await sse.astream(engine, "acme") as stream:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for piece in stream:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


app = jobkit.lifespan(asgi, runner, grace=float(os.environ.get("GRACE", "8")))

if __name__ == "__main__":  # waitress, in a script
    import waitress

    runner.start()
    jobkit.on_exit(runner, grace=float(os.environ["GRACE"]))
    waitress.serve(wsgi, listen=f"127.0.0.1:{sys.argv[1]}")
