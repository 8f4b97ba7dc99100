"""collect_garbage against create and finish, against storages that refuse, against other sweeps, among many keys."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit import AssetNotFound, AssetStore, ConfigurationError, GarbageReport
from jobkit.assets import intents as sweep
from jobkit.assets.intents import GarbageCollector
from jobkit.base.clock import utcnow
from jobkit.base.ids import new_id
from jobkit.db.dialects import statements_for
from jobkit.storage.local import LocalStorage
from jobkit.tables import asset_intents, assets
from tests.support.databases import Database
from tests.support.files import COMPANY, intents, objects, put, rows
from tests.support.sweeping import DAY, age, collect, counts, intend

# --- against create and finish


def test_create_after_the_sweep_is_told_so_and_makes_no_row(disk: AssetStore, engine: sa.Engine) -> None:
    stored = put(disk)
    collect(disk)
    with pytest.raises(AssetNotFound, match="swept"), Session(engine) as session, session.begin():
        disk.create(session, COMPANY, stored, source_task_id=None)
    assert rows(engine) == []


def test_an_object_that_was_deleted_gets_no_second_row_though_it_was_never_recorded(
    tmp_path: Path, engine: sa.Engine
) -> None:
    store = AssetStore(tmp_path / "assets")
    stored = put(store)
    with Session(engine) as session, session.begin():
        store.delete(session, store.create(session, COMPANY, stored, source_task_id=None))
    with pytest.raises(AssetNotFound), Session(engine) as session, session.begin():
        store.create(session, COMPANY, stored, source_task_id=None)
    assert collect(store, engine=engine).deleted == 1
    assert collect(store, engine=engine).settled == 1
    with pytest.raises(AssetNotFound), Session(engine) as session, session.begin():  # nothing is recorded any more
        store.create(session, COMPANY, stored, source_task_id=None)


def test_a_job_whose_file_is_swept_fails_with_that_message_and_what_it_stores_late_goes_too(
    disk: AssetStore, engine: sa.Engine, tmp_path: Path, create: Callable[..., jobkit.Job], monkeypatch: Any
) -> None:
    publish = LocalStorage.publish

    def swept_first(storage: LocalStorage, *args: Any) -> Any:
        collect(disk)
        return publish(storage, *args)

    monkeypatch.setattr(LocalStorage, "publish", swept_first)
    job = create("note")
    renderers = jobkit.Renderers(default=lambda ctx: jobkit.Rendered("a.txt", "text/plain", b"x"))
    jobkit.Runner(engine, disk, renderers).run_until_idle(timeout=60)
    with engine.connect() as connection:
        found = jobkit.JobStore(connection).get_by_id(job.id)
    assert found is not None
    assert (found.status, found.result_asset_id) == ("failed", None)
    assert "the sweep was faster" in (found.error_message or "")
    assert rows(engine) == []
    assert len(objects((tmp_path / "assets").as_uri())) == 1
    collect(disk)
    assert (objects((tmp_path / "assets").as_uri()), intents(engine)) == ({}, {})


def test_a_row_that_is_not_committed_yet_keeps_its_object_and_the_sweep_does_not_wait_for_it(
    disk: AssetStore, postgres_database: Database
) -> None:
    disk.engine = engine = postgres_database.engine
    stored, other = put(disk), put(disk)
    with Session(engine) as session, session.begin():
        asset = disk.create(session, COMPANY, stored, source_task_id=None)
        assert collect(disk).abandoned == 1
    assert intents(engine) == {other.object_key: "collected"}
    disk.verify(asset)


# --- trouble


class Broken:
    """A storage that does not let some keys go."""

    def __init__(self, monkeypatch: Any, keys: set[str], error: BaseException) -> None:
        self.keys, self.removed = keys, []
        remove = LocalStorage.remove

        def call(storage: LocalStorage, key: str) -> None:
            self.removed.append(key)
            if key in self.keys:
                raise error
            remove(storage, key)

        monkeypatch.setattr(LocalStorage, "remove", call)


@pytest.mark.parametrize("error", [PermissionError("no\0t yours"), asyncio.CancelledError()])
def test_an_object_that_cannot_be_removed_is_tried_again_later_and_the_others_go(
    error: BaseException, disk: AssetStore, engine: sa.Engine, monkeypatch: Any
) -> None:
    stuck, second = put(disk), put(disk)
    broken = Broken(monkeypatch, {stuck.object_key}, error)
    pauses = []
    age(engine, DAY)
    for failures in range(1, 4):
        assert counts(collect(disk, DAY)) == ((1, 0, 0, 1) if failures == 1 else (0, 0, failures == 2, 1))
        with engine.connect() as connection:
            found = connection.execute(
                sa.select(asset_intents).where(asset_intents.c.object_key == stuck.object_key)
            ).one()
        assert (found.state, found.attempts) == ("tombstone", failures)
        assert found.last_error == ("no�t yours" if str(error) else "CancelledError")
        pauses.append((found.not_before - utcnow()).total_seconds())
        assert counts(collect(disk, DAY)) == (0, 0, 0, 0)
        age(engine, DAY)
    assert pauses == pytest.approx([60, 120, 240], abs=15)
    broken.keys.clear()
    assert counts(collect(disk)) == (0, 1, 0, 0)
    assert counts(collect(disk)) == (0, 0, 1, 0)
    assert intents(engine) == {}
    assert second.object_key in broken.removed


def test_a_second_visit_that_fails_is_not_the_last(disk: AssetStore, engine: sa.Engine, monkeypatch: Any) -> None:
    stored = put(disk)
    collect(disk)
    broken = Broken(monkeypatch, {stored.object_key}, OSError("away"))
    assert counts(collect(disk)) == (0, 0, 0, 1)
    assert intents(engine) == {stored.object_key: "tombstone"}
    broken.keys.clear()
    age(engine, DAY)
    assert [counts(collect(disk)) for _ in range(2)] == [(0, 1, 0, 0), (0, 0, 1, 0)]


def test_no_connection_is_held_while_objects_are_removed(disk: AssetStore, engine: sa.Engine, monkeypatch: Any) -> None:
    put(disk)
    held = []
    monkeypatch.setattr(LocalStorage, "remove", lambda *_: held.append(engine.pool.checkedout()))  # type: ignore[attr-defined]
    collect(disk)
    collect(disk)
    assert held == [0, 0]


def test_every_key_goes_in_one_call_however_small_the_batches_and_equal_the_times(
    disk: AssetStore, engine: sa.Engine, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sweep, "BATCH", 3)
    with engine.begin() as connection:
        row = {"company_id": COMPANY, "provider": "local_disk", "not_before": utcnow() - DAY}
        states = ("pending", "tombstone", "collected")
        given = [
            row | {"id": new_id(), "object_key": f"acme/x/{n}-{s}.txt", "state": s} for n in range(7) for s in states
        ]
        connection.execute(asset_intents.insert(), given)
    assert counts(disk.collect_garbage()) == counts(collect(disk, DAY)) == (7, 7, 7, 0)
    assert counts(collect(disk)) == (0, 0, 0, 0)
    age(engine, DAY)
    assert counts(collect(disk)) == (0, 0, 14, 0)


def test_two_sweeps_that_look_at_the_same_keys_remove_each_once(
    disk: AssetStore, engine: sa.Engine, monkeypatch: Any
) -> None:
    mine = [put(disk).object_key for _ in range(3)]
    broken = Broken(monkeypatch, set(), OSError())
    statements = statements_for(engine)
    real = type(statements).claim_intents
    others: list[GarbageReport] = []

    def claim(self: Any, connection: sa.Connection, keys: Any, **options: Any) -> Any:
        if not others:
            others.append(GarbageReport(False, 0, 0, 0, 0, 0, ()))
            others.append(GarbageCollector(engine, disk.storage, older_than=0, quarantine=60).run())
        return real(self, connection, keys, **options)

    monkeypatch.setattr(type(statements), "claim_intents", claim)
    assert counts(collect(disk)) == (0, 0, 0, 0)
    assert counts(others[1]) == (3, 0, 0, 0)
    assert sorted(broken.removed) == sorted(mine)


def test_a_sweep_that_was_overtaken_forgets_no_key_but_its_own(
    tmp_path: Path, sqlite_database: Database, monkeypatch: Any
) -> None:
    """SQLite gives a new record the row id of the last deleted one."""
    engine = sqlite_database.engine
    disk = AssetStore(tmp_path / "assets", engine=engine)
    put(disk)
    collect(disk)
    remove, new = LocalStorage.remove, []

    def overtaken(storage: LocalStorage, key: str) -> None:
        if not new:
            new.append(None)
            age(engine, DAY)
            assert collect(disk).settled == 1
            new.append(put(disk))
        remove(storage, key)

    monkeypatch.setattr(LocalStorage, "remove", overtaken)
    GarbageCollector(engine, disk.storage, older_than=3600).run()
    assert intents(engine) == {new[1].object_key: "pending"}
    with Session(engine) as session, session.begin():
        disk.verify(disk.create(session, COMPANY, new[1], source_task_id=None))


# --- what it needs


def test_a_store_without_an_engine_needs_one(tmp_path: Path, engine: sa.Engine) -> None:
    store = AssetStore(tmp_path / "assets")
    with pytest.raises(ConfigurationError, match="engine="):
        store.collect_garbage()
    assert counts(store.collect_garbage(engine=engine)) == (0, 0, 0, 0)
    with pytest.raises(ConfigurationError, match="synchronous Engine"):
        store.collect_garbage(engine=object())  # type: ignore[arg-type]


def test_a_sweep_within_an_sqlite_transaction_that_has_written_says_so(
    tmp_path: Path, sqlite_database: Database
) -> None:
    store = AssetStore(tmp_path / "assets", engine=sqlite_database.engine)
    with Session(sqlite_database.engine) as session, session.begin():
        jobkit.JobStore(session).create(COMPANY, job_type="note")
        with pytest.raises(ConfigurationError, match="outside"):
            collect(store)


@pytest.mark.parametrize("older_than", [timedelta(seconds=-1), float("nan"), float("inf")])
def test_a_grace_that_is_no_duration_is_a_value_error(disk: AssetStore, older_than: Any) -> None:
    with pytest.raises(ValueError, match="older_than"):
        disk.collect_garbage(older_than=older_than)


@pytest.mark.parametrize("gathered", [True, False], ids=["statistics", "no statistics"])
def test_a_sweep_reads_only_what_is_due(gathered: bool, disk: AssetStore, engine: sa.Engine, monkeypatch: Any) -> None:
    """Among 20,000 records and rows that are not: by index, also where the database has no statistics yet."""
    with engine.begin() as connection:
        asset = {"company_id": COMPANY, "provider": "local_disk", "content_type": "a/b", "byte_size": 1, "sha256": "x"}
        keys = [f"acme/x/{n}.txt" for n in range(20_000)]
        connection.execute(assets.insert(), [asset | {"id": new_id(), "object_key": f"{key}.live"} for key in keys])
        record = {"company_id": COMPANY, "provider": "local_disk", "not_before": utcnow() + 30 * DAY}
        connection.execute(asset_intents.insert(), [record | {"id": new_id(), "object_key": key} for key in keys])
    if gathered:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE" if engine.dialect.name == "sqlite" else "VACUUM ANALYZE")
    plans: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute", retval=True)
    def explain(connection: sa.Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> Any:
        if "asset_intents" in statement and "EXPLAIN" not in statement:
            prefix = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
            with engine.connect() as other:
                found = other.exec_driver_sql(prefix + statement, parameters).all()
            plans.append("\n".join(str(row[-1]) for row in found))
        return statement, parameters

    due, stuck = "acme/x/due.txt", "acme/x/stuck.txt"
    for key in (due, stuck):
        intend(engine, object_key=key, state="collected")
    Broken(monkeypatch, {stuck}, OSError("away"))
    plans.clear()
    assert counts(collect(disk, DAY)) == (0, 0, 1, 1)
    look, claim, postpone, drop, *looks = plans
    assert len(looks) == 2
    for plan in (claim, postpone, drop):
        assert "provider_object_key" in plan or "sqlite_autoindex_asset_intents_2" in plan, plan
        assert "Join Filter" not in plan, plan
    for plan in (look, claim):
        assert "SCAN i" not in plan, plan
        assert "assets_company_object_key_uq" in plan or not gathered, plan
    for plan in (look, *looks):
        assert "asset_intents_not_before_idx" in plan, plan


def test_memory_stays_flat_however_many_keys_are_due(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "BATCH", 50)
    store = AssetStore(f"memory://{new_id()}", engine=engine)  # pathlib keeps the parts of all paths that it ever saw
    count, folders = 5_000, "/".join(letter * 200 for letter in "xyz")
    record = {"company_id": COMPANY, "provider": "memory", "not_before": utcnow() - DAY}
    with engine.begin() as connection:
        keys = (f"acme/{folders}/{number}.txt" for number in range(count))
        connection.execute(asset_intents.insert(), [record | {"id": new_id(), "object_key": key} for key in keys])
    collect(store, 3 * DAY)  # what is compiled at first use
    tracemalloc.start()
    try:
        for dry_run in (True, False):
            assert collect(store, DAY, dry_run=dry_run).abandoned == count
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
