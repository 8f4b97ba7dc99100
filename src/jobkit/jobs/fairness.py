"""Whose jobs to claim next: within a company by priority, between companies in turn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime

import sqlalchemy as sa

from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import ClaimedRow, ClaimTerms, QueuedJob

# Seconds between two listings of the companies with queued jobs, and the most companies of one.
REFRESH = 1.0
COMPANIES = 1_000
# Seconds between two searches for jobs whose ``run_at`` has come; the most jobs one finds; the most jobs of a priority
# it reads: a company with more due jobs than that may hold up those behind it.
DUE_REFRESH = 0.5
DUE = 1_000
DUE_WINDOW = 20_000
# A claim by id names this many times the jobs it needs: other runners may take some first.
SPARE = 4


class RoundRobin:
    """Claims jobs for one runner, so that a company with a long queue does not hold up the others.

    While a claim takes every queued job, their order does not matter, and one plain statement does. A claim that
    reached its limit shows that more jobs wait: then the companies are listed, and claims take their jobs in turn.
    Jobs whose ``run_at`` has come have an index of their own; while there are any, both kinds are merged here. Used by
    one thread.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._statements = statements_for(engine)
        self._companies: list[str] = []
        self._due: list[QueuedJob] = []
        self._next = 0
        self._listed_at = self._due_at = float("-inf")
        self._more_waiting = False

    def claim(self, connection: sa.Connection, terms: ClaimTerms, *, check_scheduled: bool) -> list[ClaimedRow]:
        """Claim up to ``terms.limit`` jobs that may run now, in the caller's transaction; first ``find_due``."""
        self.find_due(connection, terms.now, check_scheduled=check_scheduled)
        return self._claim_merged(connection, terms) if self._due else self._claim_queued(connection, terms)

    def find_due(self, connection: sa.Connection, now: datetime, *, check_scheduled: bool) -> None:
        """Read the jobs whose ``run_at`` has come: every second while some are known; else now if ``check_scheduled``,
        and every half second if not.
        """
        now_at = time.monotonic()
        if now_at - self._due_at < (REFRESH if self._due else 0.0 if check_scheduled else DUE_REFRESH):
            return
        self._due = self._statements.due(connection, window=DUE_WINDOW, limit=DUE, now=now)
        # After a list that reached its limit, read the next as soon as it is used up.
        self._due_at = float("-inf") if len(self._due) == DUE else now_at

    @property
    def more_waiting(self) -> bool:
        """Whether jobs wait that the last claim did not take. If not, a claim after ``find_due`` is one statement."""
        return self._more_waiting or bool(self._due)

    def _claim_queued(self, connection: sa.Connection, terms: ClaimTerms) -> list[ClaimedRow]:
        found: list[ClaimedRow] = []
        if self._more_waiting:
            self._list(connection)
        while self._more_waiting and len(self._companies) > 1 and len(found) < terms.limit:
            rest = terms._replace(limit=terms.limit - len(found))
            turn, each = self._turn(self._companies, rest.limit)
            some = self._statements.claim_of(connection, turn, each, terms=rest)
            if len(some) < rest.limit:
                self._leave_out(turn, each, some)
            found += some
        if len(found) < terms.limit:
            found += self._statements.claim(connection, terms=terms._replace(limit=terms.limit - len(found)))
            self._more_waiting = len(found) == terms.limit
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
            # Jobs that were named and not taken are with other runners, unless the limit was reached first.
            gone = {one.claim.job_id for one in some} if len(some) == rest.limit else {job.job_id for job in chosen}
            self._due = [job for job in self._due if job.job_id not in gone]
            if len(some) < rest.limit:
                self._leave_out(turn, each, some)
            found += some
        self._more_waiting = True
        if len(found) < terms.limit:
            found += self._claim_queued(connection, terms._replace(limit=terms.limit - len(found)))
        return found

    def _leave_out(self, turn: list[str], each: int, taken: list[ClaimedRow]) -> None:
        """Drop the companies that had fewer jobs than their share, until the next listing."""
        given = Counter(one.claim.company_id for one in taken)
        spent = {company for company in turn if given[company] < each}
        before = sum(company in spent for company in self._companies[: self._next])
        self._companies = [company for company in self._companies if company not in spent]
        self._next = max(0, self._next - before)

    def _list(self, connection: sa.Connection) -> None:
        if time.monotonic() - self._listed_at >= REFRESH:
            self._companies = self._statements.companies(connection, limit=COMPANIES)
            self._listed_at = time.monotonic()

    def _turn(self, companies: list[str], limit: int) -> tuple[list[str], int]:
        """The companies whose turn it is, and the number of jobs of each that makes ``limit``."""
        count = min(limit, len(companies))
        turn = [companies[(self._next + place) % len(companies)] for place in range(count)]
        self._next = (self._next + count) % len(companies)
        return turn, -(-limit // count)


def _in_turn(jobs: Iterable[QueuedJob], each: int) -> list[QueuedJob]:
    """The first ``each`` jobs of every company by priority, then time; all companies' first jobs before the second."""
    by_company: dict[str, list[QueuedJob]] = {}
    for job in sorted(jobs, key=lambda job: (-job.priority, job.at, job.job_id)):
        by_company.setdefault(job.company_id, []).append(job)
    ranked = [(rank, job) for own in by_company.values() for rank, job in enumerate(own[:each])]
    return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]
