"""The audit: reads the object of every asset, and reports those that differ from their row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa

from jobkit.assets.store import AssetStore
from jobkit.base.ids import ANY_COMPANY, CompanyScope
from jobkit.base.text import error_message
from jobkit.db.host import in_scope
from jobkit.tables import assets
from jobkit.types import Asset

PAGE = 500
_c = assets.c


@dataclass(frozen=True, slots=True)
class Finding:
    """An asset whose object was read. ``problem``: how it differs from the row, None when it does not."""

    asset: Asset
    problem: str | None


def audit(engine: sa.Engine, store: AssetStore, *, company_id: CompanyScope = ANY_COMPANY) -> Iterator[Finding]:
    """Verify every asset of ``store``, in pages. No connection is held while objects are read."""
    last: Asset | None = None
    while page := _page(engine, store.provider, company_id, last):
        for asset in page:
            try:
                store.verify(asset)
            except Exception as error:  # whatever the storage raises: go on with the other assets
                # Its row may have been deleted since the page was read, and the object collected.
                if _exists(engine, asset):
                    yield Finding(asset, error_message(error))
            else:
                yield Finding(asset, None)
        last = page[-1]


def elsewhere(engine: sa.Engine, store: AssetStore, *, company_id: CompanyScope = ANY_COMPANY) -> dict[str, int]:
    """The number of assets in other storages, by provider: ``store`` cannot read those."""
    others = (_c.provider != store.provider, in_scope(_c.company_id, company_id))
    query = sa.select(_c.provider, sa.func.count()).where(*others).group_by(_c.provider)
    with engine.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query)}


def _page(engine: sa.Engine, provider: str, company_id: CompanyScope, last: Asset | None) -> list[Asset]:
    query = sa.select(assets).where(_c.provider == provider, in_scope(_c.company_id, company_id))
    query = query.order_by(_c.company_id, _c.object_key).limit(PAGE)
    if last is not None:
        query = query.where(sa.tuple_(_c.company_id, _c.object_key) > sa.tuple_(last.company_id, last.object_key))
    with engine.connect() as connection:
        return [Asset(*row) for row in connection.execute(query)]


def _exists(engine: sa.Engine, asset: Asset) -> bool:
    same = (_c.company_id == asset.company_id, _c.object_key == asset.object_key, _c.provider == asset.provider)
    with engine.connect() as connection:
        return connection.execute(sa.select(_c.company_id).where(*same)).first() is not None
