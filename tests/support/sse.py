"""A small client of event streams, as the standard reads them, and the servers that it reads from."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self

import sqlalchemy as sa
import uvicorn
from werkzeug.serving import make_server

from jobkit import JobNotFound, sse
from tests.support.runners import until

DEADLINE = 60.0


@dataclass
class Message:
    event: str
    id: str
    text: str

    @property
    def data(self) -> Any:
        return json.loads(self.text)

    @property
    def type(self) -> str:
        """The short name of a job's event; of another message its own name."""
        return self.data["type"].removeprefix("content_job.") if self.event == "message" else self.event


@dataclass
class Parser:
    """ "9.2.6 Interpreting an event stream" of the HTML standard; ``feed`` takes bytes cut anywhere."""

    last_event_id: str = ""
    retry: int | None = None
    comments: int = 0
    _rest: bytes = b""
    _fields: dict[str, str] = field(default_factory=dict)

    def feed(self, data: bytes) -> Iterator[Message]:
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            if line:
                self._line(line.decode())
            elif (message := self._dispatch()) is not None:
                yield message

    def _line(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments += 1
        elif name == "retry" and value.isdigit():
            self.retry = int(value)
        elif name == "data":
            self._fields["data"] = self._fields.get("data", "") + value + "\n"
        elif name == "event" or (name == "id" and "\0" not in value):
            self._fields[name] = value

    def _dispatch(self) -> Message | None:
        fields, self._fields = self._fields, {}
        self.last_event_id = fields.get("id", self.last_event_id)
        if "data" not in fields:
            return None
        return Message(fields.get("event") or "message", self.last_event_id, fields["data"].removesuffix("\n"))


def parsed(*pieces: bytes) -> list[Message]:
    parser = Parser()
    return [message for piece in pieces for message in parser.feed(piece)]


class Client:
    """One request for a stream. Iterates its messages; a thread may do it, see ``follow``."""

    def __init__(self, port: int, path: str, last_event_id: str | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        headers = {"Accept": "text/event-stream"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        self._connection.request("GET", path, headers=headers)
        self._socket = self._connection.sock
        self._response = self._connection.getresponse()
        self.status, self.headers = self._response.status, self._response.headers
        self.parser = Parser(last_event_id or "")
        self.messages: list[Message] = []
        self.ended, self._given = False, 0
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Message]:
        """The messages from here on, until the stream ends by itself."""
        while True:
            while self._given < len(self.messages):
                self._given += 1
                yield self.messages[self._given - 1]
            if not (piece := self._response.read1(65536)):
                break
            self.messages += self.parser.feed(piece)
        self.ended = True

    def take(self, count: int) -> list[Message]:
        """The next messages, fewer when the stream ends before."""
        return list(islice(self, count))

    def follow(self) -> Self:
        """Read to the end, on a thread."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def has(self, count: int) -> Self:
        until(lambda: len(self.messages) >= count, f"{count} messages", DEADLINE)
        return self

    def all(self) -> list[Message]:
        """Every message, once the stream has ended by itself."""
        if self._thread is None:
            list(self)
        else:
            until(lambda: self.ended, "the end of the stream", DEADLINE)
        return self.messages

    def close(self) -> None:
        # From any thread, also while another reads.
        with _ignored():
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(DEADLINE)
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        with _ignored():
            list(self)


def _ignored() -> suppress:
    """A connection that was closed under its reader."""
    return suppress(OSError, http.client.HTTPException, ValueError, AttributeError)


class Site:
    """``/{company}`` and ``/{company}/{job}`` are streams. ``options``: of the streams that are opened from now on."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine, self.port = engine, 0
        self.options: dict[str, Any] = {}
        self.opened = self.closed = 0

    def get(self, *path: object, last_event_id: str | None = None) -> Client:
        return Client(self.port, "/" + "/".join(map(str, path)), last_event_id)

    def wsgi(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Any:
        company, _, job = environ["PATH_INFO"].removeprefix("/").partition("/")
        last = environ.get("HTTP_LAST_EVENT_ID")
        try:
            stream = sse.stream(self.engine, company, job or None, last_event_id=last, **self.options)
        except JobNotFound:
            start_response("404 Not Found", [("Content-Length", "0")])
            return [b""]
        start_response(f"{stream.status} Fine", list(sse.HEADERS.items()))
        return Counted(self, stream)

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        company, _, job = scope["path"].removeprefix("/").partition("/")
        last = dict(scope["headers"]).get(b"last-event-id", b"").decode("latin-1")
        try:
            stream = await sse.astream(self.engine, company, job or None, last_event_id=last, **self.options)
        except JobNotFound:
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        headers = [(name.lower().encode(), value.encode()) for name, value in sse.HEADERS.items()]
        await send({"type": "http.response.start", "status": stream.status, "headers": headers})
        self.opened += 1
        sending = asyncio.ensure_future(_send_all(stream, send))
        leaving = asyncio.ensure_future(_gone(receive))
        await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (sending, leaving):
            task.cancel()
        await asyncio.gather(sending, leaving, return_exceptions=True)
        await stream.aclose()
        self.closed += 1


class Counted:
    """A response's body that says when its server closed it."""

    def __init__(self, site: Site, stream: sse.Stream) -> None:
        site.opened += 1
        self._site, self._stream = site, stream

    def __iter__(self) -> Iterator[bytes]:
        return self._stream

    def close(self) -> None:
        self._stream.close()
        self._site.closed += 1


async def _send_all(stream: sse.AsyncStream, send: Any) -> None:
    async for piece in stream:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def served_by_wsgi(site: Site) -> Iterator[Site]:
    server = make_server("127.0.0.1", 0, site.wsgi, threaded=True)
    site.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        sse.end_all()
        server.shutdown()
        thread.join(DEADLINE)
        until(lambda: site.closed == site.opened, "the end of every response", DEADLINE)
        server.server_close()


@contextmanager
def served_by_asgi(site: Site) -> Iterator[Site]:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        site.port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(site.asgi, log_config=None, lifespan="off", interface="asgi3"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        until(lambda: server.started, "uvicorn", DEADLINE)
        try:
            yield site
        finally:
            sse.end_all()
            server.should_exit = True
            thread.join(DEADLINE)
            assert not thread.is_alive()


SERVERS = {"wsgi": served_by_wsgi, "asgi": served_by_asgi}
