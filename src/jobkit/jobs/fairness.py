"""Whose jobs to claim next: within a company by priority, between companies in turn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime

import sqlalchemy as sa

from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import ClaimedRow, ClaimTerms, QueuedJob

# While jobs wait, the companies they belong to are asked for this often, in seconds, and this many of them.
REFRESH = 1.0
COMPANIES = 1_000
# How often jobs whose ``run_at`` has come are looked for, in seconds; how many are kept in mind; and among how many of
# each priority they are chosen: a company with more due jobs than that may hold up those behind it.
DUE_REFRESH = 0.5
DUE = 1_000
DUE_WINDOW = 20_000
# How many times more jobs than it wants a claim names, so that others who take some of them leave it enough.
SPARE = 4


class RoundRobin:
    """Claims jobs for one runner, so that a company with a long queue does not hold up the others.

    As long as all that waits is claimed at once, whose it is does not matter, and one plain statement does. A claim
    that was filled shows that more waits: then the companies are listed, and each next claim goes on in their round.
    Jobs whose ``run_at`` has come have an index of their own; while there are any, the two kinds are merged here.
    Used by one thread.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._statements = statements_for(engine)
        self._companies: list[str] = []
        self._due: list[QueuedJob] = []
        self._next = 0
        self._listed = self._looked = float("-inf")
        self._waiting = False

    def claim(self, connection: sa.Connection, terms: ClaimTerms, *, check_scheduled: bool) -> list[ClaimedRow]:
        """Up to ``terms.limit`` jobs that may run now, in the caller's transaction. ``thorough``: those whose
        ``run_at`` has come are looked for now, else every half second.
        """
        self.look(connection, terms.now, check_scheduled=check_scheduled)
        return self._claim_merged(connection, terms) if self._due else self._claim_queued(connection, terms)

    def look(self, connection: sa.Connection, now: datetime, *, check_scheduled: bool) -> None:
        """Look for jobs whose ``run_at`` has come, as a ``claim`` at this moment would do first."""
        looking = time.monotonic()
        if looking - self._looked < (REFRESH if self._due else 0.0 if check_scheduled else DUE_REFRESH):
            return
        self._due = self._statements.due(connection, window=DUE_WINDOW, limit=DUE, now=now)
        # A list that was cut off is followed by the next as soon as it is used up.
        self._looked = float("-inf") if len(self._due) == DUE else looking

    @property
    def waiting(self) -> bool:
        """Whether more jobs wait than the last claim took. If not, the next one, after a ``look``, is one statement."""
        return self._waiting or bool(self._due)

    def _claim_queued(self, connection: sa.Connection, terms: ClaimTerms) -> list[ClaimedRow]:
        found: list[ClaimedRow] = []
        if self._waiting:
            self._list(connection)
        while self._waiting and len(self._companies) > 1 and len(found) < terms.limit:
            rest = terms._replace(limit=terms.limit - len(found))
            turn, each = self._turn(self._companies, rest.limit)
            some = self._statements.claim_of(connection, turn, each, terms=rest)
            if len(some) < rest.limit:
                self._leave_out(turn, each, some)
            found += some
        if len(found) < terms.limit:
            found += self._statements.claim(connection, terms=terms._replace(limit=terms.limit - len(found)))
            self._waiting = len(found) == terms.limit
        return found

    def _claim_merged(self, connection: sa.Connection, terms: ClaimTerms) -> list[ClaimedRow]:
        found: list[ClaimedRow] = []
        self._list(connection)
        while self._due and len(found) < terms.limit:
            rest = terms._replace(limit=terms.limit - len(found))
            names = list(dict.fromkeys([*self._companies, *(job.company_id for job in self._due)]))
            turn, each = self._turn(names, rest.limit)
            first = self._statements.first_queued(connection, turn, each * SPARE)
            chosen = _in_turn([*first, *(job for job in self._due if job.company_id in turn)], each * SPARE)
            some = self._statements.claim_these(connection, [job.job_id for job in chosen], terms=rest)
            # Of those that were named and not taken, others have some, unless the limit was reached first.
            gone = {one.job_id for one in some} if len(some) == rest.limit else {job.job_id for job in chosen}
            self._due = [job for job in self._due if job.job_id not in gone]
            if len(some) < rest.limit:
                self._leave_out(turn, each, some)
            found += some
        self._waiting = True
        if len(found) < terms.limit:
            found += self._claim_queued(connection, terms._replace(limit=terms.limit - len(found)))
        return found

    def _leave_out(self, turn: list[str], each: int, taken: list[ClaimedRow]) -> None:
        """Take the companies that could not give their share off the list, until they are listed again."""
        given = Counter(one.company_id for one in taken)
        spent = {company for company in turn if given[company] < each}
        before = sum(company in spent for company in self._companies[: self._next])
        self._companies = [company for company in self._companies if company not in spent]
        self._next = max(0, self._next - before)

    def _list(self, connection: sa.Connection) -> None:
        if time.monotonic() - self._listed >= REFRESH:
            self._companies = self._statements.companies(connection, limit=COMPANIES)
            self._listed = time.monotonic()

    def _turn(self, companies: list[str], limit: int) -> tuple[list[str], int]:
        """The companies whose turn it is, and how many jobs of each make ``limit``."""
        count = min(limit, len(companies))
        turn = [companies[(self._next + place) % len(companies)] for place in range(count)]
        self._next = (self._next + count) % len(companies)
        return turn, -(-limit // count)


def _in_turn(jobs: Iterable[QueuedJob], each: int) -> list[QueuedJob]:
    """The first ``each`` of every company, by priority, then time; the firsts of all companies before the seconds."""
    by_company: dict[str, list[QueuedJob]] = {}
    for job in sorted(jobs, key=lambda job: (-job.priority, job.at, job.job_id)):
        by_company.setdefault(job.company_id, []).append(job)
    ranked = [(rank, job) for own in by_company.values() for rank, job in enumerate(own[:each])]
    return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]
