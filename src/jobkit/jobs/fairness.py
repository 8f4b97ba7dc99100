"""Whose jobs to claim next: within a company by priority, between companies in turn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from jobkit.db.dialects import statements_for
from jobkit.db.dialects.base import SUSPECT_AFTER, Claim, ClaimedRow, ClaimTerms, QueuedJob

# Seconds between two listings of the companies with queued jobs; a listing that takes long waits ten times as long.
REFRESH = 1.0
# The most companies of one listing: the next one goes on where it ended.
COMPANIES = 1_000
# Seconds between two searches for jobs whose ``run_at`` has come; the most jobs one finds: beyond, companies are listed
# with theirs.
DUE_REFRESH = 0.5
DUE = 1_000
# A claim by id names this many times the jobs it needs: other runners may take some first.
SPARE = 4
# The most companies' turns of one claim that give nothing: others may have taken what was listed.
TURNS = 8


class RoundRobin:
    """Claims jobs for one runner, so that a company with a long queue does not hold up the others.

    While a claim takes every queued job, their order does not matter, and one plain statement does. A claim that
    reached its limit shows that more jobs wait: then the companies are listed, from the last one that had its turn on
    and round, and claims take their jobs in turn. Jobs whose ``run_at`` has come have an index of their own; while
    there are any, both kinds are merged here.

    Used by one thread.
    """

    def __init__(self, engine: sa.Engine, *, wall_clock: bool = False, patience: float = 60.0) -> None:
        """``wall_clock``: whether a ``run_at`` has come is for the database's clock to say, not for the claim's
        ``now``. ``patience``: for so many seconds a suspect waits for an idle runner, and other jobs run between two.
        """
        self._statements = statements_for(engine)
        self._wall_clock = wall_clock
        self._patience = patience
        # When a suspect was seen last; from when on a busy runner drains for it; until when the others' turn lasts.
        self._seen_at = self._drain_at = self._others_until = float("-inf")
        self._draining_until = float("-inf")
        #: The claim of the suspect that was claimed last, to run alone.
        self.isolated: Claim | None = None
        # Those whose turn is next. ``_whole``: these are all there are, and it goes round in them.
        self._companies: list[str] = []
        self._whole, self._last = False, ""
        # Companies with due jobs; all of them, unless there are too many such jobs to look at.
        self._due: list[str] = []
        self._many_due = False
        self._listed_at = self._due_at = float("-inf")
        self._refresh = REFRESH
        self._more_waiting = False

    def claim(
        self, connection: sa.Connection, terms: ClaimTerms, *, check_scheduled: bool, alone: bool = True
    ) -> list[ClaimedRow]:
        """Claim up to ``terms.limit`` jobs that may run now, in the caller's transaction; first ``find_due``.

        ``alone``: nothing else of this runner is running, so that a suspect may.
        """
        self.find_due(connection, terms.now, check_scheduled=check_scheduled)
        terms = terms._replace(by=self._by(terms.now))
        found: list[ClaimedRow] = []
        for _ in range(TURNS):
            rest = terms._replace(limit=terms.limit - len(found))
            if not rest.limit or not self.more_waiting:
                break
            self._list(connection, rest)
            if len(self._companies) < (1 if self._due else 2):
                self._due = []
                break
            found += self._take_turn(connection, rest, alone=alone and not found)
            if self.draining or (found and found[-1].claim is self.isolated):
                return found
        if len(found) < terms.limit and not self._due:
            found += self._statements.claim(connection, terms=terms._replace(limit=terms.limit - len(found)))
        self._more_waiting = len(found) == terms.limit
        return found

    def find_due(self, connection: sa.Connection, now: datetime, *, check_scheduled: bool) -> None:
        """Look for jobs whose ``run_at`` has come: every second while some are known; else now if ``check_scheduled``,
        and every half second if not.
        """
        now_at = time.monotonic()
        # After a search that reached its limit, the next is made as soon as what it found is used up.
        soon = 0.0 if check_scheduled or self._many_due else DUE_REFRESH
        if now_at - self._due_at < (REFRESH if self._due else soon):
            return
        found = self._statements.companies_due(connection, limit=DUE, by=self._by(now))
        self._due, self._many_due, self._due_at = list(dict.fromkeys(found)), len(found) == DUE, now_at
        if self._due:
            self._listed_at = float("-inf")

    @property
    def more_waiting(self) -> bool:
        """Whether jobs wait that the last claim did not take. If not, a claim after ``find_due`` is one statement."""
        return self._more_waiting or bool(self._due)

    @property
    def draining(self) -> bool:
        """Whether nothing is to be claimed until what is running has ended, or a moment has passed: a suspect waits."""
        return time.monotonic() < self._draining_until

    def _by(self, now: datetime) -> datetime | None:
        return None if self._wall_clock else now

    def _list(self, connection: sa.Connection, terms: ClaimTerms) -> None:
        """List the companies from the last one on and round, when that is to be done again."""
        began = time.monotonic()
        if began - self._listed_at < self._refresh and (self._whole or len(self._companies) >= terms.limit):
            return
        size = max(COMPANIES, terms.limit)
        found = self._beyond(connection, self._last, size, terms.by)
        if self._last and len(found) < size:
            found += self._beyond(connection, "", size - len(found), terms.by)
        self._companies = list(dict.fromkeys(found))
        self._whole = len(self._companies) < size
        self._listed_at = began
        self._refresh = max(REFRESH, 10 * (time.monotonic() - began))

    def _beyond(self, connection: sa.Connection, last: str, limit: int, by: datetime | None) -> list[str]:
        if self._many_due:
            return self._statements.all_companies(connection, beyond=last, limit=limit, by=by)
        return self._statements.companies(connection, self._due, beyond=last, limit=limit)

    def _take_turn(self, connection: sa.Connection, terms: ClaimTerms, *, alone: bool) -> list[ClaimedRow]:
        """Claim of the companies whose turn it is as many jobs of each as make the limit."""
        count = min(terms.limit, len(self._companies))
        turn, each = self._companies[:count], -(-terms.limit // count)
        if self._due:
            found = self._take_merged(connection, turn, each, terms, alone=alone)
            if self.draining:
                return found
        else:
            found = self._statements.claim_of(connection, turn, each, terms=terms)
        self._last = turn[-1]
        self._companies = self._companies[count:] + (turn if self._whole else [])
        if len(found) < terms.limit:
            # Companies that had fewer jobs than their share are left out until the next listing.
            given = Counter(one.claim.company_id for one in found)
            spent = {company for company in turn if given[company] < each}
            self._companies = [company for company in self._companies if company not in spent]
            self._due = [company for company in self._due if company not in spent]
        if not found:
            self._listed_at = float("-inf")
        return found

    def _take_merged(
        self, connection: sa.Connection, turn: list[str], each: int, terms: ClaimTerms, *, alone: bool
    ) -> list[ClaimedRow]:
        first = self._statements.first_queued(connection, turn, each * SPARE, suspect=SUSPECT_AFTER, by=terms.by)
        chosen = _in_turn((job for job in first if not job.suspect), each * SPARE)
        suspects = _in_turn((job for job in first if job.suspect), each * SPARE)
        if suspects and self._admits_suspect(alone=alone, others=bool(chosen)):
            if not alone:
                self._draining_until = time.monotonic() + REFRESH
                return []
            taken = self._statements.claim_these(connection, suspects, terms=terms._replace(limit=1))
            if taken:
                self.isolated, self._others_until = taken[0].claim, time.monotonic() + self._patience
                return taken
        found = self._statements.claim_these(connection, chosen, terms=terms)
        taken_ids = {one.claim.job_id for one in found}
        left = {job.company_id for job in first if job.scheduled and job.job_id not in taken_ids}
        self._due = [company for company in self._due if company not in turn or company in left]
        return found

    def _admits_suspect(self, *, alone: bool, others: bool) -> bool:
        """Whether it is a suspect's turn: at once where nothing else is to be done, else after the others'."""
        now = time.monotonic()
        if now - self._seen_at > max(self._patience, 60.0):
            self._drain_at = now + self._patience
        self._seen_at = now
        if alone:
            return not others or now >= self._others_until
        return now >= max(self._drain_at, self._others_until)


def _in_turn(jobs: Iterable[QueuedJob], each: int) -> list[UUID]:
    """The first ``each`` jobs of every company by priority, then time; all companies' first jobs before the second."""
    by_company: dict[str, list[UUID]] = {}
    for job in sorted(jobs, key=lambda job: (-job.priority, job.at, job.job_id)):
        by_company.setdefault(job.company_id, []).append(job.job_id)
    ranked = [(rank, job) for own in by_company.values() for rank, job in enumerate(own[:each])]
    return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]
