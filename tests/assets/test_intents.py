"""collect_garbage: what goes, what stays, in which order; by the records alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import AssetStore, GarbageReport
from jobkit.base.ids import new_id
from jobkit.db.dialects import statements_for
from jobkit.tables import assets as rows_of_assets
from tests.support.files import COMPANY, intents, keep, objects, put, rows
from tests.support.sweeping import DAY, NOW, age, collect, counts, delete, intend

# --- what goes


def test_an_abandoned_object_goes_at_the_first_visit_and_its_record_at_the_second(
    assets: AssetStore, engine: sa.Engine, storage_url: str
) -> None:
    kept, lost = keep(assets, engine, b"kept"), put(assets, b"lost")
    assert counts(collect(assets)) == (1, 0, 0, 0)
    assert (objects(storage_url), intents(engine)) == ({kept.object_key: b"kept"}, {lost.object_key: "collected"})
    assert counts(collect(assets)) == (0, 0, 1, 0)
    assert (objects(storage_url), intents(engine)) == ({kept.object_key: b"kept"}, {})
    assert counts(collect(assets)) == (0, 0, 0, 0)


def test_a_deleted_object_goes_at_the_next_sweep_however_young_and_its_record_after_the_quarantine(
    disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    asset = keep(disk, engine)
    delete(disk, engine, asset)
    assert counts(collect(disk, DAY)) == (0, 1, 0, 0)
    assert objects((tmp_path / "assets").as_uri()) == {}
    assert counts(collect(disk, DAY)) == (0, 0, 0, 0)
    assert intents(engine) == {asset.object_key: "collected"}
    age(engine, DAY)
    assert counts(collect(disk, DAY)) == (0, 0, 1, 0)
    assert intents(engine) == {}


@pytest.mark.parametrize(
    ("old", "older_than", "goes"),
    [
        (0, timedelta(hours=24), False),
        (0, timedelta(0), True),
        (23.9, timedelta(hours=24), False),
        (24, timedelta(hours=24), True),
        (47.9, timedelta(hours=48), False),
        (48, timedelta(hours=48), True),
        (0.9, timedelta(hours=1), False),
        (1, 3600, True),
        (1000, timedelta.max, False),
    ],
)
def test_a_record_without_a_row_goes_once_it_is_older_than_that(
    old: float, older_than: timedelta, goes: bool, disk: AssetStore, engine: sa.Engine
) -> None:
    put(disk)
    age(engine, timedelta(hours=old))
    assert collect(disk, older_than, dry_run=True).abandoned == goes
    assert collect(disk, older_than).abandoned == goes
    assert list(intents(engine).values()) == ["collected" if goes else "pending"]


def test_an_object_that_is_stored_after_the_first_visit_goes_at_the_second(
    disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    stored = put(disk)
    collect(disk)
    late = tmp_path / "assets" / stored.object_key
    late.write_bytes(b"late")
    assert intents(engine) == {stored.object_key: "collected"}
    assert collect(disk).settled == 1
    assert not late.exists()
    assert intents(engine) == {}


def test_a_key_in_quarantine_is_not_visited(disk: AssetStore, engine: sa.Engine, tmp_path: Path) -> None:
    stored = put(disk)
    age(engine, timedelta(hours=2))
    assert collect(disk, timedelta(hours=1)).abandoned == 1
    (tmp_path / "assets" / stored.object_key).write_bytes(b"late")
    assert counts(collect(disk, timedelta(hours=1))) == (0, 0, 0, 0)
    assert intents(engine) == {stored.object_key: "collected"}
    age(engine, timedelta(hours=1))
    assert collect(disk, timedelta(hours=1)).settled == 1
    assert objects((tmp_path / "assets").as_uri()) == {}


# --- what stays


def test_a_dry_run_tells_what_would_go_and_changes_nothing(
    assets: AssetStore, engine: sa.Engine, storage_url: str
) -> None:
    collected = put(assets, b"before")
    collect(assets)
    keep(assets, engine, b"kept")
    lost, gone = put(assets, b"123"), keep(assets, engine, b"4567")
    delete(assets, engine, gone)
    before = (intents(engine), objects(storage_url))
    told = assets.collect_garbage(older_than=NOW)
    assert (intents(engine), objects(storage_url)) == before
    size = 7 if storage_url.startswith("file") else None
    assert told == GarbageReport(True, 1, 1, 1, 0, size, (gone.object_key, lost.object_key))
    done = collect(assets)
    assert done == GarbageReport(False, 1, 1, 1, 0, size, (gone.object_key, lost.object_key))
    assert collected.object_key not in intents(engine)


def test_the_sample_is_ten_keys_at_most(disk: AssetStore, engine: sa.Engine) -> None:
    for _ in range(12):
        put(disk)
    assert len(set(disk.collect_garbage(older_than=NOW).sample)) == 10


@pytest.mark.parametrize("state", ["pending", "tombstone", "collected"])
def test_the_object_of_a_live_row_is_never_touched_whatever_is_recorded(
    state: str, disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    asset = keep(disk, engine, b"precious")
    intend(engine, object_key=asset.object_key, state=state)
    assert counts(disk.collect_garbage(older_than=NOW)) == (0, 0, 0, 0)
    assert counts(collect(disk)) == (0, 0, 0, 0)
    assert intents(engine) == {asset.object_key: state}
    disk.verify(asset)


def test_the_claim_sees_a_row_that_came_after_the_look(disk: AssetStore, engine: sa.Engine, monkeypatch: Any) -> None:
    """The record is written by hand: nothing of jobkit leaves it beside a row."""
    stored = put(AssetStore(disk.storage.root))
    intend(engine, object_key=stored.object_key)
    statements = statements_for(engine)
    real = type(statements).claim_intents
    created = []

    def claim(self: Any, connection: sa.Connection, keys: Any, **options: Any) -> Any:
        if not created:
            row = {n: getattr(stored, n) for n in ("provider", "object_key", "content_type", "byte_size", "sha256")}
            with engine.begin() as other:
                other.execute(rows_of_assets.insert(), {"id": new_id(), "company_id": COMPANY, **row})
            created.append(row)
        return real(self, connection, keys, **options)

    monkeypatch.setattr(type(statements), "claim_intents", claim)
    assert counts(collect(disk)) == (0, 0, 0, 0)
    assert created
    disk.verify(rows(engine)[0])


def test_another_stores_objects_are_left(disk: AssetStore, engine: sa.Engine, tmp_path: Path) -> None:
    other = AssetStore(tmp_path / "other", engine=engine, provider="archive")
    theirs, ours = put(other), put(disk)
    assert collect(disk).abandoned == 1
    assert intents(engine) == {theirs.object_key: "pending", ours.object_key: "collected"}
    assert list(objects((tmp_path / "other").as_uri())) == [theirs.object_key]


@pytest.mark.parametrize("key", ["globex/generated/a.txt", "acme/../globex/a.txt", "acme/generated/*"])
def test_a_key_that_is_not_the_companys_is_not_removed(key: str, disk: AssetStore, engine: sa.Engine) -> None:
    victim = keep(disk, engine, company="globex")
    intend(engine, object_key=key)
    assert counts(disk.collect_garbage()) == counts(collect(disk)) == (0, 0, 0, 1)
    assert intents(engine) == {key: "tombstone"}
    disk.verify(victim)


# --- what attachment libraries lose: savepoints, rollbacks, sessions that just end


def outer_insert_inner_savepoint_rolled_back(store: AssetStore, session: Session, stored: Any, old: Any) -> None:
    store.create(session, COMPANY, stored, source_task_id=None)
    savepoint = session.begin_nested()
    session.execute(rows_of_assets.update().values(original_filename="b.txt"))
    savepoint.rollback()
    session.commit()


def insert_in_a_released_savepoint_outer_rollback(store: AssetStore, session: Session, stored: Any, old: Any) -> None:
    with session.begin_nested():
        store.create(session, COMPANY, stored, source_task_id=None)
    session.rollback()


def insert_in_a_rolled_back_savepoint_outer_commit(store: AssetStore, session: Session, stored: Any, old: Any) -> None:
    savepoint = session.begin_nested()
    store.create(session, COMPANY, stored, source_task_id=None)
    savepoint.rollback()
    session.commit()


def delete_in_a_released_savepoint_outer_rollback(store: AssetStore, session: Session, stored: Any, old: Any) -> None:
    with session.begin_nested():
        store.delete(session, old)
    session.rollback()


def delete_in_a_rolled_back_savepoint_outer_commit(store: AssetStore, session: Session, stored: Any, old: Any) -> None:
    savepoint = session.begin_nested()
    store.delete(session, old)
    savepoint.rollback()
    session.commit()


def closed_without_commit(store: AssetStore, session: Session, stored: Any, old: Any) -> None:
    store.create(session, COMPANY, stored, source_task_id=None)
    store.delete(session, old)
    session.close()


def inserted_and_deleted_in_one_transaction(store: AssetStore, session: Session, stored: Any, old: Any) -> None:
    store.delete(session, store.create(session, COMPANY, stored, source_task_id=None))
    session.commit()


def replaced(store: AssetStore, session: Session, stored: Any, old: Any) -> None:
    store.create(session, COMPANY, stored, source_task_id=None)
    store.delete(session, old)
    session.commit()


def a_row_that_the_host_deletes_with_a_statement_of_its_own(
    store: AssetStore, session: Session, stored: Any, old: Any
) -> None:
    store.create(session, COMPANY, stored, source_task_id=None)
    session.execute(rows_of_assets.delete().where(rows_of_assets.c.object_key == stored.object_key))
    session.rollback()


@pytest.mark.parametrize(
    ("story", "left"),
    [
        (outer_insert_inner_savepoint_rolled_back, {b"old", b"new"}),
        (insert_in_a_released_savepoint_outer_rollback, {b"old"}),
        (insert_in_a_rolled_back_savepoint_outer_commit, {b"old"}),
        (delete_in_a_released_savepoint_outer_rollback, {b"old"}),
        (delete_in_a_rolled_back_savepoint_outer_commit, {b"old"}),
        (closed_without_commit, {b"old"}),
        (inserted_and_deleted_in_one_transaction, {b"old"}),
        (replaced, {b"new"}),
        (a_row_that_the_host_deletes_with_a_statement_of_its_own, {b"old"}),
    ],
)
def test_what_is_committed_is_there_and_nothing_else_after_two_sweeps(
    story: Callable[..., None], left: set[bytes], disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    old, stored = keep(disk, engine, b"old"), put(disk, b"new")
    with Session(engine) as session:
        story(disk, session, stored, old)
    collect(disk)
    collect(disk)
    assert set(objects((tmp_path / "assets").as_uri()).values()) == left
    assert len(rows(engine)) == len(left)
    for asset in rows(engine):
        disk.verify(asset)
    assert intents(engine) == {}
