"""SQLite 3.35 and newer: one writer at a time, so a step is a few statements under ``BEGIN IMMEDIATE``, the first of
them a write.
"""

from __future__ import annotations

from jobkit.db.dialects.base import Dialect
from jobkit.db.dialects.sqlite.events import Events
from jobkit.db.dialects.sqlite.intents import Intents
from jobkit.db.dialects.sqlite.jobs import Jobs
from jobkit.db.dialects.sqlite.prune import Prune


class Sqlite(Jobs, Events, Intents, Prune, Dialect):
    """SQLite's own statements."""
