"""The command line at its edges: which database, which terminal, and what is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Job, JobStore, Runner
from jobkit.cli import URL_VARIABLE
from jobkit.cli.output import table
from jobkit.contrib.renderers import spreadsheet
from jobkit.tables import assets, content_jobs
from jobkit.types import Rendered
from tests.cli.test_commands import JOBKIT
from tests.cli.test_jobs import here, url_of
from tests.support.databases import Database
from tests.support.runners import only, seen, statuses

__all__ = ["here"]  # a fixture
Create = Callable[..., Job]
Here = Callable[..., tuple[int, str, str]]
EVIL = "\x1b]0;owned\x07\x9b31m\u202e"


# --- which database


def test_a_database_is_named_by_its_url_or_in_the_environment(
    here: Here, engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = create(company_id="acme")
    status, told, _ = here("jobs", "list", "--database", url_of(engine))
    assert (status, told.count("\n"), str(job.id) in told) == (0, 2, True)
    monkeypatch.setenv(URL_VARIABLE, url_of(engine))
    assert here("jobs", "cancel", str(job.id)) == (0, f"{job.id}: cancelled\n", "")
    assert here("jobs", "retry", str(job.id)) == (0, f"{job.id}: queued\n", "")
    assert here("prune", "--older-than", "0d")[1].startswith("0 jobs")
    status, told, error = here("prune", "--older-than", "0d", "--assets")
    assert (status, told) == (2, "")
    assert "--assets needs --app" in error


def test_tables_in_a_schema_are_found(here: Here, postgres_database: Database) -> None:
    engine = postgres_database.engine
    jobkit.migrations.upgrade(engine, schema="apart")
    with engine.execution_options(schema_translate_map={None: "apart"}).begin() as connection:
        job = JobStore(connection).create("acme", job_type="note")
        JobStore(connection).cancel(job.id)
    database = ("--database", url_of(engine))
    assert here("jobs", "show", str(job.id), *database)[0] == 1
    assert here("jobs", "show", str(job.id), *database, "--schema", "apart")[0] == 0
    assert here("jobs", "retry", str(job.id), *database, "--schema", "apart")[0] == 0
    assert here("jobs", "cancel", str(job.id), *database, "--schema", "apart")[0] == 0
    status, told, _ = here("prune", "--older-than", "0", "--yes", *database, "--schema", "apart")
    assert (status, told.splitlines()[0]) == (0, "1 jobs, 4 events, 0 assets")
    status, _, error = here("jobs", "list", *database, "--schema", "nowhere")
    assert (status, error.count("\n"), "jobkit migrate" in error) == (2, 1, True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("jobs", "list"), "--database"),
        (("jobs", "list", "--database", "sqlite:///missing.db"), "no file missing.db"),
        (("jobs", "list", "--database", "sqlite:///empty.db"), "jobkit migrate"),
        (("jobs", "list", "--database", "postgresql+psycopg://me:hunter2@127.0.0.1:1/none"), "refused"),
        (("jobs", "list", "--database", "postgresql+psycopg://me:hunter2@host:port/none"), "SQLAlchemy URL"),
        (("migrate", "postgresql+psycopg://me:hunter2@host:port/none"), "SQLAlchemy URL"),
        (("jobs", "list", "--database", "x", "--app", "y:z"), "not allowed with"),
        (("prune",), "--older-than"),
    ],
)
def test_what_cannot_begin_is_told_and_leaves_nothing(
    here: Here, arguments: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.db").touch()
    status, told, error = here(*arguments)
    assert (status, told) == (2, "")
    assert complaint in error
    assert "hunter2" not in error
    assert error.startswith("usage:") or error.count("\n") == 1
    assert not (tmp_path / "missing.db").exists()


# --- companies


def test_the_jobs_of_another_company_are_not_found_when_one_is_named(
    here: Here, engine: sa.Engine, create: Create
) -> None:
    mine, other = create(company_id="acme"), create(company_id="globex")
    options = ("--company", "acme", "--database", url_of(engine))
    assert here("jobs", "show", str(mine.id), *options)[0] == 0
    for command in ("show", "cancel", "retry"):
        assert here("jobs", command, str(other.id), *options) == (1, "", f"jobkit: no job {other.id}\n")
    assert seen(engine, other).status == "queued"
    for unstorable in ("\udc80", "x" * 300):
        assert here("jobs", "list", "--json", "--company", unstorable, *options[2:]) == (0, "", "")


def test_of_several_jobs_each_is_told_and_the_status_is_that_of_the_worst(
    here: Here, engine: sa.Engine, create: Create
) -> None:
    first, second = create(), create()
    status, told, error = here("jobs", "cancel", str(first.id), "nonsense", second.id.hex, "--database", url_of(engine))
    assert (status, told) == (1, f"{first.id}: cancelled\n{second.id}: cancelled\n")
    assert error == "jobkit: no job nonsense, which is not an id\n"
    assert statuses(engine) == ["cancelled", "cancelled"]


# --- terminals


def test_show_tells_what_each_event_said_and_no_terminal_obeys_any_of_it(
    here: Here, engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    def evil(ctx: jobkit.RenderContext) -> Rendered:
        if ctx.input.get("fails"):
            raise ValueError(f"no such month{EVIL}\nsecond line")
        return Rendered("a.txt", "text/plain", b"x")

    fails, works = create(input={"fails": True, EVIL: EVIL}), create(source_task_id=EVIL)
    Runner(engine, disk, only(evil)).run_until_idle(timeout=60)
    with engine.begin() as connection:
        past = {"error_message": f"by hand {EVIL}", "progress_message": EVIL, "worker_id": EVIL}
        connection.execute(content_jobs.update().where(content_jobs.c.id == fails.id).values(past))
        connection.execute(assets.update().values(original_filename=EVIL, content_type=EVIL, object_key=EVIL))
    for job, expected in ((fails, "no such month"), (works, "assetId")):
        for options in ((), ("--json",)):
            status, told, error = here("jobs", "show", str(job.id), "--database", url_of(engine), *options)
            assert (status, error) == (0, "")
            assert expected in told
            assert all(character.isprintable() or character == "\n" for character in told.replace("\ufffd", ""))
            assert len(told.splitlines()) == told.count("\n")
    for options in ((), ("--json",)):
        _, told, _ = here("jobs", "list", "--database", url_of(engine), *options)
        assert (len(told.splitlines()), EVIL[0] in told) == (2 if options else 3, False)


def test_json_is_ascii_and_says_what_was_stored(here: Here, engine: sa.Engine, create: Create) -> None:
    text = f"Grüße {EVIL}\x7f\u2028"
    job = create(input={text: text}, job_type=text)
    for command in (("list",), ("show", str(job.id))):
        _, told, _ = here("jobs", *command, "--json", "--database", url_of(engine))
        assert told.isascii()
        assert told.rstrip("\n").isprintable()
        found = json.loads(told)
        assert (found.get("input"), found["job_type"]) == (None if command == ("list",) else {text: text}, text)


def test_columns_stay_in_line_below_wide_letters(capsys: pytest.CaptureFixture[str]) -> None:
    table(("name", "last"), [("漢字", "x"), ("e\u0301te", "x"), ("plain", "x")])
    header, wide, combined, plain = capsys.readouterr().out.splitlines()
    assert header == "NAME   LAST"
    assert wide == "漢字   x"
    assert combined == "e\u0301te    x"
    assert plain == "plain  x"


@pytest.fixture
def many(sqlite_database: Database) -> str:
    with Session(sqlite_database.engine) as session, session.begin():
        JobStore(session).create_many("acme", [jobkit.JobRequest("Grüße " + "x" * 200) for _ in range(1_000)])
    return url_of(sqlite_database.engine)


def test_a_reader_that_has_read_enough_and_a_terminal_without_the_letters_are_no_failures(many: str) -> None:
    command = [*JOBKIT, "jobs", "list", "--limit", "1000", "--database", many]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    ) as listing:
        assert listing.stdout is not None
        assert listing.stderr is not None
        assert listing.stdout.readline().startswith("ID")
        assert "Gr\\xfc\\xdfe" in listing.stdout.readline()
        listing.stdout.close()
        assert listing.wait(60) == 1
        assert listing.stderr.read() == ""
    reading, writing = os.pipe()
    os.close(reading)  # nobody reads even the little that is flushed at the end
    short = [*JOBKIT, "jobs", "list", "--limit", "1", "--database", many]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run(short, stdout=writing, stderr=subprocess.PIPE, env=buffered, timeout=240, check=False)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, b"")


# --- render


def test_render_says_what_is_missing_and_names_no_file_twice(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.json").write_bytes(b"\xff\xfe\x00")
    status, _, error = here("render", "pdf-document", "input.json")
    assert (status, error.count("\n"), "no JSON" in error) == (2, 1, True)
    (tmp_path / "input.json").write_text("{}")
    (tmp_path / "triple.py").write_text(
        "import sqlalchemy, jobkit\n"
        "names = ['1-a.txt', 'a.txt', 'a.txt']\n"
        "def triple(ctx):\n"
        "    return [jobkit.Rendered(name, 'text/plain', str(n).encode()) for n, name in enumerate(names)]\n"
        "engine = sqlalchemy.create_engine('sqlite:///x.db')\n"
        "jobkit.configure_sqlite(engine)\n"
        "runner = jobkit.Runner(engine, jobkit.AssetStore('assets'), jobkit.Renderers(default=triple))\n"
    )
    assert here("render", "any", "input.json", "-o", "out", "--app", "triple:runner")[0] == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert made == {"1-a.txt": b"0", "a.txt": b"1", "2-a.txt": b"2"}


def test_a_renderer_whose_extra_is_not_installed_says_which(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xlsxwriter", None)
    spreadsheet._library.cache_clear()  # other tests have found it
    (tmp_path / "input.json").write_text("{}")
    status, told, error = here("render", "spreadsheet", str(tmp_path / "input.json"))
    assert (status, told) == (2, "")
    assert "jobkit[sheets]" in error
