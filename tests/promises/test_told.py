"""What users are told of a failure, in rows, events and streams, and what stays with the operators."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, Discard, JobStore, Rendered, Renderers, Retry, Runner, UserError, sse
from jobkit.cli import main
from jobkit.tables import content_job_events, content_jobs
from jobkit.testing import Fault, FaultPlan, faulty_filesystem, inline
from tests.support import shared as module_database
from tests.support.runners import note, seen

shared, database = module_database.shared, module_database.database

SECRET = "sk-live-SECRET"
NEUTRAL = re.compile(r"an internal error \(reference ([0-9a-f]{8})\)")
Renderer = Callable[[jobkit.RenderContext], Any]


def sql(ctx: jobkit.RenderContext) -> None:
    with sa.create_engine("sqlite://").connect() as connection:
        connection.execute(sa.text("SELECT * FROM accounts WHERE key = :key"), {"key": SECRET})


def refused_host(ctx: jobkit.RenderContext) -> None:
    sa.create_engine(f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/shop").connect()


def path(ctx: jobkit.RenderContext) -> None:
    Path(f"/srv/{SECRET}/template.html").read_text()


def value(ctx: jobkit.RenderContext) -> None:
    raise ValueError(f"no such key: {SECRET}")


def parsed(ctx: jobkit.RenderContext) -> None:
    int(SECRET)


def missing(ctx: jobkit.RenderContext) -> None:
    {}[SECRET]


def lazily(ctx: jobkit.RenderContext) -> Any:
    yield Rendered("a.txt", "text/plain", b"x")
    raise RuntimeError(SECRET)


async def later(ctx: jobkit.RenderContext) -> None:
    raise TypeError(SECRET)


def body(ctx: jobkit.RenderContext) -> Rendered:
    def pieces() -> Any:
        yield b"x"
        raise LookupError(SECRET)

    return Rendered("a.txt", "text/plain", pieces())


def configuration(ctx: jobkit.RenderContext) -> None:
    raise jobkit.ConfigurationError(f"the spool folder /srv/{SECRET} cannot be made")


def exits(ctx: jobkit.RenderContext) -> None:
    raise SystemExit(SECRET)


def mapped(ctx: jobkit.RenderContext) -> Rendered:
    return Rendered("a.txt", "text/plain", map(int, [SECRET]))  # type: ignore[arg-type]


def listed(ctx: jobkit.RenderContext) -> Any:
    return map(float, [SECRET])


INTERNAL = [mapped, listed, sql, refused_host, path, value, parsed, missing, lazily, later, body, configuration, exits]


def told_everywhere(engine: sa.Engine, job: jobkit.Job) -> str:
    """Everything about a job that could reach a user, as text."""
    with engine.connect() as connection:
        row = JobStore(connection).get_by_id(job.id, company_id="acme")
        events = connection.execute(
            sa.select(content_job_events.c.payload).where(content_job_events.c.job_id == job.id)
        ).all()
    assert row is not None
    stream = b"".join(sse.stream(engine, "acme", job.id))
    watched = [event.to_dict() for event in jobkit.watch(engine, job.id, company_id="acme")]
    return f"{row!r} {row.to_dict()} {dataclasses.asdict(row)} {events} {stream.decode()} {watched}"


def run(
    engine: sa.Engine,
    disk: AssetStore,
    renderer: Renderer,
    input: Any = None,
    *,
    model: Any = None,
    describe_error: Any = None,
    max_attempts: int = 1,
) -> jobkit.Job:
    renderers = Renderers(describe_error=describe_error)
    renderers.register("note", input=model, max_attempts=max_attempts)(renderer)
    runner = Runner(engine, disk, renderers)
    job = runner.submit("acme", job_type="note", input=input)
    runner.run_until_idle(timeout=60)
    with engine.connect() as connection:
        found = JobStore(connection).get_by_id(job.id, company_id="acme")
    assert found is not None
    return found


@pytest.mark.parametrize("renderer", INTERNAL, ids=lambda renderer: renderer.__name__)
def test_an_error_that_is_not_meant_for_users_is_a_reference_that_log_and_operators_know(
    engine: sa.Engine,
    disk: AssetStore,
    renderer: Renderer,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = run(engine, disk, renderer)
    found = NEUTRAL.fullmatch(job.error_message or "")
    assert found, job.error_message
    assert SECRET not in told_everywhere(engine, job)
    [record] = [one for one in caplog.records if getattr(one, "reference", None) == found[1]]
    assert (record.job_id, record.company_id, record.job_type, record.attempt) == (str(job.id), "acme", "note", 1)  # type: ignore[attr-defined]
    assert found[1] in record.getMessage()
    if renderer is not refused_host:  # psycopg itself keeps the password
        assert SECRET in caplog.text
    url = engine.url.render_as_string(hide_password=False)
    capsys.readouterr()
    assert main(["jobs", "show", str(job.id), "--database", url]) == 0
    assert SECRET not in capsys.readouterr().out
    assert main(["jobs", "show", str(job.id), "--internal", "--database", url]) == 0
    shown = capsys.readouterr().out
    assert f"reference {found[1]}: " in shown
    assert SECRET in shown or renderer is refused_host
    assert main(["jobs", "show", str(job.id), "--internal", "--json", "--database", url]) == 0
    assert json.loads(capsys.readouterr().out)["error_detail"].startswith(f"reference {found[1]}: ")


class Broken:
    def __init__(self, **fields: Any) -> None:
        raise ValueError("title is missing")


@dataclasses.dataclass
class Titled:
    title: str


class ValidationError(Exception):
    """As msgspec's and jsonschema's: no ValueError."""


def validated(value: Any) -> None:
    raise ValidationError("title: expected str")


def raising(error: BaseException) -> Renderer:
    def renderer(ctx: jobkit.RenderContext) -> None:
        raise error

    return renderer


MEANT: dict[str, tuple[Renderer, dict[str, Any], str]] = {
    "UserError": (raising(UserError("the logo is too dark")), {}, "the logo is too dark"),
    "its kind": (raising(type("NoLogo", (UserError,), {})("no logo")), {}, "no logo"),
    "Discard": (raising(Discard("no such order")), {}, "no such order"),
    "Retry": (raising(Retry(1, "the bank is closed")), {}, "the bank is closed"),
    "callable": (note, {"model": lambda value: Broken()}, "title is missing"),
    "dataclass": (note, {"model": Titled}, "missing 1 required positional argument: 'title'"),
    "validator": (note, {"model": validated}, "title: expected str"),
    "no file": (lambda ctx: None, {}, "the renderer for 'note' gave no file"),
    "wrong type": (lambda ctx: [7], {}, "the renderer for 'note' yielded int, not Rendered"),
    "empty": (lambda ctx: Rendered("a.txt", "text/plain", b""), {}, "'a.txt' is empty"),
    "asset": (lambda ctx: ctx.open_asset("nonsense"), {}, "no asset nonsense"),
    "progress": (lambda ctx: ctx.progress(7), {}, "fraction must be a number from 0 to 1, not 7.0"),
    "file name": (lambda ctx: Rendered("a\nb", "text/plain", b"x"), {}, "contains the control character"),
    "interrupted": (raising(jobkit.JobTimeout("too slow")), {}, "too slow"),
}


@pytest.mark.parametrize("case", MEANT)
def test_what_is_meant_for_users_is_told_as_it_is(engine: sa.Engine, disk: AssetStore, case: str) -> None:
    renderer, options, message = MEANT[case]
    job = run(engine, disk, renderer, **options)
    assert (job.status, NEUTRAL.search(job.error_message or "")) == ("failed", None)
    assert message in (job.error_message or "")
    assert message in told_everywhere(engine, job) or "'" in message
    assert seen(engine, job).error_detail is None


def test_a_check_of_the_input_that_fails_for_another_reason_is_internal(engine: sa.Engine, disk: AssetStore) -> None:
    def looked_up(value: Any) -> None:
        raise OSError(f"/srv/{SECRET}")

    assert NEUTRAL.fullmatch(run(engine, disk, note, model=looked_up).error_message or "")


def test_the_host_decides_otherwise(engine: sa.Engine, disk: AssetStore, caplog: pytest.LogCaptureFixture) -> None:
    def describe(error: BaseException) -> str | None:
        if isinstance(error, LookupError):
            return "Bitte später noch einmal.\x1b[31m"
        if isinstance(error, RuntimeError):
            raise error
        return None

    def at_all(error: BaseException) -> str | None:
        return "no"

    assert run(engine, disk, missing, describe_error=describe).error_message == "Bitte später noch einmal.\ufffd[31m"
    assert NEUTRAL.fullmatch(run(engine, disk, lazily, describe_error=describe).error_message or "")
    assert "describe_error raised" in caplog.text
    assert run(engine, disk, raising(UserError("too dark")), describe_error=describe).error_message == "too dark"
    job = run(engine, disk, raising(UserError("too dark")), describe_error=at_all)
    assert job.error_message == "no"
    assert "UserError: too dark" in seen(engine, job).error_detail
    with pytest.raises(TypeError, match=r"^describe_error must be a function, not str$"):
        Renderers(describe_error="no")  # type: ignore[arg-type]


def test_what_the_storage_says_is_internal(engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    plan = FaultPlan(Fault("put_file", at="before", error=OSError(f"s3://KEY:{SECRET}@bucket: 403")))
    with faulty_filesystem(plan, target="memory"):
        job = run(engine, AssetStore("faulty://anywhere", engine=engine), note)
    found = NEUTRAL.fullmatch(job.error_message or "")
    assert found
    assert SECRET not in told_everywhere(engine, job)
    assert "s3://KEY:***@bucket: 403" in seen(engine, job).error_detail
    assert found[1] in caplog.text


def test_what_the_database_says_of_a_result_is_internal(
    engine: sa.Engine, disk: AssetStore, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            trigger = "CREATE TRIGGER no BEFORE INSERT ON assets BEGIN SELECT RAISE(ABORT, 'SECRET 7'); END"
            connection.exec_driver_sql(trigger)
        else:
            connection.exec_driver_sql(
                "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE check_violation USING MESSAGE = 'SECRET 7'; END $$"
            )
            connection.exec_driver_sql("CREATE TRIGGER no BEFORE INSERT ON assets FOR EACH ROW EXECUTE FUNCTION no()")
    try:
        job = run(engine, disk, note)
    finally:
        with engine.begin() as connection:
            on = "" if engine.dialect.name == "sqlite" else " ON assets"
            connection.exec_driver_sql(f"DROP TRIGGER no{on}")
            if on:
                connection.exec_driver_sql("DROP FUNCTION no")
    found = NEUTRAL.search(job.error_message or "")
    assert found, job.error_message
    assert "SECRET" not in told_everywhere(engine, job)
    assert "SECRET 7" in seen(engine, job).error_detail
    assert [record for record in caplog.records if getattr(record, "reference", None) == found[1]]


def test_an_attempt_that_is_repeated_tells_as_little(engine: sa.Engine, disk: AssetStore) -> None:
    job = run(engine, disk, value, max_attempts=2)
    assert (job.status, bool(NEUTRAL.fullmatch(job.error_message or ""))) == ("queued", True)
    assert SECRET in seen(engine, job).error_detail
    with Session(engine) as session, session.begin():
        assert SECRET not in str(session.execute(sa.select(content_job_events.c.payload)).all())
        session.execute(content_jobs.update().values(status="failed"))
        JobStore(session).retry(job.id, company_id="acme")
    assert seen(engine, job).error_detail is None


def test_inline_tells_what_a_runner_tells(session: Session, disk: AssetStore) -> None:
    job = JobStore(session).create("acme", job_type="note")
    [job] = inline(session, disk, Renderers(default=value))
    assert NEUTRAL.fullmatch(job.error_message or "")
    other = JobStore(session).create("acme", job_type="note")
    [other] = inline(session, disk, Renderers(default=value, describe_error=lambda error: "sorry"))
    assert other.error_message == "sorry"


def test_each_attempt_has_a_reference_of_its_own(engine: sa.Engine, disk: AssetStore) -> None:
    assert len({run(engine, disk, value).error_message for _ in range(3)}) == 3


# --- wire forms


def test_a_job_and_an_asset_have_a_form_for_users(engine: sa.Engine, disk: AssetStore) -> None:
    job = run(engine, disk, note, input={"a": 1})
    with engine.connect() as connection:
        [asset] = disk.list_by_job(connection, job.id, company_id="acme")
    told = job.to_dict()
    assert told["id"] == str(job.id)
    assert (told["companyId"], told["jobType"], told["status"], told["input"]) == ("acme", "note", "done", {"a": 1})
    assert (told["resultAssetId"], told["errorMessage"], told["sourceTaskId"]) == (str(asset.id), None, None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told["createdAt"])
    assert json.loads(json.dumps(told)) == told
    file = asset.to_dict()
    assert (file["id"], file["jobId"], file["byteSize"]) == (str(asset.id), str(job.id), asset.byte_size)
    assert json.loads(json.dumps(file)) == file
    for form in (told, file, *(event.to_dict() for event in jobkit.watch(engine, job.id, company_id="acme"))):
        text = json.dumps(form).lower()
        for hidden in ("fence", "worker", "lease", "objectkey", "object_key", "provider", "trace", asset.object_key):
            assert hidden not in text


def test_no_form_says_where_the_secrets_of_a_storage_are() -> None:
    for url in (f"memory://KEY:{SECRET}@bucket/prefix?password={SECRET}", f"ftp://me:{SECRET}@127.0.0.1/x"):
        store = AssetStore(url, storage_options={"password": SECRET})
        assert SECRET not in f"{store!r} {store.provider} {store.storage!r}"
    with pytest.raises(jobkit.ConfigurationError) as refused:
        AssetStore(f"file://me:{SECRET}@host/srv")
    assert SECRET not in str(refused.value)


def test_a_long_message_makes_no_long_record(
    engine: sa.Engine, disk: AssetStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "jobkit"):
        run(engine, disk, raising(RuntimeError("x" * 5_000_000)))
    assert 2_000 < len(caplog.text) < 50_000


def test_each_job_that_ends_is_one_line_with_its_duration(
    engine: sa.Engine, disk: AssetStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "jobkit"):
        jobs = {
            str(run(engine, disk, renderer).id): outcome for renderer, outcome in ((note, "done"), (value, "failed"))
        }
    ends = {record.job_id: record for record in caplog.records if hasattr(record, "duration")}  # type: ignore[attr-defined]
    assert {job_id: record.outcome for job_id, record in ends.items()} == jobs  # type: ignore[attr-defined]
    for record in ends.values():
        fields: Any = record
        assert (fields.company_id, fields.job_type, fields.attempt) == ("acme", "note", 1)
        assert 0 <= fields.duration < 60
