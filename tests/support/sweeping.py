"""Sweeps as a test asks for them, and records made older or by hand."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import Asset, AssetStore, GarbageReport
from jobkit.base.clock import utcnow
from jobkit.base.ids import new_id
from jobkit.tables import asset_intents
from tests.support.files import COMPANY

NOW = timedelta(0)
DAY = timedelta(days=1)


def collect(store: AssetStore, older_than: timedelta = NOW, **options: Any) -> GarbageReport:
    return store.collect_garbage(older_than=older_than, **{"dry_run": False, **options})


def counts(report: GarbageReport) -> tuple[int, int, int, int]:
    return report.abandoned, report.deleted, report.settled, report.failed


def age(engine: sa.Engine, by: timedelta) -> None:
    """Let every record be so much older."""
    with engine.begin() as connection:
        for row in connection.execute(sa.select(asset_intents)).all():
            connection.execute(
                asset_intents.update().where(asset_intents.c.id == row.id).values(not_before=row.not_before - by)
            )


def delete(store: AssetStore, engine: sa.Engine, asset: Asset) -> None:
    with Session(engine) as session, session.begin():
        store.delete(session, asset)


def intend(engine: sa.Engine, **values: Any) -> None:
    given = {"id": new_id(), "company_id": COMPANY, "provider": "local_disk", "state": "pending", **values}
    with engine.begin() as connection:
        connection.execute(asset_intents.insert(), {"not_before": utcnow() - DAY, **given})
