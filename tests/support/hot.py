"""Every statement that is sent for each job, each request or each second, in a database that ``filled`` made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import sqlalchemy as sa

from jobkit import AssetStore, JobRequest, JobStore
from jobkit.assets import intents
from jobkit.assets.intents import Intent
from jobkit.base.clock import utcnow
from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import ClaimTerms, Dialect, DueKey, Position, Start
from jobkit.db.logs import log_of
from jobkit.events import log
from jobkit.events.hub import subscribers
from jobkit.events.watch import Watcher
from jobkit.jobs import claims
from jobkit.jobs.claims import Completion, Report
from jobkit.jobs.fairness import DUE
from jobkit.runner.in_flight import InFlight
from jobkit.runner.turns import Committer, Turn
from jobkit.types import StoredObject
from tests.support import filled
from tests.support.filled import ENDED, INTENTS, LAST_EVENT, QUEUED, RUNNING, WORKER, fill, job_id
from tests.support.plans import Paths, explained

COMPANIES = ["c1", "c2", "c3"]
HELD = filled.claims(RUNNING[100:150])
KEYS = [filled.key(number) for number in INTENTS if number % 3][:20]
# One that has ended, and one before it, of the first of the companies.
SOME, OLDER = job_id(19_981), job_id(10_001)


@dataclass
class Host:
    """Where statements are sent from: ``connection`` is in a transaction that is rolled back."""

    connection: sa.Connection
    engine: sa.Engine
    assets: AssetStore

    @property
    def jobs(self) -> JobStore:
        return JobStore(self.connection)

    @property
    def statements(self) -> Dialect:
        return statements_for(self.connection)

    def committer(self) -> Committer:
        return Committer(self.engine, worker_id=WORKER, lease=60.0, clock=utcnow, in_flight=InFlight())


def terms() -> ClaimTerms:
    return ClaimTerms(4, WORKER, 60.0, utcnow())


def place(host: Host) -> tuple[Position, Start]:
    """Some hundred events before the end of the log, for a reader that began before all of them."""
    xid = 0 if host.engine.dialect.name == "sqlite" else 500
    return Position(xid, LAST_EVENT - 100), host.statements.start_after(Position(0, 0))


def stored(key: str) -> StoredObject:
    return StoredObject("local_disk", key, "text/plain", 1, "0", None)


def finish(host: Host) -> None:
    ends = [Completion(claim, files=(stored(key),)) for claim, key in zip(HELD, KEYS, strict=False)]
    claims.finish(host.connection, ends, now=utcnow())


def settled(host: Host) -> None:
    with host.engine.connect() as connection:
        host.committer()._settled(connection, Turn([Completion(claim) for claim in HELD]), set())


def watched(host: Host) -> Watcher:
    watcher = Watcher(host.engine, SOME, wake=lambda: None)
    watcher.read()
    return watcher


def look_for_watched(host: Host) -> None:
    watcher = watched(host)
    subscribers.add(watcher)
    try:
        subscribers._polled.clear()
        subscribers.poll(host.engine, watcher.log)
    finally:
        subscribers.remove(watcher)


def due(host: Host, state: str) -> list[DueKey]:
    always = datetime(1970, 1, 1, tzinfo=UTC)
    found = host.statements.due_intents
    return list(found(host.connection, provider="local_disk", state=state, early=0.0, after=always, limit=500))


HOT: dict[str, Callable[[Host], object]] = {
    # what hosts do
    "create": lambda h: h.jobs.create("c1", job_type="note"),
    "create with a key": lambda h: h.jobs.create("c1", job_type="kind 0", input={"text": "x"}, idempotency_key="new"),
    "create with a known key": lambda h: [h.jobs.create("c1", job_type="n", idempotency_key="k") for _ in range(2)],
    "create_many": lambda h: h.jobs.create_many("c1", [JobRequest("note")] * 50),
    "get_by_id": lambda h: h.jobs.get_by_id(SOME, company_id="c1"),
    "list_by_company": lambda h: h.jobs.list_by_company("c1", limit=20),
    "list_by_company, next page": lambda h: h.jobs.list_by_company("c1", limit=20, before=OLDER),
    "list_by_company, of a status": lambda h: h.jobs.list_by_company("c1", status="failed", limit=20),
    "cancel": lambda h: h.jobs.cancel(job_id(QUEUED[0])),
    "AssetStore.create": lambda h: h.assets.create(h.connection, "c1", stored(KEYS[0]), source_task_id=None),
    "AssetStore.get_by_id": lambda h: h.assets.get_by_id(h.connection, SOME, company_id="c1"),
    "AssetStore.list_by_job": lambda h: h.assets.list_by_job(h.connection, SOME, company_id="c1"),
    "AssetStore.list_by_company": lambda h: h.assets.list_by_company(h.connection, "c1", limit=20),
    "AssetStore.list_by_company, next page": lambda h: h.assets.list_by_company(
        h.connection, "c1", limit=20, before=OLDER
    ),
    "AssetStore.delete": lambda h: h.assets.delete(h.connection, h.assets.get_by_id(h.connection, SOME)),
    # what a runner does
    "has_queued": lambda h: h.statements.has_queued(h.connection, by=None),
    "claim": lambda h: h.statements.claim(h.connection, terms=terms()),
    "claim_of": lambda h: h.statements.claim_of(h.connection, COMPANIES, 2, terms=terms()),
    "claim_these": lambda h: h.statements.claim_these(h.connection, [job_id(n) for n in QUEUED[:9]], terms=terms()),
    "companies_due": lambda h: h.statements.companies_due(h.connection, limit=DUE, by=None),
    "first_queued": lambda h: h.statements.first_queued(h.connection, COMPANIES, 8, suspect=2, by=None),
    "companies": lambda h: h.statements.companies(h.connection, COMPANIES, beyond="c5", limit=200),
    "all_companies": lambda h: h.statements.all_companies(h.connection, beyond="c5", limit=200, by=None),
    "record_intents": lambda h: intents.record_intents(h.connection, [Intent("c1", "local_disk", "c1/x/new")]),
    "finish": finish,
    "renew": lambda h: claims.renew(h.connection, HELD, lease=60.0),
    "check": lambda h: claims.check(h.connection, HELD),
    "update_progress": lambda h: claims.update_progress(
        h.connection, [(claim, Report(0.5, None)) for claim in HELD], lease=60.0, now=utcnow()
    ),
    "rescue": lambda h: claims.rescue(h.connection, limit=100, now=utcnow()),
    "first_expired": lambda h: h.statements.first_expired(h.connection, after=UUID(int=0)),
    "leases": lambda h: h.statements.leases(h.connection),
    "cap_leases": lambda h: h.statements.cap_leases(h.connection, far=600.0, lease=60.0),
    "what a lost reply committed": settled,
    "what a lost reply claimed": lambda h: h.committer()._unknown(h.connection),
    # what a sweep does
    "due_intents, pending": lambda h: due(h, "pending"),
    "due_intents, tombstone": lambda h: due(h, "tombstone"),
    "claim_intents": lambda h: h.statements.claim_intents(
        h.connection, KEYS, provider="local_disk", state="pending", early=0.0, hold=60.0
    ),
    "postpone_intents": lambda h: h.statements.postpone_intents(
        h.connection, [{"key": key, "error": "away"} for key in KEYS], provider="local_disk"
    ),
    "drop_intents": lambda h: h.statements.drop_intents(h.connection, KEYS, provider="local_disk"),
    # what readers of the log do
    "start": lambda h: h.statements.start(h.connection),
    "scan": lambda h: h.statements.scan(h.connection, *place(h), 500),
    "earlier": lambda h: h.statements.earlier(
        h.connection, *place(h), [{"job": job_id(n).hex, "seq": 3, "queued": True} for n in ENDED[-9:]]
    ),
    "of_company": lambda h: h.statements.of_company(h.connection, *place(h), "c1", 500),
    "of_company, from afar": lambda h: h.statements.of_company(h.connection, Position(1, 0), place(h)[1], "c1", 200),
    "of_company, of few events": lambda h: h.statements.of_company(
        h.connection, Position(1, 0), place(h)[1], "who has none", 500
    ),
    "log_begins": lambda h: h.statements.log_begins(h.connection),
    "existing": lambda h: log.existing(h.connection, [(n, job_id(n)) for n in range(1, 20)]),
    "watch, state": watched,
    "watch, events": lambda h: watched(h)._from_log(),
    "watch, look at all": look_for_watched,
}

# Either index of a company serves, and versions of SQLite choose differently.
UNSETTLED = {"list_by_company, of a status"}


def paths(engine: sa.Engine, folder: Path) -> dict[str, Paths]:
    """How each is carried out in an empty database, which is filled for it; then as it is in other circumstances: on
    SQLite before the first ANALYZE, which few hosts ever call, on PostgreSQL after some calls on one connection, when
    the server may plan for any values.
    """
    fill(engine)
    assets = AssetStore(folder, engine=engine)
    if engine.dialect.name == "sqlite":
        others = {f"{name} (before ANALYZE)": found for name, found in _each(engine, assets).items()}
        engine.dispose()  # what an open connection knows of the tables is older
        _gather(engine)
        return _each(engine, assets) | others
    _gather(engine)
    others = {f"{name} (prepared)": found for name, found in _each(engine, assets, prepared=True).items()}
    return _each(engine, assets) | others


def _each(engine: sa.Engine, assets: AssetStore, *, prepared: bool = False) -> dict[str, Paths]:
    found = {}
    log_of(engine)  # once for each engine
    for name, send in HOT.items():
        with engine.connect() as connection, explained(engine, prepared=prepared) as found[name]:
            send(Host(connection, engine, assets))
            connection.rollback()
    return found


def _gather(engine: sa.Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE" if engine.dialect.name == "sqlite" else "VACUUM ANALYZE")


def told(found: dict[str, Paths]) -> str:
    """As text, in the order of ``HOT``; what circumstances do not change is told once."""
    lines = []
    for name in [name for name in HOT if name not in UNSETTLED]:
        [usual, other] = [key for key in found if key.partition(" (")[0] == name]
        lines += [name, *_lines(found[usual]), ""]
        if found[other].keys() != found[usual].keys():
            lines += [other, *_lines(found[other]), ""]
    return "\n".join(lines)


def _lines(paths: Paths) -> list[str]:
    return [f"    {path}" for path in sorted(paths)] or ["    reads nothing"]
