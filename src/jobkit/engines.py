"""Which engines jobkit's own threads can use."""

from __future__ import annotations

import sqlalchemy as sa

from jobkit.errors import ConfigurationError
from jobkit.sqlite import require_configured

NEEDED = "a Runner, Relay or AssetStore needs a synchronous Engine, not"


def sync_engine(engine: object) -> sa.Engine:
    """``engine`` when jobkit's threads can use it; ``ConfigurationError`` with what helps otherwise."""
    if hasattr(engine, "sync_engine") or (isinstance(engine, sa.Engine) and engine.dialect.is_async):
        raise ConfigurationError(
            f"{NEEDED} AsyncEngine: make one with create_engine(), on the same URL; postgresql+psycopg:// serves both "
            "kinds"
        )
    if not isinstance(engine, sa.Engine):
        raise ConfigurationError(f"{NEEDED} {type(engine).__name__}")
    require_configured(engine)
    return engine
