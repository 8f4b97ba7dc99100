"""The examples, run as a reader would: the script in a process of its own, the Flask app over HTTP on 127.0.0.1."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import pytest
import sqlalchemy as sa
from werkzeug.serving import make_server

import jobkit
from examples.flask_app import create_app
from jobkit import signals
from jobkit.tables import assets, content_job_events, content_jobs
from tests.support.databases import Database
from tests.support.invariants import violations

ROOT = Path(__file__).parents[2]
DEADLINE = 240.0
T = TypeVar("T")
TEXT = "Three teapots were sold.\n\n- one blue\n- two green\n"


# --- the bare script


def test_the_script_makes_both_files_and_tells_every_step(tmp_path: Path) -> None:
    for _ in range(2):  # again in the same folder
        command = [sys.executable, "-W", "error", "examples/script.py", str(tmp_path)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert re.findall(r"content_job\.\w+", ran.stdout) == [
            "content_job.queued",
            "content_job.running",
            "content_job.done",
        ]
    table, note = sorted(tmp_path.rglob("*.csv")), sorted(tmp_path.rglob("*.txt"))
    assert [path.read_bytes() for path in table] == [
        b"item,count,price\r\ntea,3,4.5\r\ncoffee,2,7.25\r\ncups,12,1.1\r\n"
    ] * 2
    assert [path.read_text() for path in note] == ["3 items, 41.20 in all\n"] * 2
    assert str(table[-1]) in ran.stdout


# --- a browser


@dataclass
class Page:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Browser:
    """One server, as a browser sees it. Follows no redirect by itself."""

    port: int
    company: str = "acme"

    def get(self, path: str, **headers: str) -> Page:
        return self._request("GET", path, None, headers)

    def order(self, title: str, text: str = TEXT) -> Page:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._request("POST", f"/{self.company}/reports", urlencode({"title": title, "text": text}), headers)

    def order_and_wait(self, title: str) -> str:
        """Order a report; where to download it, once that is possible."""
        ordered = self.order(title)
        assert ordered.status == 303, ordered
        status = ordered.headers["Location"]
        page = wait_for(lambda: self.get(status), lambda page: page.json["status"] in ("done", "failed"))
        assert (page.json["status"], page.json["error"], page.json["title"]) == ("done", None, title)
        return str(page.json["download"])

    def _request(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> Page:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Page(response.status, response.msg, response.read())


def wait_for(look: Callable[[], T], until: Callable[[T], bool]) -> T:
    """What ``look`` sees once ``until`` holds of it; the test fails after a deadline."""
    deadline = time.monotonic() + DEADLINE
    while not until(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.02)
    return seen


# --- the app, served by a thread of this process


@pytest.fixture
def site(database: Database, tmp_path: Path) -> Iterator[Browser]:
    """The Flask example on each database, served over HTTP; stopped as the example stops it."""
    done = signals.content_job_done
    before = set(done.receivers)
    app = create_app(database.url, str(tmp_path / "assets"))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Browser(server.server_port)
    server.shutdown()
    thread.join(DEADLINE)
    server.server_close()
    app.extensions["jobkit"].stop()
    for key in set(done.receivers) - before:
        done.disconnect(done.receivers[key])
    app.extensions["jobkit"].engine.dispose()


def count(engine: sa.Engine, table: sa.Table | str) -> int:
    with engine.connect() as connection:
        query = sa.select(sa.func.count()).select_from(table if isinstance(table, sa.Table) else sa.table(table))
        if table is content_job_events:  # how often a job says how far it is depends on how long it takes
            query = query.where(content_job_events.c.type != "content_job.progress")
        found: int = connection.execute(query).scalar_one()
        return found


def test_a_report_is_ordered_made_and_downloaded(site: Browser, database: Database, tmp_path: Path) -> None:
    download = site.order_and_wait("Teapots")
    page = site.get(download)
    with database.engine.connect() as connection:
        asset = connection.execute(sa.select(assets)).one()
    assert page.status == 200
    assert page.body.startswith(b"%PDF-")
    assert hashlib.sha256(page.body).hexdigest() == asset.sha256
    assert page.body == (tmp_path / "assets" / asset.object_key).read_bytes()
    assert {name.lower(): value for name, value in page.headers.items()}.items() >= {
        "content-type": "application/pdf",
        "content-length": str(len(page.body)),
        "x-content-type-options": "nosniff",
        "etag": f'"{asset.sha256}"',
    }.items()
    assert page.headers["Content-Disposition"].startswith("attachment; filename=")
    assert site.get(download, If_None_Match=page.headers["ETag"]).status == 304
    assert violations(database.engine, tmp_path / "assets") == []


def test_a_company_is_told_once_however_many_apps_hear_of_it(
    site: Browser, database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_app(database.url, str(tmp_path / "assets"))
    with caplog.at_level(logging.INFO):
        site.order_and_wait("Teapots")
        wait_for(lambda: site.get("/acme/"), lambda page: b"the company was told" in page.body)
    assert [r.getMessage().partition(" of ")[0] for r in caplog.records if "mail" in r.getMessage()] == [
        "here a mail would tell acme"
    ]


def test_a_request_that_fails_after_create_leaves_no_job_and_no_event(site: Browser, database: Database) -> None:
    site.order_and_wait("Teapots")
    tables: list[sa.Table | str] = [content_jobs, content_job_events, assets, "reports"]
    before = [count(database.engine, table) for table in tables]
    refused = site.order("Teapots")
    assert (refused.status, b"already" in refused.body) == (409, True)
    assert site.order("Cups").status == 303  # the connection it used is whole
    assert before == [1, 3, 1, 1]
    wait_for(lambda: [count(database.engine, table) for table in tables], lambda now: now == [2, 6, 2, 2])


@pytest.mark.parametrize(("title", "text"), [("nul \0", TEXT), ("long", "x" * (1 << 20))])
def test_input_that_no_job_can_have_is_the_clients_fault(
    site: Browser, database: Database, title: str, text: str
) -> None:
    # Flask itself refuses a form field of more than 500 kB, with 413.
    refused = site.order(title, text)
    assert refused.status in (400, 413)
    assert count(database.engine, content_jobs) == count(database.engine, "reports") == 0


def test_another_company_sees_neither_report_nor_file(site: Browser) -> None:
    download = site.order_and_wait("Teapots")
    asset = download.rpartition("/")[2]
    other = quote("acme 2")
    for path in (f"/{other}/assets/{asset}", f"/{other}/reports/1", "/acme/assets/nonsense", "/acme/reports/2"):
        assert site.get(path).status == 404, path
    assert b"Teapots" not in site.get(f"/{other}/").body


def test_a_file_name_beyond_ascii_reaches_the_browser(site: Browser, database: Database) -> None:
    download = site.order_and_wait("Teapots")
    rename(database.engine, "Größe\n€.pdf")
    disposition = site.get(download).headers["Content-Disposition"]
    assert disposition.endswith("filename*=UTF-8''Gr%C3%B6%C3%9Fe_%E2%82%AC.pdf")
    assert disposition.startswith("attachment; filename=")


def rename(engine: sa.Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(assets.update().values(original_filename=name))


def test_loading_the_app_starts_nothing(sqlite_database: Database, tmp_path: Path) -> None:
    # A reloader's supervisor, `flask routes` and a parent that forks workers load it and serve nothing.
    app = create_app(sqlite_database.url, str(tmp_path / "assets"))
    assert runner_threads() == []
    client = app.test_client()
    assert client.get("/acme/").status_code == client.get("/acme/").status_code == 200
    assert runner_threads() == ["jobkit-relay", "jobkit-runner"]
    app.extensions["jobkit"].stop()


def runner_threads() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name in ("jobkit-runner", "jobkit-relay"))


# --- the app, as `flask run` serves it


@pytest.mark.parametrize(
    ("options", "end"), [([], signal.SIGTERM), ([], signal.SIGINT), (["--debug"], signal.SIGTERM)], ids=str
)
def test_flask_run_serves_renders_and_stops_clean(
    options: list[str], end: signal.Signals, sqlite_database: Database, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flask", "--app", "examples.flask_app", "run", f"--port={port}", *options]
    environment = {**os.environ, "DATABASE_URL": sqlite_database.url, "ASSETS_URL": str(tmp_path / "assets")}
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        site = Browser(port)
        wait_for(lambda: answers(site, server, tmp_path / "log"), bool)
        assert site.get(site.order_and_wait("Teapots")).body.startswith(b"%PDF-")
        assert site.order("Cups").status == 303  # in flight, or about to be, when the server is told to stop
        os.killpg(server.pid, end)
        assert server.wait(DEADLINE) == 0
        wait_for(lambda: group_alive(server.pid), lambda alive: not alive)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(DEADLINE)
        log.close()
    assert "Traceback" not in (tmp_path / "log").read_text()
    with sqlite_database.engine.connect() as connection:
        left = [job.status for job in jobkit.JobStore(connection).list_by_company("acme")]
    # The reloader, when it is stopped, kills its child: a job in flight then waits for its lease to run out.
    assert left in (["done", "done"], ["queued", "done"], *([["running", "done"]] if options else []))
    assert violations(sqlite_database.engine, tmp_path / "assets") == []


def answers(site: Browser, server: subprocess.Popen[bytes], log: Path) -> bool:
    assert server.poll() is None, log.read_text()
    try:
        return site.get("/acme/").status == 200
    except OSError:
        return False


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
