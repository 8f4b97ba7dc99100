"""The settings of a runner: where it works, how much at a time, how long it waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO
from uuid import UUID

import sqlalchemy as sa

from jobkit.assets.store import AssetStore
from jobkit.base.clock import Clock
from jobkit.base.loops import LoopThread
from jobkit.db.connections import SharedConnection
from jobkit.errors import AssetNotFound
from jobkit.rendering.context import RenderEnvironment
from jobkit.rendering.renderers import Renderers


@dataclass(frozen=True, slots=True)
class Settings:
    """As the arguments of ``Runner``; times in seconds."""

    engine: sa.Engine
    assets: AssetStore
    renderers: Renderers
    concurrency: int
    lease: float
    poll_interval: float
    db_timeout: float
    clock: Clock

    def environment(self, shared: SharedConnection, progressed: Callable[[], None]) -> RenderEnvironment:
        """What surrounds the attempts of one pipeline, which open assets by ``shared``."""
        assets = self.assets

        def open_asset(company_id: str, asset_id: UUID | str) -> BinaryIO:
            with shared.use() as connection:
                asset = assets.get_by_id(connection, asset_id, company_id=company_id)
            if asset is None:
                raise AssetNotFound(f"no asset {asset_id}")
            return assets.open(asset)

        made = self.renderers
        return RenderEnvironment(
            assets, LoopThread(), open_asset, made.services, progressed, self.lease, made.around, made.describe_error
        )
