"""Servers that take a connection and then say nothing: an upload to one is given up."""

from __future__ import annotations

import select
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, Rendered, Runner
from jobkit.storage import remote as storage
from tests.support.files import intents, put, rows
from tests.support.runners import only, seen
from tests.support.s3 import KEY, SECRET

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Silent:
    """Answers each connection's first bytes with ``greeting``, reads no more, and counts who has hung up."""

    def __init__(self, greeting: bytes = b"") -> None:
        self.gone = threading.Semaphore(0)
        self._greeting = greeting
        self.connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self.connections.append(connection)
            self._threads.append(threading.Thread(target=self._hold, args=(connection,)))
            self._threads[-1].start()

    def _hold(self, connection: socket.socket) -> None:
        if self._greeting and connection.recv(1 << 16):
            connection.sendall(self._greeting)
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)
        poll.poll(60_000)
        self.gone.release()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(60)
        for connection in self.connections:
            connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(60)
        for connection in self.connections:
            connection.close()


@pytest.fixture
def silent() -> Iterator[Callable[..., Silent]]:
    servers: list[Silent] = []

    def start(greeting: bytes = b"") -> Silent:
        servers.append(Silent(greeting))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def store_on(server: Silent, engine: sa.Engine) -> AssetStore:
    settings = {"key": KEY, "secret": SECRET, "endpoint_url": server.url, "client_kwargs": {"region_name": "us-east-1"}}
    return AssetStore(f"s3://bucket/{uuid.uuid4()}", engine=engine, storage_options=settings)


# A small file in one request, and one whose body is more than the sockets hold, once the server has asked for it.
UPLOADS = {"before the body": (b"", b"content"), "within the body": (CONTINUE, b"x" * (12 << 20))}


@pytest.mark.parametrize("when", UPLOADS)
def test_an_upload_to_a_server_that_falls_silent_is_given_up(
    when: str, silent: Callable[..., Silent], sqlite_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    greeting, body = UPLOADS[when]
    server = silent(greeting)
    store = store_on(server, sqlite_database.engine)
    monkeypatch.setattr(storage, "PATIENCE", 1.0)
    monkeypatch.setattr(storage, "SLOWEST", 100 << 20)
    with pytest.raises(jobkit.AssetError, match=rf"^the storage did not take {len(body)} bytes within 1 seconds$"):
        put(store, body)
    if greeting == b"":  # otherwise the system waits until the server has read what it was sent
        for _ in server.connections:  # none, when the client took longer than that to set itself up
            assert server.gone.acquire(timeout=50)
    assert list(intents(sqlite_database.engine).values()) == ["pending"]


def test_a_job_whose_upload_is_given_up_fails_with_that_message(
    engine: sa.Engine, create: Callable[..., jobkit.Job], silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 1.0)
    job, store = create(), store_on(silent(), engine)
    Runner(engine, store, only(lambda ctx: Rendered("a", "text/plain", b"x"))).run_until_idle(timeout=60)
    assert (seen(engine, job).status, seen(engine, job).error_message) == (
        "failed",
        "the storage did not take 1 bytes within 1 seconds",
    )
    assert rows(engine) == []


def test_an_upload_may_take_longer_the_larger_it_is(tmp_path: Path) -> None:
    told: list[float] = []

    class Slow:
        async_impl = True

        def put_file(self, source: str, path: str, *, timeout: float) -> None:
            told.append(timeout)
            raise TimeoutError("the driver's own")

    for size in (1, 500 << 20):
        source = tmp_path / "source"
        with open(source, "wb") as file:
            file.truncate(size)
        with pytest.raises(TimeoutError, match="the driver's own"):
            storage._send(Slow(), source, "path")
    assert [round(timeout) for timeout in told] == [600, 8600]
