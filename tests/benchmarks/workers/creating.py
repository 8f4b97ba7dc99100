"""Jobs created, with jobkit and by hand. The host's table and its INSERT are the same for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import JobRequest, JobStore
from tests.benchmarks.databases import connect
from tests.benchmarks.workers.files import new_id
from tests.benchmarks.workers.report import Report

# So many jobs come before what is measured: statements are compiled and prepared at first use.
WARM = 50
HOST = sa.Table("host_rows", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("said", sa.Text))
TOGETHER = sa.text("""
WITH job AS (
    INSERT INTO content_jobs (id, company_id, job_type, input, event_seq)
    VALUES (CAST(:id AS uuid), 'bench', 'note', CAST(:input AS jsonb), 1)
), told AS (
    INSERT INTO content_job_events (company_id, job_id, seq, type, payload)
    VALUES ('bench', CAST(:id AS uuid), 1, 'content_job.queued', CAST(:payload AS jsonb))
)
SELECT pg_notify('jobkit', '')
""")
# SQLite has no INSERT within WITH.
APART = [
    sa.text(
        "INSERT INTO content_jobs (id, company_id, job_type, input, event_seq) "
        "VALUES (replace(:id, '-', ''), 'bench', 'note', :input, 1)"
    ),
    sa.text(
        "INSERT INTO content_job_events (company_id, job_id, seq, type, payload) "
        "VALUES ('bench', replace(:id, '-', ''), 1, 'content_job.queued', :payload)"
    ),
]
COPY = ("id", "company_id", "job_type", "input", "event_seq"), ("company_id", "job_id", "seq", "type", "payload")

Host = Session | sa.Connection


def with_jobkit(url: str, folder: Path, jobs: int, report: Report) -> None:
    def create(session: Session, number: int) -> None:
        session.execute(HOST.insert(), {"said": "hello"})
        JobStore(session).create("bench", job_type="note", input={"n": number})

    _one_by_one(url, jobs, report, Session, create)


def by_hand(url: str, folder: Path, jobs: int, report: Report) -> None:
    _one_by_one(url, jobs, report, Session, _create)


def by_hand_without_session(url: str, folder: Path, jobs: int, report: Report) -> None:
    _one_by_one(url, jobs, report, sa.Engine.connect, _create)


def _create(host: Host, number: int) -> None:
    host.execute(HOST.insert(), {"said": "hello"})
    job_id = str(new_id())
    values = {"id": job_id, "input": json.dumps({"n": number}), "payload": json.dumps({"jobId": job_id})}
    bind = host.get_bind() if isinstance(host, Session) else host
    for statement in APART if bind.dialect.name == "sqlite" else [TOGETHER]:
        host.execute(statement, values)


def _one_by_one(
    url: str, jobs: int, report: Report, host: Callable[[sa.Engine], Any], create: Callable[[Any, int], None]
) -> None:
    engine = connect(url)
    HOST.create(engine)
    for number in range(jobs + WARM):
        if number == WARM:
            report.begin()
        with host(engine) as transaction, transaction.begin():
            create(transaction, number)
    report.end(jobs)
    engine.dispose()


def many_with_jobkit(url: str, folder: Path, jobs: int, report: Report) -> None:
    def create(engine: sa.Engine, numbers: range) -> None:
        with Session(engine) as session, session.begin():
            JobStore(session).create_many("bench", [JobRequest("note", {"n": number}) for number in numbers])

    _together(url, jobs, report, create)


def many_by_copy(url: str, folder: Path, jobs: int, report: Report) -> None:
    def create(engine: sa.Engine, numbers: range) -> None:
        made = [(str(new_id()), json.dumps({"n": number})) for number in numbers]
        rows = [(job_id, "bench", "note", given, 1) for job_id, given in made]
        events = [("bench", job_id, 1, "content_job.queued", json.dumps({"jobId": job_id})) for job_id, _ in made]
        with engine.begin() as connection, connection.connection.cursor() as cursor:
            for table, columns, values in zip(
                ("content_jobs", "content_job_events"), COPY, (rows, events), strict=True
            ):
                with cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
                    for value in values:
                        copy.write_row(value)
            cursor.execute("NOTIFY jobkit")

    _together(url, jobs, report, create)


def _together(url: str, jobs: int, report: Report, create: Callable[[sa.Engine, range], None]) -> None:
    engine = connect(url)
    create(engine, range(WARM))
    report.begin()
    create(engine, range(WARM, WARM + jobs))
    report.end(jobs)
    engine.dispose()
