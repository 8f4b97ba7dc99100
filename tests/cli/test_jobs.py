"""``jobkit jobs``, ``jobkit prune`` and ``jobkit render``, as an operator runs them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import ANY_COMPANY, AssetStore, Job, JobStore, Runner
from jobkit.cli import main, output
from jobkit.cli.jobs import OPEN_TO, change_matching
from jobkit.maintenance import prune
from jobkit.tables import content_jobs
from tests.cli.test_commands import APP, jobkit_command
from tests.support.databases import Database
from tests.support.runners import note, only, seen, statuses

Create = Callable[..., Job]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: its status, and what it printed. Quicker, where the process does not matter."""

    def here(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status: Any = main(arguments)
        except SystemExit as ended:  # argparse
            status = ended.code
        return status, *capsys.readouterr()

    return here


def url_of(engine: sa.Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


@pytest.fixture
def run(database: Database, tmp_path: Path) -> Run:
    """Run a command on the app of ``test_cli``, whose assets are those of the fixture ``disk``."""
    (tmp_path / "app.py").write_text(APP)
    url = database.engine.url.render_as_string(hide_password=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        ran = jobkit_command(*arguments, "--app", "app:make", cwd=tmp_path, APP_DATABASE=url)
        assert "Traceback" not in ran.stderr
        return ran.returncode, ran.stdout, ran.stderr

    return run


def assets_of(engine: sa.Engine, store: AssetStore, job: Job) -> list[jobkit.Asset]:
    with engine.connect() as connection:
        return store.list_by_job(connection, job.id)


def test_list_shows_the_newest_jobs_of_every_company_and_filters(run: Run, here: Run, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        jobs = JobStore(connection)
        made = [jobs.create(company, job_type=kind) for company, kind in (("a", "x"), ("b", "x"), ("b", "y"))]
        jobs.cancel(made[1].id)
    status, told, _ = run("jobs", "list")
    assert status == 0
    lines = told.splitlines()
    assert lines[0].split() == ["ID", "COMPANY_ID", "JOB_TYPE", "STATUS", "ATTEMPT", "CREATED_AT", "ERROR_MESSAGE"]
    assert [line.split()[0] for line in lines[1:]] == [str(job.id) for job in reversed(made)]
    assert len({line.index(" cancelled") for line in lines if "cancelled" in line}) == 1
    for arguments, expected in (
        (("--company", "b"), [2, 1]),
        (("--status", "queued"), [2, 0]),
        (("--type", "x"), [1, 0]),
        (("--type", "x", "--company", "b", "--status", "cancelled"), [1]),
        (("--limit", "1"), [2]),
        (("--limit", "0"), []),
        (("--company", "nobody"), []),
    ):
        _, told, _ = here("jobs", "list", "--json", *arguments, "--database", url_of(engine))
        assert [json.loads(line)["id"] for line in told.splitlines()] == [str(made[n].id) for n in expected], arguments


def test_show_tells_everything_of_a_job(run: Run, engine: sa.Engine, disk: AssetStore, create: Create) -> None:
    job = create(input={"month": "may"}, source_task_id="task 7")
    Runner(engine, disk, only(note)).run_until_idle(timeout=60)
    status, told, _ = run("jobs", "show", str(job.id))
    assert status == 0
    for pattern in (r"status +done", r'input +\{"month": "may"\}', r"source_task_id +task 7", r"fence +1"):
        assert re.search(rf"^{pattern}$", told, re.MULTILINE), told
    assert re.findall(r"content_job\.\w+", told) == [f"content_job.{n}" for n in ("queued", "running", "done")]
    (asset,) = assets_of(engine, disk, job)
    assert asset.object_key in told
    _, told, _ = run("jobs", "show", job.id.hex, "--json")
    shown = json.loads(told)
    assert (shown["id"], shown["input"], len(shown["events"])) == (str(job.id), {"month": "may"}, 3)
    assert [found["object_key"] for found in shown["assets"]] == [asset.object_key]


def test_cancel_and_retry_change_a_job_and_say_what_it_is_then(run: Run, engine: sa.Engine, create: Create) -> None:
    job, running = create(), create()
    with engine.begin() as connection:
        JobStore(connection).transition(running.id, status="running")
    assert run("jobs", "cancel", str(job.id)) == (0, f"{job.id}: cancelled\n", "")
    assert run("jobs", "retry", str(job.id)) == (0, f"{job.id}: queued\n", "")
    assert run("jobs", "cancel", str(running.id)) == (0, f"{running.id}: running, asked to stop\n", "")
    status, told, error = run("jobs", "retry", str(running.id))
    assert (status, told) == (1, "")
    assert "only a failed or cancelled job can be retried" in error
    assert sorted(statuses(engine)) == ["queued", "running"]


@pytest.mark.parametrize("command", ["show", "cancel", "retry"])
def test_a_job_that_is_not_there_is_one_line_and_status_1(run: Run, command: str) -> None:
    unknown = "01a21347-0000-7000-8000-000000000000"
    assert run("jobs", command, unknown) == (1, "", f"jobkit: no job {unknown}\n")
    assert run("jobs", command, "x\x1b[2Jy") == (1, "", "jobkit: no job x�[2Jy, which is not an id\n")


def test_no_terminal_obeys_what_users_wrote(here: Run, engine: sa.Engine) -> None:
    evil = "\x1b[31mred\x9b\u202e\r\n"
    with engine.begin() as connection:
        job = JobStore(connection).create(evil, job_type=f"type{evil}", input={"a": evil}, source_task_id=evil)
    for arguments in (("list",), ("show", str(job.id))):
        status, told, _ = here("jobs", *arguments, "--database", url_of(engine))
        assert status == 0
        assert not set(told) & set("\x1b\x9b\u202e\r")
    assert len(here("jobs", "list", "--database", url_of(engine))[1].splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [("list", "--limit", "-1"), ("list", "--limit", "x"), ("list", "--status", "gone"), ("show",), ("frobnicate",)],
    ids=" ".join,
)
def test_a_command_that_makes_no_sense_exits_with_2(here: Run, arguments: tuple[str, ...]) -> None:
    assert here("jobs", *arguments, "--database", "sqlite:///missing.db")[0] == 2


def test_prune_tells_and_with_yes_deletes(
    run: Run, here: Run, engine: sa.Engine, disk: AssetStore, create: Create
) -> None:
    old, young = create(), create()
    Runner(engine, disk, only(note)).run_until_idle(timeout=60)
    with engine.begin() as connection:
        long_ago = old.created_at.replace(year=2020, day=1)
        connection.execute(content_jobs.update().where(content_jobs.c.id == old.id).values(finished_at=long_ago))
    told = "1 jobs, 3 events, 0 assets\n"
    expected = f"{told}  {old.id}\nnothing was changed; --yes deletes them\n"
    assert run("prune", "--older-than", "30") == (0, expected, "")
    assert len(statuses(engine)) == 2
    _, told, _ = run("prune", "--older-than", "720h", "--yes", "--assets")
    assert told == f"1 jobs, 3 events, 1 assets\n  {old.id}\ndeleted\n"
    assert seen(engine, young).status == "done"
    assert len(statuses(engine)) == 1
    for wrong in ("-1", "soon", "nan"):
        assert here("prune", "--older-than", wrong)[0] == 2


# --- render


def test_render_writes_the_files_of_an_apps_renderer(run: Run, tmp_path: Path) -> None:
    (tmp_path / "input.json").write_text("{}")
    status, told, _ = run("render", "quick", "input.json", "-o", "out/here")
    assert (status, told) == (0, "out/here/a.txt: text/plain, 1 bytes\n")
    assert (tmp_path / "out" / "here" / "a.txt").read_bytes() == b"x"


def test_render_knows_the_renderers_that_come_with_jobkit(tmp_path: Path) -> None:
    (tmp_path / "input.json").write_text(json.dumps({"markdown": "# Hello", "filename": "hello.pdf"}))
    ran = jobkit_command("render", "pdf-document", "input.json", cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (tmp_path / "hello.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("arguments", "content", "status", "told"),
    [
        (("quick", "input.json"), "[", 2, "input.json is no JSON"),
        (("quick", "missing.json"), "{}", 2, "missing.json"),
        (("quick", "input.json"), "[]", 1, "input must be"),
        (("unknown", "input.json"), "{}", 1, "unknown"),
    ],
    ids=["no json", "no file", "no object", "no renderer"],
)
def test_what_cannot_be_rendered_is_one_line(
    arguments: tuple[str, ...], content: str, status: int, told: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "input.json").write_text(content)
    code, out, error = run("render", *arguments)
    assert (code, out) == (status, "")
    assert told in error
    assert error.count("\n") == 1


def test_two_files_of_one_name_are_both_kept(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(
        "import jobkit\n"
        "renderers = jobkit.Renderers()\n"
        "@renderers.register('twice')\n"
        "def twice(ctx):\n"
        "    return [jobkit.Rendered(name, 'text/plain', body) for name, body in\n"
        "            (('a.txt', b'1'), ('../a.txt', b'2'), ('', b'3'))]\n"
        "import sqlalchemy\n"
        "engine = sqlalchemy.create_engine('sqlite:///x.db')\n"
        "jobkit.configure_sqlite(engine)\n"
        "runner = jobkit.Runner(engine, jobkit.AssetStore('assets'), renderers)\n"
    )
    (tmp_path / "input.json").write_text("{}")
    ran = jobkit_command("render", "twice", "input.json", "-o", "out", "--app", "twice:runner", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        "a.txt": b"1", "1-a.txt": b"2", "file": b"3",
    }  # fmt: skip


# --- all that match


def test_all_that_match_are_counted_and_with_yes_changed(here: Run, engine: sa.Engine, create: Create) -> None:
    kept = create(company_id="globex")
    for _ in range(3):
        create(job_type="bill", source_task_id="may")
    where = ("--all", "--type", "bill", "--company", "acme", "--database", url_of(engine))
    unsure = "3 jobs match; nothing was changed, --yes changes them\n"
    assert here("jobs", "cancel", *where) == (0, unsure, "")
    assert statuses(engine) == ["queued"] * 4
    assert here("jobs", "cancel", *where, "--source-task", "june", "--yes")[1] == "0 jobs changed\n"
    assert here("jobs", "cancel", *where, "--source-task", "may", "--yes") == (0, "3 jobs changed\n", "")
    assert sorted(statuses(engine)) == ["cancelled", "cancelled", "cancelled", "queued"]
    _, told, _ = here("jobs", "count", "--database", url_of(engine))
    assert [line.split() for line in told.splitlines()][1:] == [
        ["cancelled", "bill", "3"],
        ["queued", kept.job_type, "1"],
    ]
    _, told, _ = here("jobs", "count", "--json", "--company", "acme", "--database", url_of(engine))
    assert json.loads(told) == {"status": "cancelled", "job_type": "bill", "count": 3}
    assert here("jobs", "retry", *where, "--until", "2020-01-01", "--yes")[1] == "0 jobs changed\n"
    assert here("jobs", "retry", *where, "--since", "2020-01-01", "--yes")[1] == "3 jobs changed\n"
    assert here("jobs", "delete", *where[1:], "--yes")[1] == "0 jobs changed\n"  # they wait again
    assert here("jobs", "cancel", *where, "--yes")[1] == "3 jobs changed\n"
    assert here("jobs", "delete", *where[1:], "--yes")[1] == "3 jobs changed\n"
    assert statuses(engine) == ["queued"]


@pytest.mark.parametrize("arguments", [(), ("--all", "0190"), ("--all", "--since", "soon"), ("--all", "--status", "x")])
def test_jobs_are_named_or_all_that_match_are_meant(here: Run, engine: sa.Engine, arguments: tuple[str, ...]) -> None:
    status, told, error = here("jobs", "retry", *arguments, "--database", url_of(engine))
    assert (status, told) == (2, "")
    assert "Traceback" not in error


def test_ctrl_c_keeps_the_batches_that_were_done_and_the_same_command_goes_on(
    here: Run, engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        create()
    cancel_all, calls = JobStore.cancel_all, []

    def twos(jobs: JobStore, company: Any, **which: Any) -> int:
        calls.append(1)
        done = cancel_all(jobs, company, limit=2, **which)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return done

    options = argparse.Namespace(
        all=True, job=[], yes=True, company=ANY_COMPANY, status=None, type=None, source_task=None, since=None,
        until=None, app=None, database=url_of(engine), schema=None, log_level=None, log_json=False,
    )  # fmt: skip
    monkeypatch.setitem(OPEN_TO, twos, OPEN_TO[cancel_all])
    assert change_matching(options, twos) == 130
    assert sorted(statuses(engine)) == ["cancelled"] * 2 + ["queued"] * 3
    assert here("jobs", "cancel", "--all", "--yes", "--database", url_of(engine))[1] == "3 jobs changed\n"


def test_progress_is_a_line_now_and_then_and_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "PACE", 0.0)
    with output.progress("jobs", 10) as advance:
        advance(4)
        advance(2)
    assert capsys.readouterr().err == "jobkit: 4 of 10 jobs\njobkit: 6 of 10 jobs\n"
    monkeypatch.setattr(output, "PACE", 3600.0)
    with output.progress("jobs", None) as advance:
        advance(4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.progress("jobs", 10) as advance:
        advance(10)
    assert "100%" in capsys.readouterr().err


def test_ctrl_c_ends_a_long_command_between_two_batches_with_what_was_done(
    here: Run, engine: sa.Engine, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        job = create()
        with engine.begin() as connection:
            JobStore(connection).cancel(job.id, company_id=job.company_id)
    monkeypatch.setattr(prune, "BATCH", 1)
    advances: list[int] = []

    @contextmanager
    def one(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            advances.append(count)
            raise KeyboardInterrupt

        yield advance

    options = ("prune", "--older-than", "0", "--yes", "--json", "--database", url_of(engine))
    with monkeypatch.context() as patched:
        patched.setattr(output, "progress", one)
        status, _, error = here(*options)
    assert (status, advances, error.startswith("jobkit: interrupted: ")) == (130, [1], True)
    assert len(statuses(engine)) == 2
    status, told, error = here(*options)
    assert (status, error, json.loads(told)["jobs"]) == (0, "", 2)
    assert statuses(engine) == []


def test_a_sweep_says_what_it_did_as_json(run: Run, engine: sa.Engine) -> None:
    status, told, _ = run("assets", "gc", "--json", "--yes")
    assert (status, json.loads(told)["dry_run"], json.loads(told)["failed"]) == (0, False, 0)
