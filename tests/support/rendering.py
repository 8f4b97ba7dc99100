"""Run one renderer as a runner would, without a database, with assets to open and inputs of any size."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

import jobkit
from jobkit.base.ids import new_id
from jobkit.base.loops import LoopThread
from jobkit.jobs.claims import Claim
from jobkit.rendering.attempt import Attempt
from jobkit.rendering.context import RenderEnvironment


def attempt(
    renderer: Callable[[jobkit.RenderContext], Any],
    input: Any,
    *,
    assets: Mapping[str, bytes | Path] | None = None,
    check: Callable[[], None] | None = None,
) -> list[jobkit.Rendered]:
    """What ``renderer`` makes of ``input``; ``check`` is what ``ctx.check()`` calls."""

    def open_asset(company_id: str, asset_id: UUID | str) -> BinaryIO:
        found = (assets or {}).get(str(asset_id))
        if found is None:
            raise jobkit.AssetNotFound(f"no asset {asset_id}")
        return io.BytesIO(found) if isinstance(found, bytes) else open(found, "rb")

    def checked(ctx: jobkit.RenderContext) -> Any:
        if check is not None:
            ctx.check = check  # type: ignore[method-assign]
        return renderer(ctx)

    renderers = jobkit.Renderers(default=checked)
    with tempfile.TemporaryDirectory() as folder:
        run = Attempt(
            Claim(new_id(), "acme", "kind", input, None, 1, 1),
            renderers.find("kind"),
            RenderEnvironment(jobkit.AssetStore(folder), LoopThread(), open_asset),
        )
        run.render()
        assert not list(Path(folder).rglob("work-*")), "the working folder is left"
        return [jobkit.Rendered(d.filename or "", d.content_type, d.spool.path.read_bytes()) for d in run.drafts]
