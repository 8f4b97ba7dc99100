"""The import path that documents name for ``Watcher``; it lives in ``jobkit.events.watch``."""

from jobkit.events.watch import Watcher

__all__ = ["Watcher"]
