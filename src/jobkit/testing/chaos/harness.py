"""The harness: carries out a plan, first with faults, then without, and has the outcome judged."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from jobkit.assets.store import AssetStore
from jobkit.errors import ConfigurationError
from jobkit.migrations import upgrade
from jobkit.tables import asset_intents, content_job_events, content_jobs
from jobkit.testing.chaos.checks import TERMINAL, Objects, judge
from jobkit.testing.chaos.evidence import Evidence
from jobkit.testing.chaos.plan import Life, Plan
from jobkit.testing.chaos.processes import Processes
from jobkit.testing.chaos.verdict import Verdict
from jobkit.testing.chaos.workers.points import through
from jobkit.testing.chaos.workers.process import PROVIDER, make_engine
from jobkit.testing.chaos.workers.subscriber import log_of, read_log
from jobkit.testing.faulty import FaultPlan

SUBSCRIBERS = ("subscriber-0", "subscriber-1")
# Most jobs that may wait while faults are due.
BACKLOG = 60
# Further jobs per second while no worker has ended.
TRICKLE = 10
# Seconds for which a frozen worker runs on after it was resumed, before it is asked to stop.
AFTERMATH = 0.5
# Seconds per job that are added to ``patience``.
PER_JOB = 0.05


@dataclass(frozen=True)
class Target:
    """What is put to the test: a database and a storage, both empty, both of no value.

    ``restart`` restarts the database's server, as a crash would, and returns when that answers again. ``setup``: a
    function, as ``module:name``, that is called in the process from which all others are forked. ``workers`` live at a
    time, with ``concurrency`` and ``lease`` of their runners. ``older_than``: of the sweeps, longer than any process is
    frozen. In seconds: ``overdue`` is a life that has not come to its point, and is killed anyhow; ``patience``: how
    long after the last fault all jobs may take to end, and ``PER_JOB`` more for each; ``deadline``: whatever needs no
    luck.
    """

    database: str
    storage: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    restart: Callable[[], object] | None = None
    setup: str = ""
    workers: int = 6
    concurrency: int = 3
    lease: float = 1.5
    db_timeout: float = 5.0
    older_than: float = 20.0
    patience: float = 90.0
    deadline: float = 60.0
    overdue: float = 30.0


class Stuck(Exception):
    """Something did not happen in time."""


def run(target: Target, plan: Plan, folder: Path) -> Verdict:
    """Carry out ``plan`` on ``target`` and judge what came of it. Logs and the whole plan are left in ``folder``.

    ``ConfigurationError`` when the database holds jobs or the storage objects: a run is for what can be thrown away.
    """
    engine = make_engine(target.database, poolclass=sa.NullPool)
    try:
        objects = Objects(target.storage, target.storage_options)
        _require_disposable(engine, objects, target)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(json.dumps(plan.to_dict()), encoding="utf-8")
        evidence = Evidence()
        began = time.monotonic()
        try:
            with Processes(folder, target.database, target.storage, target.setup) as processes:
                _Harness(target, plan, folder, engine, processes, evidence).run()
        except Stuck as stuck:
            evidence.violations.append(f"stuck: {stuck}; where every thread was then is in {folder / 'stderr.log'}")
        evidence.janitor["swept at the end"] = _sweep(engine, target)
        return judge(
            engine,
            objects,
            evidence,
            plan,
            logs={name: read_log(log_of(folder, name)) for name in SUBSCRIBERS},
            seconds=time.monotonic() - began,
            restartable=target.restart is not None,
        )
    finally:
        engine.dispose()


def _require_disposable(engine: sa.Engine, objects: Objects, target: Target) -> None:
    if target.storage.startswith("memory:"):
        raise ConfigurationError("memory:// is every process' own: a run needs a storage that processes share")
    upgrade(engine)
    with engine.connect() as connection:
        jobs = connection.execute(sa.select(sa.func.count()).select_from(content_jobs)).scalar_one()
    if jobs or objects.keys():
        raise ConfigurationError(
            "this database holds jobs, or the storage objects: a run kills whatever uses them, and needs an empty "
            "database and an empty storage that can be thrown away"
        )


def _sweep(engine: sa.Engine, target: Target) -> int:
    """Sweep when nobody is left; how many objects went. No writer can be slow any more, so between the two visits of a
    key there is nothing to wait for, and what a killed janitor held is free.
    """
    swept = 0
    with through(FaultPlan(), target.storage) as url:
        options = dict(target.storage_options) or None
        assets = AssetStore(url, engine=engine, storage_options=options, provider=PROVIDER)
        for _ in range(2):
            with engine.begin() as connection:
                held = asset_intents.update().where(asset_intents.c.state != "pending")
                connection.execute(held.values(not_before=datetime(2000, 1, 1, tzinfo=UTC)))
            report = assets.collect_garbage(older_than=0, dry_run=False)
            swept += report.abandoned + report.deleted
    # Through the workers' own door: the unfinished files of those that were killed last go too.
    AssetStore(target.storage, engine=engine, storage_options=options, provider=PROVIDER).collect_garbage(
        older_than=0, dry_run=False
    )
    return swept


class _Harness:
    def __init__(
        self, target: Target, plan: Plan, folder: Path, engine: sa.Engine, processes: Processes, evidence: Evidence
    ) -> None:
        self._target, self._plan, self._folder = target, plan, folder
        self._engine, self._processes, self._evidence = engine, processes, evidence
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._waiting = deque(plan.lives)
        self._troubles = deque(plan.troubles)
        self._workers: dict[str, Life | None] = {}
        self._helpers: dict[str, int] = {}
        self._killing: set[str] = set()
        self._ready: set[str] = set()
        self._ended = 0
        self._extra = self._postponed = 0
        self._quiet = False
        fifo = folder / "creator.fifo"
        os.mkfifo(fifo)
        # Opened for both, so that neither side waits for the other, and a killed creator ends nothing.
        self._fifo = os.open(fifo, os.O_RDWR)

    def run(self) -> None:
        """Safety: faults. Liveness: no more of them, and every job ends. Then everybody stops."""
        try:
            self._begin()
            self._wait(lambda: not (self._waiting or self._workers), self._longest(), "the lives did not all end")
            self._allow(len(self._plan.orders))
            self._trouble(everything=True)
            self._calm()
            for number in range(self._target.workers):
                self._work(f"healthy-{number}", None)
            patience = self._target.patience + PER_JOB * len(self._plan.orders)
            self._wait(lambda: "creator" not in self._helpers, patience, "the creator did not carry out every order")
            self._wait(lambda: self._unfinished() == 0, patience, "jobs did not end after the last fault")
            self._end()
        finally:
            os.close(self._fifo)

    # --- phases

    def _begin(self) -> None:
        for name in SUBSCRIBERS:
            self._help(name)
        self._wait(lambda: self._ready >= set(SUBSCRIBERS), self._target.deadline, "the subscribers did not start")
        self._help("janitor")
        self._help("creator")
        self._refill()
        self._trickle(0)

    def _calm(self) -> None:
        """From now on only workers rescue the jobs of lost workers."""
        self._wait(
            lambda: not (self._killing or self._postponed), self._target.deadline, "who was killed did not start again"
        )
        self._quiet = True
        self._processes.signal("janitor", signal.SIGTERM)
        self._wait(lambda: "janitor" not in self._helpers, self._target.deadline, "the janitor did not stop")
        self._help("janitor")

    def _end(self) -> None:
        for name in list(self._workers):
            self._processes.signal(name, signal.SIGTERM)
        self._wait(lambda: not self._workers, self._target.deadline, "workers did not stop")
        with self._engine.connect() as connection:
            events = set(connection.execute(sa.select(content_job_events.c.id)).scalars())
        for name in SUBSCRIBERS:
            self._catch_up(name, events)
        for name in list(self._helpers):
            self._processes.signal(name, signal.SIGTERM)
        self._wait(lambda: not self._helpers, self._target.deadline, "subscribers and janitor did not stop")

    def _catch_up(self, name: str, events: set[int]) -> None:
        """Wait until a subscriber has heard all of these, however long it takes, as long as it hears more of them."""
        missing = len(events)

        def fewer() -> bool:
            nonlocal missing
            before, missing = missing, len(events - {line["id"] for line in read_log(log_of(self._folder, name))})
            return missing < before

        while missing:
            self._wait(fewer, self._target.deadline, f"{name} heard none of the last {missing:,} events", often=2.0)

    def _unfinished(self) -> int:
        unfinished = sa.select(sa.func.count()).where(content_jobs.c.status.not_in(TERMINAL))
        with self._engine.connect() as connection:
            return connection.execute(unfinished).scalar_one()

    def _longest(self) -> float:
        """A generous bound for the first phase, in seconds."""
        return 120.0 + 5.0 * len(self._plan.lives) + 30.0 * len(self._plan.troubles)

    # --- time

    def _wait(self, until: Callable[[], bool], seconds: float, failure: str, *, often: float = 0.1) -> None:
        deadline = time.monotonic() + seconds
        looked = 0.0
        while True:
            moment = time.monotonic()
            if moment >= looked + often:
                if until():
                    return
                looked = moment
            if moment > deadline:
                self._look_where_they_are()
                raise Stuck(f"{failure} within {seconds:.0f} s")
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()
            pause = min([often, *(timer[0] - time.monotonic() for timer in self._timers[:1])])
            for message in self._processes.messages(pause):
                self._hear(message)

    def _look_where_they_are(self) -> None:
        for name in (*self._workers, *self._helpers):
            self._processes.signal(name, signal.SIGUSR1)
        until = time.monotonic() + 1.0
        while (left := until - time.monotonic()) > 0:
            deque(self._processes.messages(left), maxlen=0)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), action))

    # --- processes

    def _settings(self) -> dict[str, Any]:
        target = self._target
        return {
            "database": target.database,
            "storage": target.storage,
            "storage_options": dict(target.storage_options),
            "folder": str(self._folder),
        }

    def _help(self, name: str) -> None:
        role = name.partition("-")[0]
        life = self._helpers[name] = next(self._numbers)
        more: dict[str, Any] = {"life": life, "older_than": self._target.older_than, "rescues": not self._quiet}
        if name == "creator":
            more = {"first": self._evidence.order + 1, "allowed": self._allowed()}
        self._processes.start(name, role, self._settings() | more)

    def _work(self, name: str, life: Life | None) -> None:
        target = self._target
        self._workers[name] = life
        self._processes.start(
            name,
            "worker",
            self._settings()
            | {
                "doom": life.doom if life else None,
                "point": life.point if life else None,
                "skip": life.skip if life else 0,
                "fault_rate": life.fault_rate if life else 0.0,
                "seed": self._plan.seed * 1_000_000 + (life.number if life else 0),
                "concurrency": target.concurrency,
                "lease": target.lease,
                "db_timeout": target.db_timeout,
                "patience": 10.0,
            },
        )

    def _refill(self) -> None:
        while self._waiting and len(self._workers) < self._target.workers:
            life = self._waiting.popleft()
            self._work(f"worker-{life.number}", life)

    def _allowed(self) -> int:
        orders, lives = len(self._plan.orders), len(self._plan.lives)
        if self._ended >= lives:
            return orders
        return min(orders, BACKLOG + self._extra + orders * self._ended // lives)

    def _trickle(self, ended: int) -> None:
        """Lives that wait for their point need jobs to come there."""
        if self._waiting or self._workers:
            if self._ended == ended:
                self._extra += TRICKLE
                self._allow(self._allowed())
            now = self._ended
            self._later(1.0, lambda: self._trickle(now))

    def _allow(self, number: int) -> None:
        os.write(self._fifo, b"%d\n" % number)

    # --- what is told

    def _hear(self, message: dict[str, Any]) -> None:
        self._evidence.hear(message)
        name = message["from"]
        if message.get("ready"):
            self._ready.add(name)
            if (life := self._workers.get(name)) is not None:
                self._doom(name, life)
        elif "struck" in message and (life := self._workers.get(name)) is not None and life.doom == "freeze":
            self._evidence.done_to["frozen"] += 1
            latest = time.monotonic() + self._target.older_than / 2
            self._later(life.frozen * self._target.lease, lambda: self._thaw(name, message["pid"], latest))
        elif "heard" in message:
            self._ready.add(f"{name} has heard")
        elif "exit" in message:
            self._gone(name, message["exit"])

    def _doom(self, name: str, life: Life) -> None:
        if life.point is not None:
            self._later(self._target.overdue, lambda: self._overdue(name, life))
        else:
            number = signal.SIGKILL if life.doom == "kill" else signal.SIGTERM
            self._later(life.after, lambda: self._processes.signal(name, number))

    def _overdue(self, name: str, life: Life) -> None:
        if name in self._workers and self._evidence.struck_by.get(name) is None:
            assert life.point is not None
            self._evidence.missed[life.point] += 1
            self._processes.signal(name, signal.SIGKILL)

    def _thaw(self, name: str, pid: int, latest: float) -> None:
        # A zombie is one whose jobs are with others. On a busy machine their rescue takes longer than a lease.
        if time.monotonic() < latest and self._holds_jobs(pid):
            self._later(0.2, lambda: self._thaw(name, pid, latest))
            return
        self._processes.signal(name, signal.SIGCONT)
        self._later(AFTERMATH, lambda: self._processes.signal(name, signal.SIGTERM))

    def _holds_jobs(self, pid: int) -> bool:
        c = content_jobs.c
        mine = sa.select(c.id).where(c.status == "running", c.worker_id.contains(f"-{pid}-")).limit(1)
        try:
            with self._engine.connect() as connection:
                return connection.execute(mine).one_or_none() is not None
        except sa.exc.OperationalError:  # the server restarts
            return True

    def _gone(self, name: str, code: int) -> None:
        if name in self._workers:
            life = self._workers.pop(name)
            self._evidence.end(name, life, code)
            if life is not None:
                self._ended += 1
                self._allow(self._allowed())
                self._trouble()
                self._refill()
            return
        del self._helpers[name]
        self._ready.discard(name)
        killed = name in self._killing and code == -signal.SIGKILL
        self._killing.discard(name)
        if killed:
            self._evidence.done_to[f"{name.partition('-')[0]} killed"] += 1
        elif code:
            self._evidence.violations.append(f"I11: {name} ended by itself with {code}")
        if killed or code:
            self._help(name)

    # --- trouble

    def _trouble(self, *, everything: bool = False) -> None:
        while self._troubles and (everything or self._troubles[0].after_lives <= self._ended):
            trouble = self._troubles.popleft()
            if trouble.what == "restart" and self._target.restart is not None:
                self._target.restart()
                self._evidence.done_to["database restarted"] += 1
            elif trouble.what == "cut" and self._engine.dialect.name == "postgresql":
                self._cut()
            elif trouble.what == "kill":
                self._kill(trouble.whom)

    def _kill(self, name: str) -> None:
        # A subscriber that has heard nothing yet would not know where to take up again.
        deaf = name.startswith("subscriber") and f"{name} has heard" not in self._ready
        if deaf or name not in self._ready or name in self._killing:
            if name in self._helpers:
                self._postponed += 1
                self._later(0.3, lambda: self._try_again(name))
            return
        self._killing.add(name)
        self._processes.signal(name, signal.SIGKILL)

    def _try_again(self, name: str) -> None:
        self._postponed -= 1
        self._kill(name)

    def _cut(self) -> None:
        others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND "
        with self._engine.connect() as connection:
            count = connection.execute(sa.text(others + "datname = current_database()")).scalar_one()
        self._evidence.done_to["connections cut"] += count
        self._evidence.done_to["database cut"] += 1
