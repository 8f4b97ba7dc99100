"""A database as it is after some weeks: what has ended outnumbers by far what waits and what runs.

Jobs have numbers, by which a test can name one: which are what is said here. Newer ones have greater numbers.
"""

from __future__ import annotations

from uuid import UUID

import sqlalchemy as sa

from jobkit.jobs.claims import Claim

ENDED, QUEUED = range(1, 20_001), range(20_001, 22_001)
RUNNING, SCHEDULED = range(22_001, 22_201), range(22_201, 22_401)
# Keys without a row, a hundred of them due; and the number of events: three of each job that has ended come first.
INTENTS = range(30_001, 40_001)
LAST_EVENT = 3 * len(ENDED) + len(QUEUED) + 2 * len(RUNNING) + len(SCHEDULED)
WORKER = "a worker"
# Companies: those of all that has ended or runs, and those of what waits.
FEW, MANY = "'c' || (i % 20)", "'c' || (i % 100)"


class Spelling:
    """What the two databases spell in different ways: an id and a time by a number, and a recorded transaction."""

    def __init__(self, dialect: str) -> None:
        self._sqlite = dialect == "sqlite"

    def id(self, number: str) -> str:
        return f"printf('%032x', {number})" if self._sqlite else f"CAST(lpad(to_hex({number}), 32, '0') AS uuid)"

    def time(self, minutes: str) -> str:
        if self._sqlite:
            return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', ({minutes}) || ' minutes')"
        return f"now() + make_interval(mins => {minutes})"

    def xid(self, event: str) -> str:
        # Those of transactions long over, some hundred events each: a new server has given no more numbers than that.
        return "NULL" if self._sqlite else f"3 + {event} * 500 / {LAST_EVENT}"


def job_id(number: int) -> UUID:
    return UUID(int=number)


def key(number: int) -> str:
    """The key of an asset or intent."""
    return f"c{number % 20}/x/{number}"


def claims(numbers: range) -> list[Claim]:
    """The claims of running jobs, as their worker knows them."""
    return [Claim(job_id(number), f"c{number % 20}", "note", {}, None, 1, 1) for number in numbers]


def fill(engine: sa.Engine) -> None:
    """Put jobs, events, assets and intents into an empty database."""
    spelled = Spelling(engine.dialect.name)
    with engine.begin() as connection:
        _jobs(connection, spelled)
        _events(connection, spelled)
        file = {"company_id": FEW, "provider": "'local_disk'", "object_key": f"{FEW} || '/x/' || i"}
        asset = {"content_type": "'text/plain'", "byte_size": "1", "sha256": "'0'", "job_id": spelled.id("i")}
        at = dict.fromkeys(("created_at", "updated_at"), spelled.time("i - 22400"))
        insert(connection, "assets", ENDED, id=spelled.id("i"), **file, **asset, **at)
        record = {"state": "CASE i % 3 WHEN 0 THEN 'tombstone' ELSE 'pending' END"} | file
        insert(connection, "asset_intents", INTENTS, id=spelled.id("i"), **record, not_before=spelled.time("i - 30100"))


def _jobs(connection: sa.Connection, spelled: Spelling) -> None:
    at = spelled.time("i - 22400")
    common = {"id": spelled.id("i"), "job_type": "'kind ' || (i % 7)", "created_at": at, "updated_at": at}
    common |= {"input": f"""'{{"text": "{"x" * 100}"}}'""", "priority": "i % 3"}
    ran = {"started_at": at, "fence": "1", "attempt": "1"}
    ended = {"status": "CASE i % 97 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'done' END", "finished_at": at}
    insert(connection, "content_jobs", ENDED, **common, company_id=FEW, **ran, **ended, event_seq="3")
    key = "CASE i % 10 WHEN 0 THEN 'key ' || i END"
    insert(connection, "content_jobs", QUEUED, **common, company_id=MANY, event_seq="1", idempotency_key=key)
    held = {"status": "'running'", "lease_until": spelled.time("i - 22010"), "worker_id": f"'{WORKER}'"}
    insert(connection, "content_jobs", RUNNING, **common, company_id=FEW, **ran, **held, event_seq="2")
    later = spelled.time("i - 22300")
    insert(connection, "content_jobs", SCHEDULED, **common, company_id=MANY, event_seq="1", run_at=later)


def _events(connection: sa.Connection, spelled: Spelling) -> None:
    first = 1
    for numbers, kinds in (
        (ENDED, ("queued", "running", "done")),
        (QUEUED, ("queued",)),
        (RUNNING, ("queued", "running")),
        (SCHEDULED, ("queued",)),
    ):
        for seq, kind in enumerate(kinds, 1):
            event = f"({first} + (i - {numbers.start}) * {len(kinds)} + {seq - 1})"
            log = {"id": event, "xid": spelled.xid(event), "seq": str(seq), "type": f"'content_job.{kind}'"}
            insert(connection, "content_job_events", numbers, company_id=FEW, job_id=spelled.id("i"), **log)
        first += len(numbers) * len(kinds)
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text(f"ALTER TABLE content_job_events ALTER id RESTART WITH {first}"))


def insert(connection: sa.Connection, table: str, numbers: range, **columns: str) -> None:
    """A row for each number, which the columns' expressions know as ``i``."""
    count = f"SELECT {numbers.start} UNION ALL SELECT i + 1 FROM n WHERE i < {numbers.stop - 1}"
    names, values = ", ".join(columns), ", ".join(columns.values())
    connection.execute(
        sa.text(f"INSERT INTO {table} ({names}) WITH RECURSIVE n(i) AS ({count}) SELECT {values} FROM n")
    )
