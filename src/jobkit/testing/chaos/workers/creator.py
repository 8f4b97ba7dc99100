"""The creator: a host that creates jobs in its own transactions, of which it rolls some back.

It tells each step before and after it, so what counts as created is judged from outside. Which orders it may carry out
by now, the harness writes into a FIFO.
"""

from __future__ import annotations

import json
import os
import select
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobkit.errors import InvalidTransition, JobNotFound
from jobkit.jobs.store import JobStore
from jobkit.testing.chaos.plan import Order
from jobkit.testing.chaos.workers.process import Process, now
from jobkit.testing.chaos.workers.workload import PREFIX
from jobkit.types import Job

# After so many further orders, a failed or cancelled job is retried by hand.
LATER = 40


@dataclass(frozen=True, slots=True)
class _Tried:
    """An order that was carried out, with the job that is known to be committed."""

    job: Job | None


class _RolledBack(Exception):
    """The host changes its mind."""


def main(process: Process) -> None:
    """Carry out the orders from ``settings["first"]`` on, as far as the FIFO allows."""
    settings = process.settings
    plan = json.loads((process.folder / "plan.json").read_text("utf-8"))
    orders = [Order(**{field.name: order[field.name] for field in fields(Order)}) for order in plan["orders"]]
    creator = _Creator(process, process.engine())
    descriptor = os.open(process.folder / "creator.fifo", os.O_RDONLY | os.O_NONBLOCK)
    process.tell(ready=True)
    allowed, pending = settings["allowed"], b""
    number = settings["first"]
    while number < len(orders) and not process.ends_within(0):
        if number >= allowed:
            select.select([descriptor], [], [], 0.2)
            try:
                *lines, pending = (pending + os.read(descriptor, 65536)).split(b"\n")
            except BlockingIOError:
                continue
            allowed = max([allowed, *map(int, lines)])
            continue
        creator.carry_out(orders[number])
        number += 1
    while number == len(orders) and creator.retries and not process.ends_within(0):
        creator.retry(*creator.retries.pop(0)[1:])
    process.tell(created=number)


class _Creator:
    def __init__(self, process: Process, engine: sa.Engine) -> None:
        self._process, self._engine = process, engine
        self.retries: list[tuple[int, UUID, int]] = []

    def carry_out(self, order: Order) -> None:
        """Create the job, and cancel it at once when that is ordered; retry those whose time has come."""
        while (tried := self._create(order)) is None:  # the database is away
            if self._process.ends_within(0.1):
                return
        job = tried.job
        if job is not None and order.cancelled:
            self._change("cancel", job.id, order.number)
        if job is not None and order.retried:
            self.retries.append((order.number + LATER, job.id, order.number))
        while self.retries and self.retries[0][0] <= order.number:
            self.retry(*self.retries.pop(0)[1:])

    def retry(self, job_id: UUID, number: int) -> None:
        """Retry a job if it failed or was cancelled."""
        self._change("retry", job_id, number)

    def _create(self, order: Order) -> _Tried | None:
        """What came of it; None when the database did not let it be tried."""
        job: Job | None = None
        start = datetime.now(UTC) + timedelta(seconds=order.delay) if order.delay else None
        try:
            with Session(self._engine) as session, session.begin():
                job = JobStore(session).create(
                    order.company,
                    job_type=PREFIX + order.kind,
                    input={"milliseconds": order.milliseconds, "size": order.size}
                    | ({"after": now() + 0.5} if order.kind == "snooze" else {}),
                    source_task_id=f"task-{order.number}",
                    run_at=start,
                    priority=order.priority,
                    idempotency_key=order.key,
                )
                self._process.tell(trying=order.number, job=str(job.id))
                if order.rolled_back:
                    raise _RolledBack
        except _RolledBack:
            self._process.tell(rolled_back=order.number, job=str(job.id) if job else None)
            return _Tried(None)
        except DBAPIError:
            if job is None:
                return None
            self._process.tell(in_doubt=order.number)  # whether it was committed, nobody here knows
            self._process.ends_within(0.1)
            return _Tried(None)
        self._process.tell(acked=order.number, job=str(job.id))
        return _Tried(job)

    def _change(self, what: str, job_id: UUID, number: int) -> None:
        self._process.tell(asking=what, job=str(job_id))
        try:
            with Session(self._engine) as session, session.begin():
                store = JobStore(session)
                store.cancel(job_id) if what == "cancel" else store.retry(job_id)
        except (InvalidTransition, JobNotFound) as error:
            self._process.tell(refused=what, job=str(job_id), words=str(error), gone=isinstance(error, JobNotFound))
        except DBAPIError:
            self._process.ends_within(0.1)
