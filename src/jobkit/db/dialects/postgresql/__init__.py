"""PostgreSQL 14 and newer: every step is one statement, because a round trip costs more than anything in it."""

from __future__ import annotations

from jobkit.db.dialects.postgresql.events import Events
from jobkit.db.dialects.postgresql.intents import Intents
from jobkit.db.dialects.postgresql.jobs import Claims, Jobs, Queue
from jobkit.db.dialects.postgresql.prune import Prune


class Postgresql(Jobs, Queue, Claims, Intents, Events, Prune):
    """``jobkit._dialects.base.Statements`` for PostgreSQL."""
