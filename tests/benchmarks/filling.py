"""What benchmarks put into a database before they measure."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import JobRequest, JobStore
from tests.support.filled import Spelling, insert

DAY = 24 * 60
# So many jobs at a time: a transaction of a million would need as much memory as disk.
STEP = 50_000


def queue(engine: sa.Engine, count: int, companies: int = 1) -> None:
    """Queue so many jobs of the type ``note``, numbered, of each of so many companies as many."""
    for company in range(companies):
        requests = [JobRequest("note", {"n": n}) for n in range(company, count, companies)]
        with Session(engine) as session, session.begin():
            JobStore(session).create_many(f"bench{company or ''}", requests)


def record(engine: sa.Engine, count: int, companies: int = 1) -> None:
    """So many jobs that are done, with three events and one asset each; every second one ended 100 days ago."""
    spelled = Spelling(engine.dialect.name)
    owner = {"company_id": f"'bench' || COALESCE(NULLIF(CAST(i % {companies} AS text), '0'), '')"}
    job = {"job_id": spelled.id("i")}
    ended = spelled.time(f"-{DAY} * (1 + 99 * ((i + 1) % 2))")
    at = dict.fromkeys(("started_at", "finished_at", "created_at", "updated_at"), ended)
    done = {"job_type": "'note'", "status": "'done'", "input": f"""'{{"text": "{"x" * 200}"}}'""", "event_seq": "3"}
    file = {"provider": "'local_disk'", "object_key": "'bench/x/' || i || '.txt'", "content_type": "'text/plain'"}
    file |= {"byte_size": "1", "sha256": f"'{'0' * 64}'"}
    for start in range(1, count + 1, STEP):
        numbers = range(start, min(start + STEP, count + 1))
        with engine.begin() as connection:
            insert(connection, "content_jobs", numbers, id=spelled.id("i"), **owner, **done, **at)
            for seq, kind in enumerate(("queued", "running", "done"), 1):
                told = {"seq": str(seq), "type": f"'content_job.{kind}'", "payload": "'{\"n\": 1}'"}
                insert(connection, "content_job_events", numbers, **owner, **job, **told)
            insert(connection, "assets", numbers, id=spelled.id("i"), **owner, **job, **file)
