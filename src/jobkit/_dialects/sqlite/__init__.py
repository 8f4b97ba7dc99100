"""SQLite 3.35 and newer: one writer at a time, so a step is a few statements under ``BEGIN IMMEDIATE``, the first of
them a write.
"""

from __future__ import annotations

from jobkit._dialects.sqlite.claims import Claims
from jobkit._dialects.sqlite.events import Events
from jobkit._dialects.sqlite.intents import Intents
from jobkit._dialects.sqlite.jobs import Jobs
from jobkit._dialects.sqlite.prune import Prune
from jobkit._dialects.sqlite.queue import Queue


class Sqlite(Jobs, Queue, Claims, Intents, Events, Prune):
    """``jobkit._dialects.base.Statements`` for SQLite."""
