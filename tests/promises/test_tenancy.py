"""A company that is none, or another's, is given nothing: by no public call, on either database."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import jobkit
from jobkit import ANY_COMPANY, AssetStore, JobStore, Runner, aio, signals, sse, testing, watch
from jobkit.cli import main
from jobkit.maintenance.audit import audit, elsewhere
from jobkit.tables import assets as asset_rows
from jobkit.tables import content_jobs
from tests.support import shared as module_database
from tests.support.runners import only, seen

shared, database = module_database.shared, module_database.database


class Shouted(str, enum.Enum):  # noqa: UP042 - that it prints otherwise is the point
    """Prints as ``Shouted.ACME``, and is equal to ``acme``."""

    ACME = "acme"


class Quiet(enum.StrEnum):
    ACME = "acme"


class Numbered(int, enum.Enum):
    SEVEN = 7


class Company:
    id = "acme"


NO_COMPANY: dict[str, Any] = {
    "None": None,
    "blank": "",
    "spaces": " \t\n",
    "bytes": b"acme",
    "bytearray": bytearray(b"acme"),
    "bool": True,
    "float": 7.0,
    "str enum": Shouted.ACME,
    "int enum": Numbered.SEVEN,
    "list": ["acme"],
    "tuple": ("acme",),
    "object": Company(),
    "class": Company,
    "huge": 10**5_000,
}


def row_of(session: Session, stored: jobkit.StoredObject, disk: AssetStore, **more: Any) -> jobkit.Asset:
    return disk.create(session, "acme", stored, source_task_id=None, **more)


def put(disk: AssetStore, company: Any = "acme") -> jobkit.StoredObject:
    return disk.put_file(company, original_filename="a.txt", content_type="text/plain", body=b"content")


class Host:
    """Two rows of acme, and every public call that takes a company."""

    def __init__(self, engine: sa.Engine, disk: AssetStore, session: Session) -> None:
        self.stored = put(disk)
        self.spare = put(disk)
        self.job = JobStore(session).create("acme", job_type="note")
        self.asset = row_of(session, self.stored, disk, job_id=self.job.id)
        session.commit()
        jobs, runner = JobStore(session), Runner(engine, disk, only())
        self.calls: dict[str, Callable[[Any], Any]] = {
            "create": lambda c: jobs.create(c, job_type="note"),
            "create_many": lambda c: jobs.create_many(c, []),
            "get_by_id": lambda c: jobs.get_by_id(self.job.id, company_id=c),
            "get_by_id of no id": lambda c: jobs.get_by_id("nonsense", company_id=c),
            "list_by_company": jobs.list_by_company,
            "list_by_company before": lambda c: jobs.list_by_company(c, before=self.job),
            "transition": lambda c: jobs.transition(self.job.id, company_id=c, status="failed"),
            "cancel": lambda c: jobs.cancel(self.job.id, company_id=c),
            "retry": lambda c: jobs.retry(self.job.id, company_id=c),
            "submit": lambda c: runner.submit(c, job_type="note"),
            "put_file": lambda c: put(disk, c),
            "writer": lambda c: disk.writer(c, original_filename=None, content_type="text/plain").__enter__(),
            "assets.create": lambda c: disk.create(session, c, self.spare, source_task_id=None),
            "assets.get_by_id": lambda c: disk.get_by_id(session, self.asset.id, company_id=c),
            "assets.get_by_id of no id": lambda c: disk.get_by_id(session, "nonsense", company_id=c),
            "list_by_job": lambda c: disk.list_by_job(session, self.job.id, company_id=c),
            "list_by_job of no id": lambda c: disk.list_by_job(session, "nonsense", company_id=c),
            "assets.list_by_company": lambda c: disk.list_by_company(session, c),
            "assets.list_by_company before": lambda c: disk.list_by_company(session, c, before=self.asset),
            "watch": lambda c: watch(engine, self.job.id, company_id=c, timeout=0),
            "sse.stream": lambda c: sse.stream(engine, c),
            "sse.stream of a job": lambda c: sse.stream(engine, c, self.job.id),
            "signals.subscribe": lambda c: signals.subscribe(c, print),
            "signals.connect": lambda c: signals.content_job_done.connect(print, sender=c),
            "signals.disconnect": lambda c: signals.content_job_done.disconnect(print, sender=c),
            "assert_job_created": lambda c: testing.assert_job_created(session, c),
            "assert_no_job_created": lambda c: testing.assert_no_job_created(session, c),
            "audit": lambda c: next(audit(engine, disk, company_id=c)),
            "elsewhere": lambda c: elsewhere(engine, disk, company_id=c),
        }


@pytest.mark.parametrize("company", NO_COMPANY.values(), ids=NO_COMPANY)
def test_what_is_no_company_is_refused_by_every_call_and_changes_nothing(
    engine: sa.Engine, disk: AssetStore, session: Session, company: Any
) -> None:
    host = Host(engine, disk, session)
    for name, call in host.calls.items():
        with pytest.raises((ValueError, TypeError)) as refused:
            call(company)
        assert str(refused.value).startswith("company_id "), name
    session.commit()
    assert seen(engine, host.job).status == "queued"
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(content_jobs)) == 1
        assert connection.scalar(sa.select(sa.func.count()).select_from(asset_rows)) == 1


def test_what_is_any_company_is_refused_where_one_is_needed(
    engine: sa.Engine, disk: AssetStore, session: Session
) -> None:
    needed = ("create", "create_many", "list_by_company", "submit", "put_file", "writer", "assets.create")
    needed += ("assets.list_by_company", "sse.stream", "signals.subscribe", "signals.connect")
    host = Host(engine, disk, session)
    for name in needed:
        with pytest.raises(TypeError, match=r"^company_id must be text, a whole number or a UUID, not AnyCompany$"):
            host.calls[name](ANY_COMPANY)


@pytest.mark.parametrize("company", [ANY_COMPANY, "acme", Quiet.ACME], ids=repr)
def test_a_call_with_an_id_finds_it_in_its_company_and_in_any(
    engine: sa.Engine, disk: AssetStore, session: Session, company: Any
) -> None:
    host, jobs = Host(engine, disk, session), JobStore(session)
    assert jobs.get_by_id(host.job.id, company_id=company) == jobs.get_by_id(host.job.id) == host.job
    assert disk.get_by_id(session, host.asset.id, company_id=company) == disk.get_by_id(session, host.asset.id)
    assert disk.list_by_job(session, host.job.id, company_id=company) == [host.asset]
    assert next(watch(engine, host.job.id, company_id=company)).job_id == host.job.id
    assert jobs.transition(host.job.id, company_id=company, source_task_id="t").source_task_id == "t"
    assert jobs.cancel(host.job.id, company_id=company).status == "cancelled"
    assert jobs.retry(host.job.id, company_id=company).status == "queued"


def test_a_number_and_a_uuid_are_their_text(session: Session) -> None:
    jobs, number, unique = JobStore(session), 7, uuid.uuid4()
    assert jobs.get_by_id(jobs.create(number, job_type="note").id, company_id="7") is not None
    assert jobs.get_by_id(jobs.create(unique, job_type="note").id, company_id=str(unique)) is not None
    assert jobs.create(Quiet.ACME, job_type="note").company_id == "acme"


def test_another_companys_job_is_not_changed_by_hand(engine: sa.Engine, disk: AssetStore, session: Session) -> None:
    host = Host(engine, disk, session)
    with pytest.raises(jobkit.JobNotFound):
        JobStore(session).transition(host.job.id, company_id="globex", status="failed")
    session.commit()
    assert seen(engine, host.job).status == "queued"


def test_an_asset_and_its_job_have_one_company(engine: sa.Engine, disk: AssetStore, session: Session) -> None:
    host, stored = Host(engine, disk, session), put(disk, "globex")
    for job_id in (host.job.id, str(host.job.id)):
        with pytest.raises(jobkit.JobNotFound, match=str(host.job.id)):
            disk.create(session, "globex", stored, source_task_id=None, job_id=job_id)
    assert disk.list_by_job(session, host.job.id) == [host.asset]
    # The object is still globex', and a job that is gone has no company.
    assert disk.create(session, "globex", stored, source_task_id=None, job_id=uuid.uuid4()).company_id == "globex"


@pytest.mark.parametrize("company", [{}, {"company_id": "globex"}], ids=["any company", "its company"])
def test_a_job_and_its_result_have_one_company(
    engine: sa.Engine, disk: AssetStore, session: Session, company: dict[str, Any]
) -> None:
    host, jobs = Host(engine, disk, session), JobStore(session)
    theirs = jobs.create("globex", job_type="note")
    with pytest.raises(jobkit.AssetNotFound, match=str(host.asset.id)):
        jobs.transition(theirs.id, **company, status="done", result_asset_id=host.asset.id)
    assert jobs.get_by_id(theirs.id) == theirs
    assert jobs.transition(host.job.id, result_asset_id=host.asset.id).result_asset_id == host.asset.id


def test_a_result_in_an_adopted_table_has_the_jobs_company_too(
    engine: sa.Engine, disk: AssetStore, session: Session
) -> None:
    if engine.dialect.name == "sqlite":  # ids with dashes, as a host's own table has them
        host, jobs = Host(engine, disk, session), JobStore(session)
        session.execute(sa.text("UPDATE assets SET id = :id"), {"id": str(host.asset.id)})
        theirs = jobs.create("globex", job_type="note")
        with pytest.raises(jobkit.AssetNotFound):
            jobs.transition(theirs.id, status="done", result_asset_id=host.asset.id)


@pytest.mark.parametrize("company", [None, "", b"acme", Shouted.ACME], ids=repr)
def test_awaited_calls_refuse_it_too(lane: Any, tmp_path: Path, company: Any) -> None:
    """``lane``: each asynchronous driver."""

    async def ask() -> None:
        files = aio.AsyncAssetStore(AssetStore(tmp_path / "assets"))
        async with AsyncSession(lane.async_engine) as session:
            jobs = aio.AsyncJobStore(session)
            job = await jobs.create("acme", job_type="note")
            for call in (
                jobs.create(company, job_type="note"),
                jobs.get_by_id(job.id, company_id=company),
                jobs.list_by_company(company),
                jobs.transition(job.id, company_id=company, status="failed"),
                jobs.cancel(job.id, company_id=company),
                jobs.retry(job.id, company_id=company),
                files.put_file(company, original_filename=None, content_type="text/plain", body=b"x"),
                files.get_by_id(session, job.id, company_id=company),
                files.list_by_job(session, job.id, company_id=company),
                files.list_by_company(session, company),
                anext(aio.watch(lane.engine, job.id, company_id=company)),
                sse.astream(lane.engine, company),
            ):
                with pytest.raises((ValueError, TypeError), match=r"^company_id "):
                    await call
            with pytest.raises((ValueError, TypeError), match=r"^company_id "):
                aio.subscribe(company)

    lane.run(ask)


@pytest.mark.parametrize("command", ["list", "show", "cancel", "retry"])
def test_the_command_line_takes_no_blank_company(
    engine: sa.Engine, create: Any, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    job = create()
    ids = [] if command == "list" else [str(job.id)]
    url = engine.url.render_as_string(hide_password=False)
    with pytest.raises(SystemExit) as ended:
        main(["jobs", command, *ids, "--database", url, "--company", " "])
    assert ended.value.code == 2
    assert "argument --company: company_id is blank" in capsys.readouterr().err
    assert seen(engine, job).status == "queued"
