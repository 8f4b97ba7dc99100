"""PostgreSQL 14 and newer: every step is one statement, because a round trip costs more than anything in it."""

from __future__ import annotations

from jobkit.db.dialects.base import Dialect
from jobkit.db.dialects.postgresql.events import Events
from jobkit.db.dialects.postgresql.intents import Intents
from jobkit.db.dialects.postgresql.jobs import Jobs
from jobkit.db.dialects.postgresql.prune import Prune


class Postgresql(Jobs, Events, Intents, Prune, Dialect):
    """PostgreSQL's own statements."""
