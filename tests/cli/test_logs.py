"""What commands log: after the app was imported, where it logs nothing itself, fit for a terminal and for programs."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path

import pytest
import sqlalchemy as sa

import jobkit
from jobkit.cli import main
from jobkit.cli.logs import LONGEST, JsonFormatter, TerminalFormatter
from jobkit.cli.output import complain
from tests.cli.test_commands import JOBKIT
from tests.support.runners import seen, until

EVIL = "\x1b]0;owned\x07\x9b31m\u202e\u2066\r\n2026-01-01 00:00:00 ERROR forged\u2028end\x00\ud800"


def record(message: str, *arguments: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("jobkit", logging.WARNING, "x.py", 1, message, arguments, info)
    vars(made).update(extra)
    return made


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_no_record_moves_a_terminal_or_forges_another() -> None:
    error = raised(ValueError(EVIL), raised(RuntimeError(EVIL)))
    told = TerminalFormatter().format(record("job %s failed: %s", 7, EVIL, error=error))
    assert not set(told) & set("\x00\x07\x1b\x9b\u202e\u2066\u2028\r\ud800")
    assert [line for line in told.splitlines() if "ERROR forged" in line and not line.startswith("  ")][1:] == []
    first, *others = told.split("\n")
    assert " WARNING job 7 failed: \\x1b]0;owned" in first
    assert all(line.startswith("  ") for line in others)
    assert "\\r\\n2026" in first
    assert [line.strip().partition(":")[0] for line in others if "forged" in line] == ["RuntimeError", "ValueError"]


def test_a_huge_record_is_cut_and_so_is_its_error() -> None:
    error = raised(ValueError("y" * 50_000_000))
    told = TerminalFormatter().format(record("x" * 50_000_000, error=error))
    assert len(told) < 3 * LONGEST
    assert "(50000000 characters)" in told
    deep: BaseException | None = None
    for _ in range(100):
        deep = raised(ValueError("z" * 10_000), deep)
    assert len(TerminalFormatter().format(record("m", error=deep))) < 20 * LONGEST


def test_a_json_record_has_what_programs_ask_for() -> None:
    told = JsonFormatter().format(
        record(EVIL, error=raised(ValueError(EVIL)), job_id="j", company_id=EVIL, attempt=2, duration=0.5, other={1})
    )
    assert told.isascii()
    assert "\n" not in told
    document = json.loads(told)
    assert (document["level"], document["logger"], document["job_id"]) == ("WARNING", "jobkit", "j")
    assert (document["attempt"], document["duration"], document["other"]) == (2, 0.5, "{1}")
    assert "ValueError: \\x1b]" in document["error"]
    assert "\x1b" not in document["company_id"]


def test_a_group_and_an_error_without_words_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    class Speechless(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    group = raised(ExceptionGroup("several", [ValueError("one"), Speechless()]))
    told = TerminalFormatter(plain=True).format(record("m", error=group))
    assert told.startswith("m\n")
    for line in ("ExceptionGroup: several (2 sub-exceptions)", "ValueError: one", "Speechless: its text cannot be had"):
        assert line in told


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:S3CRET@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=me&password=S3CRET",
        "postgresql://127.0.0.1:1/x?sslpassword=S3CRET&a=b",
        "s3://KEY:S3/CR+ET@bucket/prefix",
        "https://bucket/x?X-Amz-Signature=S3CRET",
        "host=127.0.0.1 password=S3CRET user=me",
        "{'key': 'KEY', 'secret': 'S3CRET'}",
    ],
)
def test_no_output_has_the_password_of_a_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    complain(f"no answer of {url} today")
    complain(jobkit.ConfigurationError(f"no answer of {url} today"))
    logged = TerminalFormatter().format(record("no answer of %s today", url, error=raised(OSError(url))))
    logged += JsonFormatter().format(record("no answer of %s today", url, error=raised(OSError(url))))
    for told in (capsys.readouterr().err, logged):
        assert "***" in told
        assert "S3" not in told.replace("s3:", "")
        assert "CR" not in told


def test_migrate_prints_no_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", f"sqlite:///file:{tmp_path}/a.db?uri=true&timeout=5&token=S3CRET"]) == 0
    out, err = capsys.readouterr()
    assert "token=***" in out
    assert "S3CRET" not in out + err


# --- whose logging

APP = """
import logging, logging.config
import sqlalchemy as sa
import jobkit
{configured}
engine = sa.create_engine("sqlite:///app.db")
jobkit.configure_sqlite(engine)
renderers = jobkit.Renderers()

@renderers.register("note")
def note(ctx):
    raise RuntimeError("\\x1b[31mred\\n2026-01-01 ERROR forged")

runner = jobkit.Runner(engine, jobkit.AssetStore("files"), renderers, poll_interval=0.05)
"""
BASIC = "logging.basicConfig(level=logging.INFO, format='APP %(name)s %(message).40s')"
DICT = (
    "logging.config.dictConfig({'version': 1, 'formatters': {'f': {'format': 'APP %(name)s %(message).40s'}}, "
    "'handlers': {'h': {'class': 'logging.StreamHandler', 'formatter': 'f'}}, "
    "'root': {'handlers': ['h'], 'level': 'INFO'}})"
)


def worked(folder: Path, configured: str, *arguments: str) -> list[str]:
    """What ``jobkit work`` logs of one job."""
    (folder / "app.py").write_text(APP.format(configured=configured))
    url = f"sqlite:///{folder}/app.db"
    engine = sa.create_engine(url)
    jobkit.configure_sqlite(engine)
    jobkit.migrations.upgrade(engine)
    with engine.begin() as connection:
        job = jobkit.JobStore(connection).create("acme", job_type="note")
    command = [*JOBKIT, "work", "--app", "app:runner", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as worker:
        try:
            until(lambda: seen(engine, job).status == "failed" or worker.poll() is not None, timeout=120)
            worker.terminate()
            _, logged = worker.communicate(timeout=120)
        finally:
            worker.kill()
            engine.dispose()
    return logged.splitlines()


@pytest.mark.parametrize("configured", ["", BASIC, DICT], ids=["nobody", "basicConfig", "dictConfig"])
def test_the_app_is_imported_first_and_what_it_configured_stays(tmp_path: Path, configured: str) -> None:
    lines = worked(tmp_path, configured)
    ends = [line for line in lines if ": failed after" in line or (configured and "of company" in line)]
    failures = [
        line for line in lines if "('note') failed" in line or (configured and line.startswith("APP jobkit job"))
    ]
    assert failures
    if configured:
        assert all(line.startswith("APP jobkit ") for line in failures)
        assert len([line for line in failures if "failed" in line]) <= 1
    else:
        [end], [failure] = ends, failures
        assert " INFO job " in end
        assert " WARNING job " in failure
        assert "\ufffd[31mred\\n2026-01-01 ERROR forged" in failure
        assert [line for line in lines if line.startswith("2026-01-01 ERROR")] == []
        assert any(line.startswith("  RuntimeError: ") for line in lines)


def test_json_and_the_level_are_options(tmp_path: Path) -> None:
    documents = [json.loads(line) for line in worked(tmp_path, "", "--log-json", "--log-level", "info")]
    [end] = [document for document in documents if "duration" in document]
    assert (end["company_id"], end["job_type"], end["attempt"], end["outcome"]) == ("acme", "note", 1, "failed")
    [failure] = [document for document in documents if "error" in document]
    assert failure["reference"] == end["reference"]


def test_a_level_holds_for_the_apps_logging_too(tmp_path: Path) -> None:
    assert [line for line in worked(tmp_path, BASIC, "--log-level", "error") if "job" in line] == []


def test_json_is_refused_where_the_app_logs_itself(tmp_path: Path) -> None:
    lines = worked(tmp_path, BASIC, "--log-json")
    assert lines[-1] == "jobkit: --log-json: the app has configured logging itself, so configure its format there"


def test_every_command_that_loads_something_takes_the_options() -> None:
    for command in (["work"], ["migrate"], ["prune"], ["assets", "gc"], ["assets", "verify"], ["jobs", "list"]):
        told = subprocess.run([*JOBKIT, *command, "--help"], capture_output=True, text=True, check=True).stdout
        assert "--log-level" in told
        assert "--log-json" in told
