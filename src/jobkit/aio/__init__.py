"""For asynchronous hosts: the stores awaited, inside the host's own ``AsyncSession``, and events as an async iterator.

There is no second implementation: rows go through ``run_sync`` on the session's connection, bytes through a thread.
Needs the extra ``jobkit[asyncio]``. The ``Runner`` and ``Relay`` of such a host take a synchronous engine on the same
database.
"""

from __future__ import annotations

try:
    import greenlet  # noqa: F401
except ImportError as error:
    raise ImportError(
        "jobkit.aio needs greenlet, as SQLAlchemy's asyncio does: pip install 'jobkit[asyncio]'"
    ) from error

from jobkit.aio.events import Subscription, subscribe, watch
from jobkit.aio.stores import AsyncAssetStore, AsyncJobStore

__all__ = ["AsyncAssetStore", "AsyncJobStore", "Subscription", "subscribe", "watch"]
