"""Jobs, claims, files and sweeps in any order, on the real statements: the rows are what a model in Python says.

Reading and acting are separate rules, so that whatever was read may be outdated: a claim is kept after its job was
rescued, cancelled or retried, and still tries to renew and to finish; a sweep claims keys that it saw long before.
Some transactions roll back. ``JOBKIT_TEST_MACHINE=20000x100`` makes it 20,000 runs of 100 steps.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

import jobkit
from jobkit import AssetNotFound, IdempotencyConflict, InvalidTransition, JobNotFound, claims
from jobkit._dialects import statements_for
from jobkit._dialects.base import Due, EventRow
from jobkit.claims import Claim, Completion, Intent
from jobkit.clock import utcnow
from jobkit.rotation import Rotation
from jobkit.sweep import _ALL, _START, Sweep, _Tally
from jobkit.tables import asset_intents, content_jobs, metadata
from jobkit.types import JobStatus, StoredObject, Verdict
from tests.support.databases import Database
from tests.support.files import objects
from tests.support.model import LIVE, OVER, Found, Model, ModelJob, broken_laws, differences, read
from tests.support.runners import until

RUNS, STEPS = (int(part) for part in os.environ.get("JOBKIT_TEST_MACHINE", "120x50").split("x"))
LONG_AGO = datetime(2001, 1, 1, tzinfo=UTC)
COMPANIES = ("acme", "brick")
REASON = "the worker was lost"
FREQUENTLY = st.sampled_from([True, True, True, True, True, False])

jobs = Bundle("jobs")
held = Bundle("claims")
files = Bundle("files")
ends = Bundle("ends")
rows = Bundle("rows")
looks = Bundle("looks")
visits = Bundle("visits")


class File(NamedTuple):
    """A recorded file, of a claim or of a host."""

    claim: Claim | None
    company: str
    stored: StoredObject
    draft: Any


class Look(NamedTuple):
    """What a sweep saw of a state."""

    state: str
    found: list[Due]


class RolledBack(Exception):
    """Ends a transaction that is not to be committed."""


class Machine(RuleBasedStateMachine):
    """``engine`` and ``url`` are a database and a storage of this machine alone."""

    def __init__(self, engine: sa.Engine, url: str) -> None:
        super().__init__()
        self.engine, self.url = engine, url
        self.store = jobkit.AssetStore(url, engine=engine)
        self.sweep = Sweep(engine, self.store._storage, older_than=0)
        self.statements = statements_for(engine)
        self.now = datetime(2030, 1, 1, tzinfo=UTC)
        self.model = Model()
        self.returned: list[EventRow] = []
        self.log: list[EventRow] = []
        self.heard: list[EventRow] = []
        with engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
        for key in [key for key in MemoryFileSystem.store if key.startswith(f"/{url.removeprefix('memory://')}/")]:
            del MemoryFileSystem.store[key]
        self.reader = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self.start = self.statements.start(self.reader)
        self.cursor = self.start.position

    # --- the ways to act

    @contextmanager
    def transaction(self, commit: bool = True) -> Iterator[sa.Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
                if not commit:
                    raise RolledBack
        except RolledBack:
            pass

    @contextmanager
    def by_host(self, commit: bool) -> Iterator[jobkit.JobStore]:
        with self.transaction(commit) as connection:
            yield jobkit.JobStore(connection, clock=lambda: self.now)

    def told(self, commit: bool, events: list[EventRow]) -> None:
        self.returned += events if commit else []

    # --- the host

    @rule(
        target=jobs, commit=FREQUENTLY, company=st.sampled_from(COMPANIES), priority=st.sampled_from([0, 0, 1]),
        key=st.sampled_from([None, None, "k"]), wait=st.sampled_from([None, None, -5, 20]), n=st.integers(0, 1),
    )  # fmt: skip
    def create(
        self, commit: bool, company: str, priority: int, key: str | None, wait: int | None, n: int
    ) -> Any:
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
            return multiple()
        if not commit:
            return multiple()
        self.model.jobs[job.id] = ModelJob(job.id, company, {"n": n}, key, priority, run_at, self.now)
        return job.id

    @rule(job_id=jobs, commit=FREQUENTLY, foreign=st.booleans(), how=st.sampled_from(["cancel", "cancel", "retry"]))
    def cancel_or_retry(self, job_id: UUID, commit: bool, foreign: bool, how: str) -> None:
        job = self.model.jobs[job_id]
        company = next(name for name in COMPANIES if (name == job.company) != foreign)
        accepted = ("queued", "running", "cancelled") if how == "cancel" else ("failed", "cancelled")
        with self.by_host(commit) as store:
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
        if job.status in (status, "done"):
            return
        with self.by_host(commit) as store:
            with pytest.raises(InvalidTransition):
                store.transition(job_id, status=status, expect="done")
            assert store.transition(job_id, status=status, expect=job.status).status == status
        if commit:
            job.by_hand(status)

    @rule(job_id=jobs)
    def look_from_another_company(self, job_id: UUID) -> None:
        job = self.model.jobs[job_id]
        other = next(name for name in COMPANIES if name != job.company)
        with self.by_host(True) as store:
            assert store.get_by_id(job_id, company_id=other) is None
            assert job_id not in {found.id for found in store.list_by_company(other)}
            assert job_id in {found.id for found in store.list_by_company(job.company, status=job.status)}

    @rule(seconds=st.sampled_from([1, 30]))
    def tick(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    # --- workers

    @rule(target=held, commit=FREQUENTLY, limit=st.integers(1, 3), fair=st.booleans())
    def claim(self, commit: bool, limit: int, fair: bool) -> Any:
        pick = partial(Rotation(self.engine).claim, thorough=True) if fair else None
        ready = [job for job in self.model.jobs.values() if job.may_run(self.now) and (fair or job.run_at is None)]
        with self.transaction(commit) as connection:
            taken, events = claims.claim(
                connection, limit=limit, worker_id="w", lease=3600.0, now=self.now, pick=pick
            )
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
        if not commit:
            return multiple()
        for one in taken:
            self.model.jobs[one.job_id].begin()
        return multiple(*taken)

    @rule(one=held, other=held, commit=FREQUENTLY)
    def renew(self, one: Claim, other: Claim, commit: bool) -> None:
        mine = [one, other] if one.job_id != other.job_id else [one]
        expected = {c.job_id: self.model.jobs[c.job_id] for c in mine if self.model.jobs[c.job_id].holds(c)}
        with self.transaction(commit) as connection:
            assert claims.look(connection, mine) == {job.id: job.asked for job in expected.values()}
            assert claims.renew(connection, mine, lease=3600.0) == {job.id: job.asked for job in expected.values()}
        for job in expected.values() if commit else ():
            job.lease = LIVE

    @rule(target=files, one=held, publish=st.booleans())
    def record(self, one: Claim, publish: bool) -> File:
        file = self._recorded(one, one.company_id)
        if publish:
            self.publish(file)
        return file

    @rule(target=files, company=st.sampled_from(COMPANIES))
    def put_by_host(self, company: str) -> File:
        file = self._recorded(None, company)
        self.publish(file)
        return file

    def _recorded(self, claim: Claim | None, company: str) -> File:
        draft = self.store.draft(company, namespace="generated", filename="a.txt", content_type="text/plain")
        draft.spool.fill(draft.key.encode())
        file = File(claim, company, draft.seal(recorded=True), draft)
        with self.transaction() as connection:
            claims.record_intents(connection, [Intent(company, file.stored.provider, file.stored.object_key)])
        self.model.records[draft.key] = type(self.model).record()
        return file

    @rule(file=files)
    def publish(self, file: File) -> None:
        key = file.stored.object_key
        # A record is kept longer than any writer takes: once it is gone, nobody stores its object.
        if key in self.model.records and key not in self.model.objects:
            if file.draft.spool.path.exists():
                file.draft.publish()
                self.model.objects[key] = key.encode()

    @rule(target=rows, file=files, commit=FREQUENTLY)
    def keep_by_host(self, file: File, commit: bool) -> Any:
        key = file.stored.object_key
        if file.claim is not None or (key in self.model.records and key not in self.model.objects):
            return multiple()
        with self.transaction(commit) as connection:
            if self.model.swept(key):
                with pytest.raises(AssetNotFound):
                    self.store.create(connection, file.company, file.stored, source_task_id=None)
                return multiple()
            asset = self.store.create(connection, file.company, file.stored, source_task_id=None)
        if not commit:
            return multiple()
        del self.model.records[key]
        self.model.rows[key] = asset.id
        return key

    @rule(
        target=ends, one=held, commit=FREQUENTLY, file=files, again=st.booleans(),
        how=st.sampled_from(["done", "done", "failed", "retry", "snooze", "release", "cancelled"]),
    )  # fmt: skip
    def finish(self, one: Claim, commit: bool, file: File, again: bool, how: str) -> Completion:
        if how == "done":
            if file.claim != one or file.stored.object_key not in self.model.objects:
                file = self._recorded(one, one.company_id)
                self.publish(file)
            end = Completion(one, (file.stored,))
        else:
            later = self.now + timedelta(seconds=10)
            verdict = {
                "failed": Verdict(JobStatus.FAILED, error="boom"),
                "retry": Verdict(JobStatus.QUEUED, error="boom", run_at=later),
                "snooze": Verdict(JobStatus.QUEUED, run_at=later, charged=False),
                "release": claims.RELEASED,
                "cancelled": claims.CANCELLED,
            }[how]
            end = Completion(one, verdict=verdict)
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
                events = claims.finish(connection, completions, now=self.now)
        except AssetNotFound:
            assert lost
            return
        assert not lost
        assert {event.job_id for event in events} == {end.claim.job_id for end in winners}
        self.told(commit, events)
        if commit:
            self.model.finish(completions)

    # --- lost workers

    @rule(one=held)
    def let_a_lease_run_out(self, one: Claim) -> None:
        job = self.model.jobs[one.job_id]
        if job.lease is not None:
            with self.transaction() as connection:
                table = content_jobs
                connection.execute(table.update().where(table.c.id == job.id).values(lease_until=LONG_AGO))
            job.lease = OVER

    @rule(commit=FREQUENTLY, limit=st.sampled_from([1, 100]))
    def rescue(self, commit: bool, limit: int) -> int:
        lost = sorted((job for job in self.model.jobs.values() if job.lease == OVER), key=lambda job: job.id)[:limit]
        with self.transaction(commit) as connection:
            events = claims.rescue(connection, limit=limit, now=self.now)
        self.told(commit, events)
        assert {event.job_id for event in events} == {job.id for job in lost}
        stopped = "its worker was lost 2 times in a row; perhaps this job is what kills it"
        for job in lost if commit else ():
            job.lose(claims.MAX_RESCUES, REASON, stopped)

    # --- files that go

    @rule(key=rows, commit=FREQUENTLY)
    def delete(self, key: str, commit: bool) -> None:
        if key not in self.model.rows:
            return
        with self.transaction(commit) as connection:
            asset = self.store.get_by_id(connection, self.model.rows[key])
            assert asset is not None
            self.store.verify(asset)
            self.store.delete(connection, asset)
        if commit:
            del self.model.rows[key]
            self.model.records[key] = type(self.model).record("tombstone")

    @rule(target=rows, end=ends)
    def find_a_result(self, end: Completion) -> Any:
        return multiple(*(file.object_key for file in end.files if file.object_key in self.model.rows))

    @rule(target=looks, state=st.sampled_from(["pending", "tombstone", "collected"]))
    def see_what_to_sweep(self, state: str) -> Look:
        with self.engine.connect() as connection:
            found = list(self.sweep._due(connection, state, _START, _ALL))
        due = {key for key, record in self.model.records.items() if record.state == state and record.due}
        assert {one.object_key for one in found} == due
        return Look(state, found)

    @rule(target=visits, look=looks)
    def claim_what_was_seen(self, look: Look) -> Look:
        keys = [due.object_key for due in look.found]
        early, hold = self.sweep._early(look.state), 900.0 if look.state == "collected" else 0.0
        with self.transaction() as connection:
            won = set(self.statements.claim_intents(
                connection, keys, provider="memory", state=look.state, early=early, hold=hold
            ))  # fmt: skip
        free = {key for key in keys if (r := self.model.records.get(key)) and r.state == look.state and r.due}
        assert won == free
        for key in free:
            self.model.records[key] = type(self.model).record("collected", due=look.state != "collected")
        return Look(look.state, [due for due in look.found if due.object_key in free])

    @rule(visit=visits)
    def visit_what_was_claimed(self, visit: Look) -> None:
        self.sweep._visit(_Tally(), visit.state, visit.found)
        for due in visit.found:
            self.model.objects.pop(due.object_key, None)
            record = self.model.records.get(due.object_key)
            if visit.state == "collected" and record is not None:
                del self.model.records[due.object_key]

    @rule()
    def let_the_quarantine_pass(self) -> None:
        with self.transaction() as connection:
            connection.execute(
                asset_intents.update().where(asset_intents.c.state == "collected").values(not_before=LONG_AGO)
            )
        for record in self.model.records.values():
            record.due = True

    # --- what holds after every step

    @invariant()
    def rows_and_objects_are_as_the_model_says(self) -> None:
        found, there = read(self.reader), objects(self.url)
        assert there == self.model.objects
        assert broken_laws(found, there) == []
        assert differences(self.model, found, utcnow()) == []
        assert found.events[: len(self.log)] == self.log, "I8: the log changed"
        logged = {event.id: event for event in found.events}
        for event in self.returned:
            assert logged[event.id]._replace(xid=0) == event, "I8: a runner would tell of another event"
        self.returned, self.log = [], found.events
        self._listen()

    def _listen(self) -> None:
        heard, self.cursor = self.statements.scan(self.reader, self.cursor, self.start, 1000)
        self.heard += heard

    def teardown(self) -> None:
        """Whatever happened: healthy workers end every job, and sweeps leave only what has a row."""
        try:
            if not self.model.jobs and not self.model.records:
                return
            self._come_to_rest()
        finally:
            self.reader.close()

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
        taken = self.claim(True, 1000, True)
        self._finish([claims.failed(one, "boom") for one in taken.values], True)
        for state in ("pending", "tombstone", "collected"):
            self.let_the_quarantine_pass()
            self.visit_what_was_claimed(self.claim_what_was_seen(self.see_what_to_sweep(state)))
        self.rows_and_objects_are_as_the_model_says()
        assert not [job for job in self.model.jobs.values() if job.status in ("queued", "running")], "I1"
        assert self.model.objects.keys() == self.model.rows.keys()
        assert not self.model.records, "I7"
        until(self._heard_all, "I9: the cursor reached every event", timeout=60)
        assert sorted(event.id for event in self.heard) == [event.id for event in self.log], "I9"

    def _heard_all(self) -> bool:
        self._listen()
        return len(self.heard) >= len(self.log)
