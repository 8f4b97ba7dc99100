"""What outsiders get wrong: the same class and words on both databases, nothing written, the transaction usable.

Which test holds which sentence of the founding contract, and which row of its fault table:

================================================================== =============================================
sentence                                                           test
================================================================== =============================================
§1 every boundary does ``str(company_id)``                         ``test_assets.test_a_company_is_its_string``,
                                                                   ``test_jobs.test_a_created_job_is_queued_…``
§1 a malformed id is "not found", never a database error           ``test_jobs.test_an_unknown_or_malformed_id_…``,
                                                                   here for assets
§1 a naive datetime is ``ValueError``                              ``test_jobs.test_a_refused_change_…``, here at the
                                                                   ends of the calendar
§2 ``create`` refuses, naming the field                            ``test_jobs.test_a_refused_create_…``,
                                                                   ``test_payload`` (F33, F34, F35)
§2 ``create_many`` is all or nothing                               ``test_create_many``
§2 ``transition`` takes these and nothing else                     ``test_jobs.test_a_refused_change_…``
§3 ``put_file``: what it refuses leaves nothing                    ``test_drafts``, ``test_assets`` (F31, F32), here
                                                                   inside a host's transaction
§3 ``create`` of an asset                                          ``test_asset_rows``, here what no row can hold
§4 no output, a wrong type, late errors (F30)                      ``test_renderers``, ``test_context``
§7 ``error_message`` is sanitised, capped, without a traceback     ``test_text``, ``test_pipeline`` (F35, F36), here
                                                                   what fights back (F29)
§7 failing to record a failure (F37)                               ``test_pipeline.test_a_job_whose_failure_cannot_…``,
                                                                   here a log handler that raises
================================================================== =============================================
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobStore, Renderers, Runner
from jobkit.base.text import error_message
from jobkit.tables import asset_intents, assets, content_jobs
from tests.support import shared as module_database
from tests.support.recorder import Recorder
from tests.support.runners import note, only, seen

shared, database = module_database.shared, module_database.database


def number(engine: sa.Engine, table: sa.Table) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def store(disk: AssetStore, **changes: Any) -> jobkit.StoredObject:
    given = {"original_filename": "a.txt", "content_type": "text/plain", "body": b"content", **changes}
    return disk.put_file(given.pop("company", "acme"), **given)


# --- assets


BAD_IDS = [
    "",
    " ",
    "nope",
    "\0",
    "\ud800",
    "%",
    "x" * 5_000_000,
    "' OR ''='",
    7,
    7.5,
    b"0" * 16,
    [],
    {},
    uuid.UUID(int=5),
]


@pytest.mark.parametrize("asset_id", BAD_IDS, ids=lambda value: repr(value)[:20])
def test_an_asset_id_that_names_none_is_not_found_and_breaks_no_transaction(
    disk: AssetStore, session: Session, asset_id: Any
) -> None:
    kept = JobStore(session).create("acme", job_type="kept")
    assert disk.get_by_id(session, asset_id) is None
    assert disk.get_by_id(session, asset_id, company_id="acme") is None
    assert disk.list_by_job(session, asset_id) == []
    with pytest.raises(jobkit.AssetNotFound) as refused:
        disk.list_by_company(session, "acme", before=asset_id)
    assert str(refused.value) == f"no asset {asset_id}"
    session.commit()
    assert JobStore(session).get_by_id(kept.id) == kept


POSITION = "position must be a count up to 2147483647, not "
SIZE = "byte_size must be a count up to 9223372036854775807, not "
NO_ROW: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(({"position": bad}, ValueError, f"{POSITION}{bad!r}") for bad in ("x", -1, 2**31, 2**63, 2**70, True, 1.5, None)),
    *(({"byte_size": bad}, ValueError, f"{SIZE}{bad!r}") for bad in ("x", -1, 2**63, None, True)),
    ({"sha256": None}, TypeError, "sha256 must be text, not NoneType"),
    ({"sha256": "a\0"}, ValueError, "sha256 contains a NUL character"),
    ({"content_type": None}, TypeError, "content_type must be text, not NoneType"),
    ({"content_type": "\ud800"}, ValueError, "content_type contains a lone surrogate"),
    ({"original_filename": "a\0"}, ValueError, "original_filename contains a NUL character"),
    ({"original_filename": 7}, TypeError, "original_filename must be text, not int"),
    ({"provider": "a\0"}, ValueError, "provider contains a NUL character"),
    ({"stored": {}}, TypeError, "stored must be a StoredObject, not dict"),
    ({"company_id": None}, ValueError, "company_id is missing"),
    ({"company_id": "\ud800"}, ValueError, "company_id contains a lone surrogate"),
    ({"source_task_id": "a\0"}, ValueError, "source_task_id contains a NUL character"),
    ({"created_by_agent_id": "a\0"}, ValueError, "created_by_agent_id contains a NUL character"),
    ({"created_by_user_id": "\ud800"}, ValueError, "created_by_user_id contains a lone surrogate"),
    ({"job_id": "nope"}, ValueError, "job_id is not a UUID: 'nope'"),
]


@pytest.mark.parametrize(("change", "error", "message"), NO_ROW, ids=range(len(NO_ROW)))
def test_what_no_row_can_hold_is_refused_in_the_same_words_and_costs_nothing(
    disk: AssetStore, engine: sa.Engine, session: Session, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    stored = store(disk)
    fields = {field.name for field in dataclasses.fields(stored)}
    arguments = {"company_id": "acme", "source_task_id": None, "stored": stored}
    if change.keys() <= fields:
        arguments["stored"] = dataclasses.replace(stored, **change)
    else:
        arguments |= change
    kept = JobStore(session).create("acme", job_type="kept")
    with pytest.raises(error) as refused:
        disk.create(session, **arguments)
    assert (refused.type, str(refused.value)) == (error, message)
    session.commit()
    assert JobStore(session).get_by_id(kept.id) == kept
    assert (number(engine, assets), number(engine, asset_intents)) == (0, 1)
    assert disk.create(session, "acme", stored, source_task_id=None).byte_size == 7


NO_FILE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"company": None}, ValueError, "company_id is missing"),
    ({"company": "a\0"}, ValueError, "company_id contains a NUL character"),
    ({"namespace": ""}, ValueError, "namespace is blank"),
    ({"original_filename": "a\nb"}, ValueError, r"original_filename contains the control character '\n'"),
    ({"original_filename": "\ud800"}, ValueError, "original_filename contains a lone surrogate"),
    ({"original_filename": 7}, TypeError, "original_filename must be text, not int"),
    ({"content_type": "pdf"}, ValueError, "content_type 'pdf' is not a media type such as 'application/pdf'"),
    ({"body": b""}, jobkit.AssetEmpty, "'a.txt' is empty"),
    ({"body": "text"}, TypeError, "body is text: encode it, or pass a pathlib.Path to name a file"),
    ({"body": ["text"]}, TypeError, "body yields str, not bytes"),
    ({"body": 7}, TypeError, "body must be bytes, a path, a binary file or an iterable of bytes, not int"),
]


@pytest.mark.parametrize(("change", "error", "message"), NO_FILE, ids=range(len(NO_FILE)))
def test_a_refused_file_leaves_nothing_and_the_hosts_transaction_goes_on(
    disk: AssetStore, engine: sa.Engine, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with Session(engine) as session:
        assert JobStore(session).list_by_company("acme") == []
        with pytest.raises(error) as refused:
            store(disk, **change)
        assert (refused.type, str(refused.value)) == (error, message)
        kept = JobStore(session).create("acme", job_type="kept")
        session.commit()
        assert JobStore(session).get_by_id(kept.id) == kept
    assert number(engine, asset_intents) == 0
    assert files(tmp_path / "assets") == []


@pytest.mark.parametrize(
    ("moment", "read"),
    [
        (datetime(1, 1, 2, tzinfo=UTC), datetime(1, 1, 2, tzinfo=UTC)),
        (datetime(9999, 12, 30, 23, tzinfo=UTC), datetime(9999, 12, 30, 23, tzinfo=UTC)),
        (datetime.min.replace(tzinfo=UTC), None),
        (datetime.max.replace(tzinfo=UTC), None),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), None),
        (datetime.max.replace(tzinfo=timezone(-timedelta(hours=12))), None),
    ],
    ids=["first", "last", "before the first", "after the last", "before any", "after any"],
)
def test_the_ends_of_the_calendar_are_stored_and_what_lies_beyond_is_refused(
    session: Session, moment: datetime, read: datetime | None
) -> None:
    job = JobStore(session).create("acme", job_type="note")
    if read is None:
        with pytest.raises(ValueError, match=r"started_at (is out of range in UTC|must be within the years 1 to 9999)"):
            JobStore(session).transition(job.id, started_at=moment)
        session.commit()
    else:
        assert JobStore(session).transition(job.id, started_at=moment).started_at == read
        session.commit()
    found = JobStore(session).get_by_id(job.id)
    assert found is not None
    assert found.started_at == read


# --- a failure that fights back


class Loud(str):
    """Text that raises whatever is done with it."""

    def _no(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("hands off")

    __getitem__ = __add__ = __len__ = __format__ = encode = replace = strip = splitlines = __repr__ = _no  # type: ignore[assignment]


class Meta(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("nameless")


class Nameless(Exception, metaclass=Meta):
    pass


class Fighting(Exception):
    """``str``, ``repr`` and the rest of it as told."""

    def __init__(self, told: Any = None, raised: BaseException | None = None) -> None:
        super().__init__()
        self.told, self.raised = told, raised

    def __str__(self) -> str:
        if self.raised is not None:
            raise self.raised
        return self.told  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        raise self.raised or RuntimeError("no repr")

    @property
    def __notes__(self) -> list[str]:
        raise RuntimeError("no notes")


class TwoArguments(Exception):
    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def recursion() -> None:
    recursion()


def groups(depth: int = 200) -> BaseException:
    made: BaseException = ValueError("innermost")
    for _ in range(depth):
        made = BaseExceptionGroup("several \0\ud800", [made, KeyboardInterrupt("stop")])
    return made


def circle() -> BaseException:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__context__ = other, one
    one.__context__ = other
    return one


FIGHTING: dict[str, tuple[Callable[[], BaseException], str]] = {
    "str raises": (lambda: Fighting(raised=RuntimeError("no words")), "Fighting"),
    "str raises SystemExit": (lambda: Fighting(raised=SystemExit(1)), "Fighting"),
    "str raises KeyboardInterrupt": (lambda: Fighting(raised=KeyboardInterrupt()), "Fighting"),
    "str recurses": (lambda: Fighting(raised=RecursionError("deeper")), "Fighting"),
    "str is a number": (lambda: Fighting(7), "Fighting"),
    "str is None": (lambda: Fighting(None), "Fighting"),
    "str is bytes": (lambda: Fighting(b"bytes"), "Fighting"),
    "str is no plain text": (lambda: Fighting(Loud("said")), "said"),
    "repr raises": (lambda: Fighting("said"), "said"),
    "arguments raise": (lambda: ValueError(Fighting(raised=RuntimeError("no"))), "ValueError"),
    "class without a name": (Nameless, "Nameless"),
    "class of a strange name": (type("E\x1b[31m\u202e", (Exception,), {}), "E\ufffd[31m\ufffd"),
    "class of a long name": (type("E" * 3_000_000, (Exception,), {}), "E" * 1_999 + "…"),
    "20 MB": (lambda: ValueError("\0\ud800" * 10_000_000), "\ufffd" * 1_999 + "…"),
    "lone surrogates and NUL": (lambda: ValueError("a\0b\ud800"), "a\ufffdb\ufffd"),
    "not picklable": (lambda: TwoArguments("font", "missing"), "font: missing"),
    "a group": (lambda: ExceptionGroup("two", [ValueError("a"), TypeError("b")]), "two (2 sub-exceptions)"),
    "groups in groups": (groups, "several \ufffd\ufffd (2 sub-exceptions)"),
    "causes in a circle": (circle, "one"),
}


def raises(make: Callable[[], BaseException]) -> Callable[[Any], Any]:
    def renderer(ctx: jobkit.RenderContext) -> Any:
        raise make()

    return renderer


def test_every_failure_is_recorded_whatever_it_does_when_it_is_asked(
    engine: sa.Engine, disk: AssetStore, tmp_path: Path, recorder: Recorder
) -> None:
    renderers = Renderers(default=note, describe_error=error_message)
    for name, (make, _) in FIGHTING.items():
        renderers.register(name)(raises(make))
    renderers.register("recursion")(lambda ctx: recursion())
    with Session(engine) as session, session.begin():
        made = {name: JobStore(session).create("acme", job_type=name) for name in [*FIGHTING, "recursion", "healthy"]}
    assert Runner(engine, disk, renderers).run_until_idle(timeout=60) == len(made)
    rows = {name: seen(engine, job) for name, job in made.items()}
    for name, (_, message) in FIGHTING.items():
        assert (name, rows[name].status, rows[name].error_message) == (name, "failed", message)
        assert recorder.types(made[name].id) == ["queued", "running", "failed"]
    assert rows["recursion"].error_message.startswith("maximum recursion depth exceeded")
    assert rows["healthy"].status == "done"
    assert len(files(tmp_path / "assets")) == number(engine, assets) == 1
    assert number(engine, asset_intents) == 0


class Raising(logging.Handler):
    """A host's log handler with a bug."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error
        self.called = 0

    def handle(self, record: logging.LogRecord) -> bool:
        self.called += 1
        raise self.error("the log is broken")


@pytest.mark.parametrize("error", [RuntimeError, RecursionError])
def test_a_log_handler_that_raises_does_not_keep_a_failure_from_being_recorded(
    engine: sa.Engine, disk: AssetStore, create: Callable[..., jobkit.Job], error: type[BaseException]
) -> None:
    job, unstored, other = create("bad"), create("unstored"), create("healthy")
    renderers = Renderers(default=note, describe_error=error_message)
    renderers.register("bad")(raises(lambda: ValueError("as said")))
    renderers.register("unstored")(lambda ctx: jobkit.Rendered("unstored", "text/plain", b"x"))
    publish = disk.storage.publish

    def refuses(uploads: Any) -> Any:
        unstored = [upload for upload in uploads if upload.key.endswith("unstored")]
        failures = {upload.key: OSError("no room") for upload in unstored}
        return failures | publish([upload for upload in uploads if upload not in unstored])

    handler = Raising(error)
    logging.getLogger("jobkit").addHandler(handler)
    logging.getLogger("jobkit").setLevel(logging.INFO)  # so that every end is logged
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk.storage, "publish", refuses)
            assert Runner(engine, disk, renderers).run_until_idle(timeout=60) == 3
    finally:
        logging.getLogger("jobkit").removeHandler(handler)
        logging.getLogger("jobkit").setLevel(logging.NOTSET)
    assert handler.called
    assert (seen(engine, job).status, seen(engine, job).error_message) == ("failed", "as said")
    assert (seen(engine, unstored).status, seen(engine, unstored).error_message) == ("failed", "no room")
    assert seen(engine, other).status == "done"


def test_an_unknown_job_type_is_one_line_in_the_log_and_a_renderers_error_has_its_traceback(
    engine: sa.Engine, disk: AssetStore, create: Callable[..., jobkit.Job], caplog: pytest.LogCaptureFixture
) -> None:
    create("pdf-documnet")
    create("bad")
    renderers = Renderers(describe_error=error_message)
    renderers.register("bad")(raises(lambda: ValueError("as said")))
    with caplog.at_level(logging.WARNING, logger="jobkit"):
        Runner(engine, disk, renderers).run_until_idle(timeout=60)
    told = {record.getMessage().split("failed: ")[-1]: record.exc_info for record in caplog.records}
    assert told.keys() == {"no renderer for job type 'pdf-documnet'", "as said"}
    assert told["no renderer for job type 'pdf-documnet'"] is None
    assert told["as said"] is not None


def test_a_file_name_that_would_break_a_line_fails_its_job_and_names_the_field(
    engine: sa.Engine, disk: AssetStore, tmp_path: Path, create: Callable[..., jobkit.Job]
) -> None:
    def writer(ctx: jobkit.RenderContext) -> None:
        with ctx.writer("a\x1b[2J.txt", "text/plain") as out:
            out.write(b"x")

    for renderer in (lambda ctx: jobkit.Rendered("a\r\nSet-Cookie: b", "text/plain", b"x"), writer):
        job = create()
        Runner(engine, disk, only(renderer)).run_until_idle(timeout=60)
        row = seen(engine, job)
        assert row.status == "failed"
        assert row.error_message.startswith("original_filename contains the control character '\\")
        assert files(tmp_path / "assets") == []


def test_inputs_that_were_put_in_the_table_by_hand_fail_their_own_job_or_none(
    engine: sa.Engine, disk: AssetStore, create: Callable[..., jobkit.Job]
) -> None:
    job, other = create(), create()
    with engine.begin() as connection:
        connection.execute(content_jobs.update().where(content_jobs.c.id == job.id).values(input=sa.text("'[1, 2]'")))
    Runner(engine, disk, only(lambda ctx: jobkit.Rendered("a", "text/plain", ctx.input.get("x", b"y")))).run_until_idle(
        timeout=60
    )
    assert (seen(engine, job).status, seen(engine, other).status) == ("failed", "done")
    assert "get" in seen(engine, job).error_message
