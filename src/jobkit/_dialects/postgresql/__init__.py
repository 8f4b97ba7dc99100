"""PostgreSQL 14 and newer: every step is one statement, because a round trip costs more than anything in it."""

from __future__ import annotations

from jobkit._dialects.postgresql.claims import Claims
from jobkit._dialects.postgresql.events import Events
from jobkit._dialects.postgresql.intents import Intents
from jobkit._dialects.postgresql.jobs import Jobs
from jobkit._dialects.postgresql.prune import Prune
from jobkit._dialects.postgresql.queue import Queue


class Postgresql(Jobs, Queue, Claims, Intents, Events, Prune):
    """``jobkit._dialects.base.Statements`` for PostgreSQL."""
