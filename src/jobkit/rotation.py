"""Whose jobs to claim next: within a company by priority, between companies in turn."""

from __future__ import annotations

import time

import sqlalchemy as sa

from jobkit._dialects import statements_for
from jobkit._dialects.base import Claimed, Terms

# While jobs wait, the companies they belong to are asked for this often, in seconds, and this many of them.
REFRESH = 1.0
COMPANIES = 1_000
# How often jobs whose ``run_at`` has come are looked for, in seconds; and among how many of each priority.
DUE_REFRESH = 0.5
DUE_WINDOW = 200


class Rotation:
    """Claims jobs for one runner, so that a company with a long queue does not hold up the others.

    As long as all that waits is claimed at once, whose it is does not matter, and one plain statement does. A claim
    that was filled shows that more waits: then the companies are listed, and each next claim goes on in their round.
    Used by one thread.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._statements = statements_for(engine)
        self._companies: list[str] = []
        self._next = 0
        self._listed = self._looked = float("-inf")
        self._waiting = self._due_waiting = False

    def claim(self, connection: sa.Connection, terms: Terms, *, thorough: bool) -> list[Claimed]:
        """Up to ``terms.limit`` jobs that may run now, in the caller's transaction. ``thorough``: those whose
        ``run_at`` has come are looked for now, else every half second.
        """
        due = self._claim_due(connection, terms, thorough)
        terms = terms._replace(limit=terms.limit - len(due))
        return due + self._claim_queued(connection, terms) if terms.limit else due

    def _claim_due(self, connection: sa.Connection, terms: Terms, thorough: bool) -> list[Claimed]:
        now = time.monotonic()
        if not (thorough or self._due_waiting) and now - self._looked < DUE_REFRESH:
            return []
        self._looked = now
        # Half of the slots, when both kinds wait, so that neither holds up the other.
        limit = (terms.limit + 1) // 2 if self._waiting else terms.limit
        found = self._statements.claim_due(connection, window=DUE_WINDOW, terms=terms._replace(limit=limit))
        self._due_waiting = len(found) == limit
        return found

    def _claim_queued(self, connection: sa.Connection, terms: Terms) -> list[Claimed]:
        if self._waiting and time.monotonic() - self._listed >= REFRESH:
            self._companies = self._statements.companies(connection, limit=COMPANIES)
            self._listed = time.monotonic()
        if self._waiting and len(self._companies) > 1:
            return self._claim_in_turn(connection, terms)
        found = self._statements.claim(connection, terms=terms)
        self._waiting = len(found) == terms.limit
        return found

    def _claim_in_turn(self, connection: sa.Connection, terms: Terms) -> list[Claimed]:
        count = min(terms.limit, len(self._companies))
        turn = [self._companies[(self._next + place) % len(self._companies)] for place in range(count)]
        self._next = (self._next + count) % len(self._companies)
        found = self._statements.claim_of(connection, turn, -(-terms.limit // count), terms=terms)
        if not found:  # those on the list have nothing left; the next claim sees who else has
            self._waiting, self._listed = False, float("-inf")
            return self._claim_queued(connection, terms)
        return found

    @property
    def waiting(self) -> bool:
        """Whether more jobs wait than the last claim took."""
        return self._waiting or self._due_waiting
