"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pypdfium2
import pytest

import jobkit
from jobkit import JobStore
from jobkit.cli import main
from tests.support.databases import Database

JOBKIT = [sys.executable, "-W", "error", "-m", "jobkit"]
APP = """
import os, time
from pathlib import Path

import sqlalchemy as sa
import jobkit

engine = sa.create_engine(os.environ["APP_DATABASE"])
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)
renderers = jobkit.Renderers()

@renderers.register("quick")
def quick(ctx):
    return jobkit.Rendered("a.txt", "text/plain", b"x")

@renderers.register("waits")
def waits(ctx):
    Path("begun").touch()
    deadline = time.monotonic() + 60
    while not Path("go").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return jobkit.Rendered("a.txt", "text/plain", b"x")

def make():
    return jobkit.Runner(engine, jobkit.AssetStore("assets"), renderers, poll_interval=0.05)

runner = make()
number = 7
"""


def jobkit_command(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*JOBKIT, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.01)


# --- demo


def test_the_demo_makes_a_pdf_tells_each_signal_and_where_the_file_lies_and_does_so_twice(tmp_path: Path) -> None:
    for run in (1, 2):
        ran = jobkit_command("demo", "--directory", "made here", cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        told = re.findall(r"content_job\.(\w+)", ran.stdout)
        # How often it says how far it is depends on how long it takes.
        assert [kind for kind in told if kind != "progress"] == ["queued", "running", "done"]
        assert told[-1] == "done"
        found = re.search(r"^The file: (.+\.pdf)$", ran.stdout, re.MULTILINE)
        assert found is not None
        path = Path(found.group(1))
        assert path.is_relative_to(tmp_path / "made here" / "assets")
        assert len(pypdfium2.PdfDocument(path)) >= 2
        assert len(list((tmp_path / "made here").rglob("*.pdf"))) == run


def test_the_demo_takes_a_document_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text("# Grüße\n\nA *short* letter.\n", encoding="utf-8")
    ran = jobkit_command("demo", "mine.md", "--directory", str(tmp_path / "d"), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (made,) = (tmp_path / "d").rglob("*.pdf")
    document = pypdfium2.PdfDocument(made)
    assert "Grüße" in document[0].get_textpage().get_text_range()


def test_the_demo_says_which_document_is_missing(tmp_path: Path) -> None:
    ran = jobkit_command("demo", "none.md", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "none.md" in ran.stderr
    assert list(tmp_path.iterdir()) == []


# --- migrate


@pytest.fixture
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.db"
        return
    server = request.getfixturevalue("postgres")
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.mark.parametrize("empty_database", ["sqlite", "postgresql"], indirect=True)
def test_migrate_brings_a_database_up_and_down_and_says_so(empty_database: str) -> None:
    up = jobkit_command("migrate", empty_database)
    again = jobkit_command("migrate", JOBKIT_DATABASE_URL=empty_database)
    down = jobkit_command("migrate", "--downgrade", empty_database)
    assert [ran.returncode for ran in (up, again, down)] == [0, 0, 0], up.stderr + again.stderr + down.stderr
    assert "no tables -> 0002" in up.stdout
    assert "0002, nothing to do" in again.stdout
    assert "0002 -> no tables" in down.stdout


def test_migrate_hides_the_password_and_says_what_is_wrong() -> None:
    ran = jobkit_command("migrate", "postgresql+psycopg://me:hunter2@127.0.0.1:1/none")
    assert ran.returncode == 2
    assert "hunter2" not in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["migrate"], "JOBKIT_DATABASE_URL"),
        (["migrate", "mysql://localhost/x"], "mysql|MySQLdb"),
        (["migrate", "not a url"], "parse"),
        (["work", "--app", "nowhere:runner"], "nowhere"),
        (["work", "--app", "app"], "MODULE:RUNNER"),
        (["work", "--app", "app:missing"], "missing"),
        (["work", "--app", "app:number"], "int"),
    ],
)
def test_a_command_that_cannot_begin_says_why_and_exits_with_2(
    tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    (tmp_path / "app.py").write_text(APP)
    environment = {"APP_DATABASE": f"sqlite:///{tmp_path}/a.db"}
    ran = jobkit_command(*arguments, cwd=tmp_path, **environment)
    assert ran.returncode == 2, ran.stderr
    assert re.search(complaint, ran.stderr)
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("command", ["migrate", "work"])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import os\n\nos.environ['NO_SUCH']\n", "broken cannot be imported: {file}, line 3: KeyError: 'NO_SUCH'"),
        (
            "import no_such\n",
            "broken cannot be imported: {file}, line 1: ModuleNotFoundError: No module named 'no_such'",
        ),
        ("x = 1\ndef (:\n", "broken cannot be imported: {file}, line 2: SyntaxError: invalid syntax"),
        ("raise ValueError('a\\nb')\n", "broken cannot be imported: {file}, line 1: ValueError: a b"),
        (
            "import jobkit\njobkit.Renderers().register('')\n",
            "broken cannot be imported: {file}, line 2: ValueError: job_type is blank",
        ),
        ("def runner():\n    return 1 / 0\n", "broken:runner cannot be called: {file}, line 2: ZeroDivisionError"),
    ],
    ids=[
        "raises",
        "imports what is not there",
        "is no Python",
        "raises two lines",
        "raises in a library",
        "makes none",
    ],
)
def test_an_app_that_raises_is_told_in_one_line_with_its_place(
    tmp_path: Path, command: str, source: str, told: str
) -> None:
    (tmp_path / "broken.py").write_text(source)
    ran = jobkit_command(command, "--app", "broken:runner", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert ran.stderr.startswith("jobkit: " + told.format(file=tmp_path / "broken.py"))


def test_without_a_command_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# --- work


def start_worker(folder: Path, database: Database, app: str = "app:runner") -> subprocess.Popen[str]:
    (folder / "app.py").write_text(APP)
    url = database.engine.url.render_as_string(hide_password=False)
    worker = subprocess.Popen(
        [*JOBKIT, "work", "--app", app],
        cwd=folder,
        env=os.environ | {"APP_DATABASE": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert "working for" in worker.stdout.readline()
    return worker


def create(database: Database, job_type: str) -> jobkit.Job:
    with database.engine.begin() as connection:
        return JobStore(connection).create("acme", job_type=job_type)


def status(database: Database, job: jobkit.Job) -> str:
    with database.engine.connect() as connection:
        found = JobStore(connection).get_by_id(job.id)
    assert found is not None
    return found.status.value


def wait_done(database: Database, job: jobkit.Job) -> None:
    deadline = time.monotonic() + 60
    while status(database, job) != "done":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains(database: Database, tmp_path: Path, number: int) -> None:
    worker = start_worker(tmp_path, database, app="app:make")
    try:
        wait_done(database, create(database, "quick"))
        job = create(database, "waits")
        wait_for(tmp_path / "begun")
        worker.send_signal(number)
        assert worker.stdout is not None
        assert "in flight" in worker.stdout.readline()
        (tmp_path / "go").touch()
        assert worker.wait(60) == 0
        assert worker.stdout.read() == "stopped\n"
        assert status(database, job) == "done"
    finally:
        worker.kill()
        worker.communicate()


def test_the_second_signal_puts_jobs_back_and_ends(database: Database, tmp_path: Path) -> None:
    worker = start_worker(tmp_path, database)
    try:
        job = create(database, "waits")
        wait_for(tmp_path / "begun")
        worker.send_signal(signal.SIGTERM)
        assert worker.stdout is not None
        assert "in flight" in worker.stdout.readline()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        assert status(database, job) == "queued"
        with database.engine.connect() as connection:
            assert JobStore(connection).get_by_id(job.id).attempt == 0  # type: ignore[union-attr]
    finally:
        worker.kill()
        worker.communicate()


def test_work_without_tables_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    ran = jobkit_command("work", "--app", "app:runner", cwd=tmp_path, APP_DATABASE=f"sqlite:///{tmp_path}/a.db")
    assert ran.returncode == 2
    assert "jobkit migrate" in ran.stderr


def test_a_url_that_sqlalchemy_does_not_know_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "nosuch://x"]) == 2
    assert "nosuch" in capsys.readouterr().err
