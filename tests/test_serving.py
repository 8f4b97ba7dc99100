"""The hooks for web servers, on the real ones: a stream is open and a job in flight when the server is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import ConfigurationError, JobStore, SchemaOutOfDate
from tests.support.databases import Database, SqliteDatabase
from tests.support.runners import only, seen, until
from tests.support.surroundings import hear_hang_ups

ROOT = Path(__file__).parents[1]
APP = "tests.support.serving"
# Seconds that a hook is told and a server is given before it kills: more, for a busy machine. Once both are the same.
TOLD, GRACE, DEADLINE = 4, 60, 240.0
DOCUMENTED = 12
GUNICORN = """
def post_worker_init(worker):
    import jobkit
    from tests.support.serving import runner
    runner.start()
    jobkit.on_exit(runner, grace=min(worker.cfg.graceful_timeout, {most}))
"""
PATCHED = "from gevent import monkey; monkey.patch_all()\n"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What these tests handle here is left to nobody else."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    former = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@dataclass
class Server:
    """How a server is started, and how it is told to end: itself or, by ``group``, all of its processes."""

    command: tuple[str, ...]
    number: int = signal.SIGTERM
    group: bool = False
    configuration: str = ""


def gunicorn(*options: str, number: int = signal.SIGTERM, before: str = "", grace: int = GRACE) -> Server:
    command = ("gunicorn", f"{APP}:wsgi", "--bind=127.0.0.1:{port}", "--config={folder}/gunicorn.conf.py")
    configuration = before + GUNICORN.replace("{most}", str(TOLD if grace == GRACE else GRACE))
    return Server((*command, f"--graceful-timeout={grace}", *options), number, configuration=configuration)


def uvicorn(*options: str, number: int = signal.SIGTERM, group: bool = False) -> Server:
    return Server(("uvicorn", f"{APP}:app", "--port={port}", *options), number, group)


def hypercorn(*, group: bool = False) -> Server:
    return Server(("hypercorn", f"{APP}:app", "--bind=127.0.0.1:{port}"), group=group)


UWSGI = (
    "uwsgi", "--http-socket=127.0.0.1:{port}", "--master", "--threads=4", "--enable-threads", f"--wsgi={APP}:wsgi",
    "--die-on-term", "--pythonpath={root}", f"--reload-mercy={GRACE}", "--virtualenv={environment}",
    "--attach-daemon2=cmd={python} -m jobkit work --app " + APP + ":runner --drain 2",
)  # fmt: skip
SERVERS = {
    "gunicorn, documented": gunicorn("--threads=4", grace=DOCUMENTED),
    "gunicorn": gunicorn("--threads=4"),
    "gunicorn, quick": gunicorn("--threads=4", number=signal.SIGINT),
    "gunicorn, preload": gunicorn("--threads=4", "--preload", "--workers=2"),
    "gunicorn, gevent": gunicorn("--worker-class=gevent"),
    "gunicorn, gevent, preload": gunicorn("--worker-class=gevent", "--preload", before=PATCHED),
    "uvicorn": uvicorn(),
    "uvicorn, Ctrl-C": uvicorn(number=signal.SIGINT, group=True),
    "uvicorn, workers": uvicorn("--workers=2"),
    "uvicorn, reload": uvicorn("--reload", "--reload-dir={folder}"),
    "hypercorn": hypercorn(),
    "hypercorn, systemd": hypercorn(group=True),
    "waitress": Server(("-m", APP, "{port}")),
    "waitress, hang-up": Server(("-m", APP, "{port}"), signal.SIGHUP),
    "uwsgi": Server(UWSGI),
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(server: Server, database: Database, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The server, once it answers, and its port."""
    port = free_port()
    (folder / "gunicorn.conf.py").write_text(server.configuration)
    environment = Path(sys.executable).parent
    names = {"port": port, "folder": folder, "root": ROOT, "python": sys.executable, "environment": environment.parent}
    command = [part.format(**names) for part in server.command]
    program = [sys.executable] if command[0] == "-m" else [str(environment / command.pop(0))]
    url = database.engine.url.render_as_string(hide_password=False)
    settings = {"DATABASE_URL": url, "SERVED": str(folder), "GRACE": str(TOLD), "HOME": str(folder)}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*program, *command], cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=hear_hang_ups,  # noqa: PLW1509
        )  # fmt: skip
    try:
        until(lambda: answers(port) or process.poll() is not None, "an answer", DEADLINE)
        assert process.poll() is None, log_of(folder)
        yield process, port
    finally:
        (folder / "go").touch()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


def answers(port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/")
            return connection.getresponse().read() == b"ok"
        return False


@contextlib.contextmanager
def listening(port: int) -> Iterator[http.client.HTTPResponse]:
    """A page that listens; its stream has begun."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
        connection.request("GET", "/events")
        with connection.getresponse() as response:
            assert response.readline().startswith(b"retry:")
            yield response


def submit(database: Database) -> jobkit.Job:
    with database.engine.begin() as connection:
        return JobStore(connection).create("acme", job_type="note")


def ends_in_time(server: Server, database: Database, folder: Path) -> None:
    with serving(server, database, folder) as (process, port):
        job = submit(database)
        until((folder / "begun").exists, f"a render; {log_of(folder)}", DEADLINE)
        with listening(port) as page:
            (os.killpg if server.group else os.kill)(process.pid, server.number)
            with contextlib.suppress(http.client.HTTPException, OSError):  # some servers cut a stream
                page.read()
            process.wait(DEADLINE)
        # Had it been killed at the end of its grace, the job would stay as it is. What uWSGI attached may end after it.
        until(lambda: seen(database.engine, job).status != "running", f"the end of a claim; {log_of(folder)}")
        row = seen(database.engine, job)
        assert (row.status, row.attempt, row.lease_until) == ("queued", 0, None), log_of(folder)
        # hypercorn tells of each stream that it has cut.
        assert "hypercorn" in server.command or "Traceback" not in log_of(folder)


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_is_told_to_end_puts_its_job_back_in_time(
    sqlite_database: Database, tmp_path: Path, name: str
) -> None:
    ends_in_time(SERVERS[name], sqlite_database, tmp_path)


@pytest.mark.parametrize("name", ["gunicorn", "gunicorn, gevent", "uvicorn"])
def test_a_server_on_postgresql_puts_its_job_back_in_time(
    postgres_database: Database, tmp_path: Path, name: str
) -> None:
    ends_in_time(SERVERS[name], postgres_database, tmp_path)


# --- lifespan


class Asgi:
    """A server's side of one lifespan."""

    def __init__(self, app: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self._app = app

    async def run(self) -> None:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            self.sent.append(message)

        await self._app({"type": "lifespan"}, receive, send)


@pytest.mark.parametrize("kind", ["with", "refuses", "returns", "fails before it answers"])
def test_a_runner_runs_from_the_startup_of_its_app_to_its_shutdown(
    engine: sa.Engine, disk: jobkit.AssetStore, kind: str
) -> None:
    runner, noted = jobkit.Runner(engine, disk, only()), []

    def runs() -> bool:
        return any(thread.name == "jobkit-runner" for thread in threading.enumerate())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if kind == "refuses":
            raise ValueError("no lifespan")
        if kind == "returns":
            return
        noted.append(((await receive())["type"], runs()))
        if kind != "with":
            raise ValueError("no lifespan")
        await send({"type": "lifespan.startup.complete"})
        noted.append(("started", runs()))
        noted.append(((await receive())["type"], runs()))
        await send({"type": "lifespan.shutdown.complete"})

    server = Asgi(jobkit.lifespan(app, runner))
    try:
        asyncio.run(server.run())
        assert not runs()
    finally:
        runner.stop(0)
    assert [message["type"] for message in server.sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    expected = [("lifespan.startup", False), ("started", True), ("lifespan.shutdown", False)]
    assert noted == {"with": expected, "fails before it answers": expected[:1]}.get(kind, [])


def test_a_runner_that_cannot_start_fails_the_startup(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})

    with contextlib.closing(SqliteDatabase(tmp_path / "empty.db", migrate=False)) as database:
        assets = jobkit.AssetStore(tmp_path / "assets", engine=database.engine)
        server = Asgi(jobkit.lifespan(app, jobkit.Runner(database.engine, assets, only())))
        with pytest.raises(SchemaOutOfDate):
            asyncio.run(server.run())
    [message] = server.sent
    assert message["type"] == "lifespan.startup.failed"
    assert "jobkit migrate" in message["message"]


# --- on_exit


def test_what_cannot_be_heard_is_refused(
    engine: sa.Engine, disk: jobkit.AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, refused = jobkit.Runner(engine, disk, only()), []

    def elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="main thread"):
            jobkit.on_exit(runner)
        refused.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(60)
    assert refused == [True]
    with pytest.raises(TypeError, match="not Engine"):
        jobkit.on_exit(engine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grace"):
        jobkit.on_exit(runner, grace=-1)
    monkeypatch.setitem(sys.modules, "uwsgi", object())
    with pytest.raises(ConfigurationError, match="attach-daemon2"):
        jobkit.on_exit(runner)
