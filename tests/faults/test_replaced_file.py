"""SQLite's file is replaced or deleted under a running process: it is noticed, and nothing is written any more."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import AssetStore, ConfigurationError, JobStore, Runner
from tests.cli.test_hearing import working
from tests.support.databases import Database
from tests.support.runners import Gate, only, until


def replace(file: Path) -> None:
    """By an older backup, as a restore does."""
    shutil.copy(file, f"{file}.backup")
    os.replace(f"{file}.backup", file)


GONE: dict[str, Callable[[Path], None]] = {"replaced by another file": replace, "deleted": Path.unlink}


@pytest.mark.parametrize("how", GONE)
def test_a_runner_and_a_relay_stop_loudly_and_write_nothing(
    sqlite_database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    engine, file, gate = sqlite_database.engine, Path(sqlite_database.engine.url.database or ""), Gate()
    runner = Runner(engine, AssetStore(tmp_path / "assets", engine=engine), only(gate), lease=1)
    host = engine.connect()  # it has the former file open
    with jobkit.Relay(engine), runner:
        runner.submit("acme", job_type="note")
        gate.entered()
        assert runner.failure is None
        GONE[how](file)
        before = file.read_bytes() if file.exists() else None
        until(lambda: runner.failure, "the end of the runner")
        assert how in (runner.failure or "")
        until(lambda: "no more signals are sent" in caplog.text, "the end of the relay")
        with pytest.raises(ConfigurationError, match=how):
            JobStore(host).create("acme", job_type="note")
        gate.open()
        assert not runner.stop()
    host.close()
    engine.dispose()
    assert (file.read_bytes() if file.exists() else None) == before
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert [one for one in told if one.startswith("the runner has stopped")]


def test_a_worker_ends(sqlite_database: Database, tmp_path: Path) -> None:
    with working(tmp_path, sqlite_database.url) as worker:
        worker.working()
        Path(sqlite_database.engine.url.database or "").unlink()
        assert worker.ended() == 2
        assert "was deleted while it was open" in worker.log.read_text()


def test_a_host_that_makes_its_file_anew_goes_on(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/host.db")
    jobkit.configure_sqlite(engine)
    for _ in range(2):
        jobkit.migrations.upgrade(engine)
        with engine.begin() as connection:
            JobStore(connection).create("acme", job_type="note")
        engine.dispose()
        (tmp_path / "host.db").unlink()
