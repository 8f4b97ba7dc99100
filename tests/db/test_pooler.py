"""Behind PgBouncer in transaction mode, where LISTEN has no effect: a real one, in JOBKIT_TEST_PGBOUNCER or on PATH."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetStore, JobStore, Relay, Runner
from jobkit.base.clock import utcnow
from jobkit.events import hints as listener
from tests.support.databases import Database
from tests.support.invariants import violations
from tests.support.postgres import UNPRIVILEGED
from tests.support.recorder import Recorder
from tests.support.runners import only, until

PROGRAM = os.environ.get("JOBKIT_TEST_PGBOUNCER") or shutil.which("pgbouncer")
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="there is no pgbouncer: set JOBKIT_TEST_PGBOUNCER, or install it"
)


@pytest.fixture
def pooled(postgres_database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sa.Engine]:
    """The database through a pooler with three connections; a statement may find another one than the last."""
    url, folder = postgres_database.engine.url, tmp_path_factory.mktemp("pooler")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "pool_mode": "transaction",
        "default_pool_size": 3,
        "server_round_robin": 1,
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    database = f"* = host={url.host} port={url.port} user={url.username}"
    config = folder / "pgbouncer.ini"
    config.write_text("\n".join(["[databases]", database, "[pgbouncer]", *lines, ""]))
    owner: dict[str, Any] = {"user": UNPRIVILEGED} if os.geteuid() == 0 else {}
    for path in (config, folder, *folder.parents[:3]):
        if owner and path.owner() == "root":
            path.chmod(path.stat().st_mode | 0o055)
    assert PROGRAM is not None
    with (folder.parent / "pooler.log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, str(config)], stdout=log, stderr=log, cwd="/", **owner)
    # Prepared statements are known to one connection of the server only.
    engine = sa.create_engine(url.set(host="127.0.0.1", port=port), connect_args={"prepare_threshold": None})
    try:
        until(lambda: answers(engine), (folder.parent / "pooler.log").read_text(), 60)
        yield engine
    finally:
        engine.dispose()
        process.terminate()
        process.wait(60)


def answers(engine: sa.Engine) -> bool:
    try:
        with engine.connect():
            return True
    except sa.exc.OperationalError:
        return False


def create(engine: sa.Engine) -> jobkit.Job:
    with Session(engine) as session, session.begin():
        return JobStore(session).create("acme", job_type="note")


def cancelled(engine: sa.Engine) -> jobkit.Job:
    """A job that no runner sees."""
    with Session(engine) as session, session.begin():
        job = JobStore(session).create("acme", job_type="note", run_at=utcnow() + timedelta(days=1))
    with Session(engine) as session, session.begin():
        return JobStore(session).cancel(job.id)


@pytest.mark.parametrize("heartbeat", [0.02, 15.0])
def test_every_event_of_others_and_of_its_runner_is_heard_once(
    heartbeat: float,
    pooled: sa.Engine,
    postgres_database: Database,
    tmp_path: Path,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(listener, "HEARTBEAT", heartbeat)
    store = AssetStore(tmp_path / "assets", engine=pooled)
    with Relay(pooled), Runner(pooled, store, only(), poll_interval=0.05, concurrency=8) as runner:
        jobs = [create(engine) for engine in (pooled, postgres_database.engine) * 50]
        jobs += [runner.submit("acme", job_type="note") for _ in range(50)]
        recorder.wait(lambda types: types.count("done") == 150, 60)
        others = [cancelled(engine) for engine in (pooled, postgres_database.engine) * 10]
        recorder.wait(lambda types: types.count("cancelled") == 20, 60)
        if heartbeat < 1:
            feed = jobkit.events.relay.running_feed(pooled)
            assert feed is not None
            mine = feed._listener
            assert mine is not None
            until(lambda: mine.link._connection is None, "the connection to be given back", 60)
            last = create(postgres_database.engine)
            recorder.wait(lambda _: recorder.types(last.id)[-1:] == ["done"], 60)
            jobs.append(last)
    told = Counter((event.job_id, event.seq) for event in recorder.events)
    assert told == Counter([(job.id, seq) for job in jobs for seq in (1, 2, 3)]) + Counter(
        [(job.id, seq) for job in others for seq in (1, 2)]
    )
    assert violations(postgres_database.engine, tmp_path / "assets") == []
    assert [record.message for record in caplog.records if record.levelno >= 30] == []
