"""Jobs, claims, files and sweeps in any order, on the real statements: the rows are what a model in Python says.

Reading and acting are separate rules, so that whatever was read may be outdated: a claim is kept after its job was
rescued, cancelled or retried, and still tries to renew and to finish; a sweep claims keys that it saw long before.
Some transactions roll back. ``JOBKIT_TEST_MACHINE=20000x100`` makes it 20,000 runs of 100 steps.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jobkit import AssetNotFound, IdempotencyConflict, InvalidTransition, JobNotFound
from jobkit.assets import intents
from jobkit.assets.intents import _ALL, _START, STATES, Intent, _Tally
from jobkit.base.clock import utcnow
from jobkit.db.dialects.base import DueKey, EventRow
from jobkit.jobs import claims
from jobkit.jobs.claims import Claim, Completion
from jobkit.jobs.fairness import RoundRobin
from jobkit.jobs.outcomes import Outcome
from jobkit.tables import asset_intents, content_jobs
from jobkit.types import JobStatus
from tests.support.machine import File, Ground
from tests.support.model import LIVE, OVER, ModelJob, Record, differences, read
from tests.support.runners import until

# About half a minute on each; PostgreSQL's round trips take longer.
SIZE = {"sqlite": "350x50", "postgresql": "200x50"}
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)
COMPANIES = ("acme", "brick")
REASON = "the worker was lost"
FREQUENTLY = st.sampled_from([True, True, True, True, True, False])
SELDOM = st.sampled_from([False, False, False, True])

jobs = Bundle("jobs")
held = Bundle("claims")
files = Bundle("files")
ends = Bundle("ends")
looks = Bundle("looks")
visits = Bundle("visits")


Look = dict[str, list[DueKey]]  # what a sweep saw of each state


class Machine(Ground):
    @initialize(target=jobs)
    def some_jobs(self) -> Any:
        return multiple(*(self.create(True, COMPANIES[n % 2], n % 2, None, None, n) for n in range(3)))

    @initialize(target=held)
    def some_claims(self) -> Any:
        return self.claim(True, 2, False)

    # --- the host

    @rule(
        target=jobs, commit=FREQUENTLY, company=st.sampled_from(COMPANIES), priority=st.sampled_from([0, 0, 1]),
        key=st.sampled_from([None, None, "k"]), wait=st.sampled_from([None, None, -5, 20]), n=st.integers(0, 1),
    )  # fmt: skip
    def create(self, commit: bool, company: str, priority: int, key: str | None, wait: int | None, n: int) -> Any:
        run_at = None if wait is None else self.now + timedelta(seconds=wait)
        wanted: dict[str, Any] = {"input": {"n": n}, "run_at": run_at, "priority": priority, "idempotency_key": key}
        there = self.model.of_key(company, key) if key else None
        with self.by_host(commit) as store:
            if there is not None and there.input != {"n": n}:
                with pytest.raises(IdempotencyConflict):
                    store.create(company, job_type="note", **wanted)
                return multiple()
            job = store.create(company, job_type="note", **wanted)
        if there is not None:
            assert (job.id, job.fence, job.status) == (there.id, there.fence, there.status)
            self.seen["known key"] += 1
            return multiple()
        if not commit:
            return multiple()
        self.model.jobs[job.id] = ModelJob(job.id, company, {"n": n}, key, priority, run_at, self.now)
        return job.id

    @rule(job_id=jobs, commit=FREQUENTLY, foreign=SELDOM, how=st.sampled_from(["fitting", "cancel", "retry"]))
    def cancel_or_retry(self, job_id: UUID, commit: bool, foreign: bool, how: str) -> None:
        job = self.model.jobs[job_id]
        how = how if how != "fitting" else "retry" if job.status in ("failed", "cancelled") else "cancel"
        company = next(name for name in COMPANIES if (name == job.company) != foreign)
        accepted = ("queued", "running", "cancelled") if how == "cancel" else ("failed", "cancelled")
        with self.by_host(commit) as store:
            assert (store.get_by_id(job_id, company_id=company) is None) == foreign
            assert (job_id in {found.id for found in store.list_by_company(company, status=job.status)}) != foreign
            act = partial(store.cancel if how == "cancel" else store.retry, job_id, company_id=company)
            if foreign or job.status not in accepted:
                with pytest.raises(JobNotFound if foreign else InvalidTransition):
                    act()
                return
            act()
        if not commit or (how, job.status) == ("cancel", "cancelled"):
            return
        if how == "retry":
            job.again()
        elif job.status == "running":
            job.asked = True
        else:
            job.by_hand("cancelled")

    @rule(job_id=jobs, commit=FREQUENTLY, status=st.sampled_from(["running", "failed", "queued"]))
    def change_by_hand(self, job_id: UUID, commit: bool, status: str) -> None:
        job = self.model.jobs[job_id]
        if job.status in (status, "done") or {job.status, status} == {"cancelled", "failed"}:
            return
        with self.by_host(commit) as store:
            with pytest.raises(InvalidTransition):
                store.transition(job_id, status=status, expect="done")
            assert store.transition(job_id, status=status, expect=job.status).status == status
        if commit:
            job.by_hand(status)

    # --- workers

    @rule(target=held, commit=FREQUENTLY, limit=st.integers(1, 3), fair=st.booleans())
    def claim(self, commit: bool, limit: int, fair: bool) -> Any:
        return multiple(*self._claim(commit, limit, fair))

    def _claim(self, commit: bool, limit: int, fair: bool) -> list[Claim]:
        pick = partial(RoundRobin(self.engine).claim, check_scheduled=True) if fair else None
        ready = [job for job in self.model.jobs.values() if job.may_run(self.now) and (fair or job.run_at is None)]
        with self.transaction(commit) as connection:
            taken, events = claims.claim(connection, limit=limit, worker_id="w", lease=3600.0, now=self.now, pick=pick)
        self.told(commit, events)
        assert len({one.job_id for one in taken}) == len(taken) == min(limit, len(ready))
        for one in taken:
            job = self.model.jobs[one.job_id]
            assert job in ready
            assert (one.company_id, one.fence, one.attempt) == (job.company, job.fence + 1, job.attempt + 1)
        chosen = {one.job_id for one in taken}
        for company in COMPANIES:
            own = [job for job in ready if job.company == company]
            first = [job.place for job in own if job.id in chosen]
            rest = [job.place for job in own if job.id not in chosen]
            assert not (first and rest) or max(first) <= min(rest)
        for one in taken if commit else ():
            self.model.jobs[one.job_id].begin()
            self.newest[one.job_id] = one
        return taken if commit else []

    @rule(one=held, other=held, commit=FREQUENTLY)
    def renew(self, one: Claim, other: Claim, commit: bool) -> None:
        mine = [one, other] if one.job_id != other.job_id else [one]
        expected = {c.job_id: self.model.jobs[c.job_id] for c in mine if self.model.jobs[c.job_id].holds(c)}
        with self.transaction(commit) as connection:
            held = {(job.id, job.asked, False) for job in expected.values()}
            assert set(claims.check(connection, mine)) == set(claims.renew(connection, mine, lease=3600.0)) == held
        self.seen["renewal refused"] += len(expected) < len(mine)
        for job in expected.values() if commit else ():
            self.seen["renewed when it was over"] += job.lease == OVER
            job.lease = LIVE

    @rule(target=files, one=held, publish=st.booleans())
    def record(self, one: Claim, publish: bool) -> File:
        file = self._recorded(one, one.company_id)
        if publish:
            self.publish(file)
        return file

    def _published(self, one: Claim, swept: bool) -> list[File]:
        """What a claim has in storage, and a file at least; ``swept`` while that is on its way."""
        found = [f for f in self.files if f.claim == one and f.stored.object_key in self.model.objects]
        if not found:
            found.append(self._recorded(one, one.company_id))
            if swept:
                self.sweep_at_once()
            self.publish(found[0])
        return found

    def _recorded(self, claim: Claim | None, company: str) -> File:
        draft = self.store.draft(company, namespace="generated", filename="a.txt", content_type="text/plain")
        draft.spool.fill(draft.key.encode())
        file = File(claim, company, draft.seal(recorded=True), draft)
        with self.transaction() as connection:
            intents.record_intents(connection, [Intent(company, file.stored.provider, file.stored.object_key)])
        self.model.records[draft.key] = Record()
        self.files.append(file)
        return file

    @rule(file=files)
    def publish(self, file: File) -> None:
        key = file.stored.object_key
        # A record is kept longer than any writer takes: once it is gone, nobody stores its object.
        if key in self.model.records and key not in self.model.objects and file.draft.spool.path.exists():
            file.draft.publish()
            self.model.objects[key] = key.encode()
            self.seen["stored after the sweep"] += self.model.swept(key)

    @rule(target=files, file=files, company=st.sampled_from(COMPANIES), commit=FREQUENTLY, swept=SELDOM)
    def put_and_keep_by_host(self, file: File, company: str, commit: bool, swept: bool) -> File:
        if file.claim is not None:
            file = self._recorded(None, company)
            self.publish(file)
        if swept:
            self.sweep_at_once()
        key = file.stored.object_key
        with self.transaction(commit) as connection:
            if self.model.swept(key):
                with pytest.raises(AssetNotFound):
                    self.store.create(connection, file.company, file.stored, source_task_id=None)
                return file
            asset = self.store.create(connection, file.company, file.stored, source_task_id=None)
        if commit:
            del self.model.records[key]
            self.model.rows[key] = asset.id
        return file

    @rule(
        target=ends, one=held, commit=FREQUENTLY, again=st.booleans(), swept=SELDOM,
        newest=FREQUENTLY,
        how=st.sampled_from([*["done"] * 5, "failed", "retry", "retry", "snooze", "release", "cancelled"]),
    )  # fmt: skip
    def finish(self, one: Claim, commit: bool, again: bool, swept: bool, newest: bool, how: str) -> Completion:
        one = self.newest[one.job_id] if newest else one
        if how == "done":
            end = Completion(one, tuple(file.stored for file in self._published(one, swept)))
        else:
            later = self.now + timedelta(seconds=10)
            outcome = {
                "failed": Outcome(JobStatus.FAILED, error="boom"),
                "retry": Outcome(JobStatus.QUEUED, error="boom", run_at=later),
                "snooze": Outcome(JobStatus.QUEUED, run_at=later, charged=False),
                "release": claims.RELEASED,
                "cancelled": claims.CANCELLED,
            }[how]
            end = Completion(one, outcome=outcome)
        self._finish([end], commit)
        if again:  # the reply was lost, and the end is sent once more
            self._finish([end], True)
        return end

    @rule(one=ends, other=ends)
    def finish_late(self, one: Completion, other: Completion) -> None:
        self._finish([one, other] if one.claim.job_id != other.claim.job_id else [one], True)

    def _finish(self, completions: Sequence[Completion], commit: bool) -> None:
        winners = self.model.winners(completions)
        events: list[EventRow] = []
        lost = any(self.model.swept(file.object_key) for end in winners for file in end.files)
        try:
            with self.transaction(commit) as connection:
                events = claims.finish(connection, completions, now=self.now).events
        except AssetNotFound:
            assert lost
            self.seen["end after the sweep"] += 1
            return
        assert not lost
        self.seen["end rejected"] += len(winners) < len(completions)
        assert {event.job_id for event in events} == {end.claim.job_id for end in winners}
        self.told(commit, events)
        if commit:
            self.model.finish(completions)
            for end in winners:
                self.seen[f"ended, {self.model.jobs[end.claim.job_id].events[-1]}"] += 1

    # --- lost workers

    @rule(one=held)
    def let_a_lease_run_out(self, one: Claim) -> None:
        job = self.model.jobs[one.job_id]
        if job.lease is not None:
            with self.transaction() as connection:
                table = content_jobs
                connection.execute(table.update().where(table.c.id == job.id).values(lease_until=LONG_AGO))
            job.lease = OVER

    @rule(target=held, one=held, commit=FREQUENTLY, limit=st.sampled_from([1, 100]), fresh=st.booleans())
    def lose_and_rescue(self, one: Claim, commit: bool, limit: int, fresh: bool) -> Any:
        if not fresh:
            self.rescue(commit, limit)
            return multiple()
        self.let_a_lease_run_out(self.newest[one.job_id])
        self.rescue(commit, limit)
        return self.claim(True, 3, True)

    def rescue(self, commit: bool, limit: int) -> None:
        lost = sorted((job for job in self.model.jobs.values() if job.lease == OVER), key=lambda job: job.id)[:limit]
        with self.transaction(commit) as connection:
            events = claims.rescue(connection, limit=limit, now=self.now)
        self.told(commit, events)
        assert {event.job_id for event in events} == {job.id for job in lost}
        stopped = "its worker was lost 2 times in a row; perhaps this job is what kills it"
        for job in lost if commit else ():
            job.lose(claims.MAX_RESCUES, REASON, stopped)
            self.seen[f"rescued, {job.events[-1]}"] += 1

    # --- files that go

    @precondition(lambda self: self.model.rows)
    @rule(which=st.integers(0, 9), commit=FREQUENTLY)
    def delete(self, which: int, commit: bool) -> None:
        key = sorted(self.model.rows)[which % len(self.model.rows)]
        with self.transaction(commit) as connection:
            asset = self.store.get_by_id(connection, self.model.rows[key])
            assert asset is not None
            self.store.verify(asset)
            self.store.delete(connection, asset)
        if commit:
            del self.model.rows[key]
            self.model.records[key] = Record("tombstone")

    @precondition(lambda self: self.model.records)
    @rule(target=looks)
    def see_what_to_sweep(self) -> Look:
        with self.engine.connect() as connection:
            look = {state: list(self.sweep._due(connection, state, _START, _ALL)) for state in STATES}
        for state, found in look.items():
            due = {key for key, record in self.model.records.items() if record.state == state and record.due}
            assert {one.object_key for one in found} == due
        return look

    @rule(target=visits, look=looks)
    def claim_what_was_seen(self, look: Look) -> Look:
        return {state: self._claim_keys(state, found) for state, found in look.items()}

    def _claim_keys(self, state: str, seen: list[DueKey]) -> list[DueKey]:
        keys = [due.object_key for due in seen]
        early, hold = self.sweep._early(state), 900.0 if state == "collected" else 0.0
        with self.transaction() as connection:
            won = set(
                self.statements.claim_intents(connection, keys, provider="memory", state=state, early=early, hold=hold)
            )
        assert won == {key for key in keys if (r := self.model.records.get(key)) and r.state == state and r.due}
        self.seen["sweep came too late"] += len(won) < len(keys)
        for key in won:
            self.model.records[key] = Record("collected", due=state != "collected")
        return [due for due in seen if due.object_key in won]

    @rule(visit=visits)
    def visit_what_was_claimed(self, visit: Look) -> None:
        for state, found in visit.items():
            self.sweep._visit(_Tally(), state, found)
            for key in [due.object_key for due in found]:
                self.model.objects.pop(key, None)
                if state == "collected" and key in self.model.records:
                    del self.model.records[key]

    def sweep_at_once(self) -> None:
        self.visit_what_was_claimed(self.claim_what_was_seen(self.see_what_to_sweep()))

    @rule(seconds=st.sampled_from([1, 30]), quarantine=st.booleans())
    def let_time_pass(self, seconds: int, quarantine: bool) -> None:
        self.now += timedelta(seconds=seconds)
        if quarantine:
            self.let_the_quarantine_pass()

    def let_the_quarantine_pass(self) -> None:
        with self.transaction() as connection:
            connection.execute(
                asset_intents.update().where(asset_intents.c.state == "collected").values(not_before=LONG_AGO)
            )
        for record in self.model.records.values():
            record.due = True

    # --- the end of a run

    def teardown(self) -> None:
        """Whatever happened: healthy workers end every job, and sweeps leave only what has a row."""
        try:
            if differences(self.model, read(self.reader), utcnow()) == []:  # else the failure was told already
                self._come_to_rest()
        finally:
            self.reader.close()
            for file in self.files:
                file.draft.discard()

    def _come_to_rest(self) -> None:
        with self.transaction() as connection:
            table = content_jobs
            connection.execute(table.update().where(table.c.lease_until.is_not(None)).values(lease_until=LONG_AGO))
        for job in self.model.jobs.values():
            job.lease = job.lease and OVER
        self.rescue(True, 100)
        self.now += timedelta(days=1)
        for job in self.model.jobs.values():
            if job.status == "running":  # by hand
                with self.by_host(True) as store:
                    store.transition(job.id, status="queued")
                job.by_hand("queued")
        self._finish([claims.failed(one, "boom") for one in self._claim(True, 1000, True)], True)
        for _ in range(2):
            self.let_the_quarantine_pass()
            self.sweep_at_once()
        self.rows_and_objects_are_as_the_model_says()
        assert not [job for job in self.model.jobs.values() if job.status in ("queued", "running")], "I1"
        assert self.model.objects.keys() == self.model.rows.keys()
        assert not self.model.records, "I7"
        until(self._heard_all, "I9: the cursor reached every event", timeout=60)
        assert sorted(event.id for event in self.heard) == [event.id for event in self.log], "I9"

    def _heard_all(self) -> bool:
        self.listen()
        return len(self.heard) >= len(self.log)


MUST_BE_SEEN = {
    *("ended, done", "ended, failed", "ended, retrying", "ended, queued", "ended, cancelled", "end rejected"),
    *("rescued, retrying", "rescued, failed", "rescued, cancelled", "renewal refused", "renewed when it was over"),
    *("end after the sweep", "sweep came too late", "stored after the sweep", "known key"),
}


@pytest.mark.timeout(0 if "JOBKIT_TEST_MACHINE" in os.environ else 900)
def test_whatever_is_done_in_whatever_order_the_rows_are_what_they_should_be(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "MAX_RESCUES", 1)  # so that a few steps get there
    runs, steps = map(int, os.environ.get("JOBKIT_TEST_MACHINE", SIZE[engine.dialect.name]).split("x"))
    shrink = () if os.environ.get("JOBKIT_TEST_MACHINE_SHRINK") == "no" else (Phase.shrink,)
    seen: Counter[str] = Counter()
    run_state_machine_as_test(
        lambda: Machine(engine, f"memory://{uuid.uuid4()}", seen),
        settings=settings(
            max_examples=runs, stateful_step_count=steps, derandomize=True, deadline=None, database=None,
            phases=(Phase.generate, *shrink), suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        ),
    )  # fmt: skip
    if runs >= 100:
        assert {name for name in MUST_BE_SEEN if not seen[name]} == set(), "this run looked at too little"
