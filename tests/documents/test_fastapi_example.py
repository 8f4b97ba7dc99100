"""The FastAPI example on a real uvicorn, over HTTP and in a browser."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from jobkit.tables import assets, content_job_events, content_jobs
from tests.support.databases import Database, PostgresDatabase, SqliteDatabase
from tests.support.invariants import violations

ROOT = Path(__file__).parents[2]
DEADLINE = 240.0
# How soon a server has to end though a page listens and a job renders: three seconds for the job, the rest for a busy
# machine. Without an end of the streams it would wait for ever.
AT_ONCE = 25.0
BRANCHES = ["Lisbon", "Oslo", "Vienna"]
SUNK = "Atlantis has sunk"  # for what happens when a renderer fails
T = TypeVar("T")


def wait_for(look: Callable[[], T], until: Callable[[T], bool] = bool) -> T:
    """What ``look`` sees once ``until`` holds of it; the test fails after a deadline."""
    deadline = time.monotonic() + DEADLINE
    while not until(seen := look()):
        assert time.monotonic() < deadline, seen
        time.sleep(0.02)
    return seen


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """The example as one or more processes of uvicorn."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database, self.folder = database, folder
        self.engine, self.assets, self.notes = database.engine, folder / "assets", folder / "noted"
        self._log = folder / "log-0"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port = 0

    # --- processes

    def serve(self, *options: str, workers: int = 1, **environment: str) -> subprocess.Popen[bytes]:
        """Start it; it answers, on every worker, when this returns."""
        self._log = self.folder / f"log-{len(self._processes)}"
        app = ["uvicorn", "tests.support.paced_reports:app", f"--port={self.port}", *options]
        server = self.start(*app, *([f"--workers={workers}"] if workers > 1 else []), **environment)
        wait_for(lambda: self.ready(server), lambda ready: ready == workers)
        # It may answer a moment before its line is in the log.
        found = wait_for(lambda: re.search(r"running on http://127.0.0.1:(\d+)", self.log))
        assert found is not None
        self.port = int(found[1])
        return server

    def ready(self, server: subprocess.Popen[bytes]) -> int:
        assert server.poll() is None, self.log
        return self.log.count("Application startup complete")

    def start(self, module: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        settings = {
            "DATABASE_URL": self.database.url, "STORAGE_URL": self.assets.as_uri(), "PACE": str(self.folder)
        }  # fmt: skip
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **settings, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
        self.open("all")  # what still renders ends
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DEADLINE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    # --- over HTTP

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, company: str = "acme") -> Answer:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)) as connection:
            headers = {"Cookie": f"company={company}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return Answer(response.status, response.msg, response.read())

    def order(self, title: str, *branches: str) -> Answer:
        return self.ask("POST", "/reports", {"title": title, "branches": branches or BRANCHES})

    @contextlib.contextmanager
    def stream(self, report: int) -> Iterator[http.client.HTTPResponse]:
        """A page that listens."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)) as connection:
            connection.request("GET", f"/reports/{report}/events", headers={"Cookie": "company=acme"})
            with connection.getresponse() as response:
                assert response.headers["Content-Type"].startswith("text/event-stream")
                yield response

    # --- what the renderer waits for, what it did, and what is in the tables

    def open(self, branch: str) -> None:
        (self.folder / branch).touch()

    def rendered(self) -> list[tuple[int, str, str]]:
        """Process, title and branch of every page that was begun."""
        notes = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [tuple(json.loads(note)) for note in notes]

    def jobs(self) -> list[sa.Row[Any]]:
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(content_jobs).order_by(content_jobs.c.created_at)).all())

    def statuses(self) -> list[str]:
        return [job.status for job in self.jobs()]

    def counts(self) -> list[int]:
        tables = [content_jobs, content_job_events, assets, sa.table("fastapi_reports")]
        with self.engine.connect() as connection:
            return [connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one() for table in tables]


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """Nothing is in the database: the example's first start makes all tables."""
    database: Database
    if request.param == "sqlite":
        database = SqliteDatabase(tmp_path / "host.db", migrate=False)
    else:
        database = PostgresDatabase(request.getfixturevalue("postgres"), None)
    try:
        with contextlib.closing(Site(database, tmp_path)) as site:
            yield site
        for path in tmp_path.glob("log-*"):
            log = path.read_text()
            assert ("Warning" in log, log.count("Traceback")) == (False, log.count(f"UserError: {SUNK}")), log
        assert violations(site.engine, site.assets) == []
    finally:
        database.close()


def test_a_report_is_ordered_followed_and_downloaded_in_a_browser(site: Site, page: Any) -> None:
    site.serve(workers=2)
    title = "Zahlen <b>für &amp; “alle”"
    page.goto(site.url)
    page.get_by_label("Title").fill(title)
    page.get_by_role("button", name="Make the report").click()
    page.get_by_text("Lisbon, 1 of 3").wait_for()
    assert page.get_by_role("heading", name=title).is_visible()
    assert not page.get_by_role("link", name="Download").is_visible()
    site.open("Lisbon")
    page.get_by_text("Oslo, 2 of 3").wait_for()
    assert page.get_by_role("progressbar").evaluate("bar => bar.value") == pytest.approx(1 / 3)
    page.reload()  # the row tells where it stands
    page.get_by_text("Oslo, 2 of 3").wait_for()
    assert page.get_by_role("progressbar").evaluate("bar => bar.value") == pytest.approx(1 / 3)
    site.open("Oslo")
    site.open("Vienna")
    page.get_by_role("link", name="Download").wait_for()
    assert page.get_by_text("done").is_visible()
    assert not page.get_by_role("button", name="Cancel").is_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    [stored] = [path for path in site.assets.rglob("*") if path.is_file()]
    got = Path(download.value.path()).read_bytes()
    assert got == stored.read_bytes()
    with zipfile.ZipFile(io.BytesIO(got)) as archive:
        assert archive.namelist() == ["01 Lisbon.pdf", "02 Oslo.pdf", "03 Vienna.pdf"]
        assert all(archive.read(name).startswith(b"%PDF-") for name in archive.namelist())
    assert [branch for _, _, branch in site.rendered()] == BRANCHES


def test_two_workers_share_the_jobs_and_render_each_once(site: Site) -> None:
    site.serve(workers=2)
    for number in range(12):
        assert site.order(f"Report {number}", "Oslo").status == 201
    # A runner takes four at a time, and none of these ends before all eight have begun.
    wait_for(site.rendered, lambda begun: len(begun) == 8)
    site.open("all")
    wait_for(site.statuses, lambda statuses: set(statuses) == {"done"})
    begun = site.rendered()
    assert sorted(title for _, title, _ in begun) == sorted(f"Report {number}" for number in range(12))
    first = [process for process, _, _ in begun[:8]]
    assert sorted(map(first.count, set(first))) == [4, 4]
    assert {job.attempt for job in site.jobs()} == {1}


def test_a_process_without_a_started_runner_renders_nothing(site: Site) -> None:
    site.serve(RENDER="0")
    site.open("all")
    assert site.order("Teapots").status == 201
    with site.stream(1) as events:
        assert "content_job.queued" in message(events)["type"]
        worker = site.start("jobkit", "work", "--app", "tests.support.paced_reports:runner")
        while (told := message(events))["type"] != "content_job.done":
            pass
    assert told["payload"]["assetId"]
    assert [(process, branch) for process, _, branch in site.rendered()] == [(worker.pid, b) for b in BRANCHES]


def message(events: http.client.HTTPResponse) -> Any:
    """The next message that a page would be given."""
    while line := events.readline():
        if line.startswith(b"data: "):
            return json.loads(line.removeprefix(b"data: "))
    raise AssertionError("the stream has ended")


def test_a_request_that_fails_leaves_no_row_and_no_job(site: Site) -> None:
    site.serve(workers=2)
    site.open("all")
    assert site.order("Teapots").status == 201
    wait_for(site.statuses, lambda statuses: statuses == ["done"])
    before = site.counts()
    refused = site.order("Teapots")
    assert (refused.status, "already" in refused.json["detail"]) == (409, True)
    assert [site.order("", "Oslo").status, site.order("x", "../Oslo").status, site.order("x", *["y"] * 51).status] == [
        422, 422, 422
    ]  # fmt: skip
    assert site.counts() == before
    assert site.order("Cups").status == 201  # the connection it used is whole


def test_a_report_is_its_companys_alone_and_comes_as_a_file(site: Site) -> None:
    site.serve()
    site.open("all")
    paths = ["/reports/1", "/reports/1/events", "/reports/1/file"]
    assert site.order("Über Tee", "Oslo").headers["Location"] == paths[0]
    assert site.ask("GET", paths[2]).status in (200, 404)  # made already, or not yet
    wait_for(site.statuses, lambda statuses: statuses == ["done"])
    assert [site.ask("GET", path, company="other").status for path in paths] == [404, 404, 404]
    assert site.ask("POST", "/reports/1/cancel", company="other").status == 404
    assert site.ask("GET", "/reports/99999999999999999999").status == 422
    assert b"ber Tee" not in site.ask("GET", "/", company="other").body
    got = site.ask("GET", paths[2])
    with site.engine.connect() as connection:
        asset = connection.execute(sa.select(assets)).one()
    assert got.body == (site.assets / asset.object_key).read_bytes()
    assert (
        dict(got.headers).items()
        >= {
            "content-disposition": "attachment; filename*=UTF-8''%C3%9Cber%20Tee.zip",
            "content-length": str(len(got.body)),
            "content-type": "application/zip",
            "etag": f'"{asset.sha256}"',
            "x-content-type-options": "nosniff",
        }.items()
    )


def test_a_page_shows_a_cancel_and_a_failure_and_refuses_what_is_there(site: Site, page: Any) -> None:
    site.serve()
    page.goto(site.url)
    page.get_by_label("Title").fill("Teapots")
    page.get_by_role("button", name="Make the report").click()
    page.get_by_text("Lisbon, 1 of 3").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("cancelled").wait_for()
    assert [branch for _, _, branch in site.rendered()] == ["Lisbon"]
    page.goto(site.url)
    page.get_by_label("Title").fill("Teapots")
    page.get_by_role("button", name="Make the report").click()
    page.get_by_text("There is a report “Teapots” already.").wait_for()
    page.get_by_label("Title").fill("Cups")
    page.get_by_label("Branches").fill("Atlantis")
    page.get_by_role("button", name="Make the report").click()
    site.open("all")
    page.get_by_text(SUNK).wait_for()
    page.reload()
    page.get_by_text(SUNK).wait_for()


@pytest.mark.parametrize("options", [(), ("--workers=2",), ("--reload",)], ids=["one", "two-workers", "reload"])
@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_ctrl_c_ends_at_once_though_a_page_listens_and_a_job_renders(site: Site, options: tuple[str, ...]) -> None:
    server = site.serve(*options, workers=2 if "--workers=2" in options else 1)
    site.order("Teapots")
    wait_for(site.rendered)
    with site.stream(1) as events:
        assert message(events)["type"] == "content_job.running"
        asked = time.monotonic()
        os.killpg(server.pid, signal.SIGINT)  # as a terminal does
        events.read()  # to a clean end, or it raises IncompleteRead
        server.wait(DEADLINE)
    assert time.monotonic() - asked < AT_ONCE
    [job] = site.jobs()
    assert (job.status, job.attempt) == (
        "queued",
        0,
    )  # for whoever starts next, not charged for what it is not to blame


@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_a_reload_takes_a_moment_though_a_page_listens_and_the_page_goes_on(site: Site, page: Any) -> None:
    source = site.folder / "watched" / "module.py"
    source.parent.mkdir()
    source.touch()
    site.serve("--reload", f"--reload-dir={source.parent}")
    page.goto(site.url)
    page.get_by_label("Title").fill("Teapots")
    page.get_by_role("button", name="Make the report").click()
    page.get_by_text("Lisbon, 1 of 3").wait_for()
    os.utime(source, times=(time.time() + 10, time.time() + 10))
    asked = time.monotonic()
    wait_for(lambda: site.log.count("Application startup complete"), lambda started: started == 2)
    assert time.monotonic() - asked < AT_ONCE
    site.open("all")
    page.get_by_role("link", name="Download").wait_for()
