"""The plan: everything that will be done to the workers, and every job they get, drawn from one seed beforehand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

# Points where a worker may be killed, in the order in which a job passes them.
POINTS = (
    *("claim.before_commit", "claim.after_commit"),
    *("renderer.start", "renderer.half", "renderer.end"),
    *("intents.before_commit", "intents.after_commit"),
    *("storage.before", "storage.after"),
    *("finish.before_commit", "finish.after_commit"),
    "receiver",
)
# Points where a worker may be frozen: it holds a job there.
FREEZE_POINTS = ("renderer.half", "renderer.half", "renderer.half", "storage.before", "storage.after")
COMPANIES = ("acme", "globex", "initech", "umbrella", "hooli")
# Files of a job of each kind, and the weight with which the kind is drawn.
FILES = {"note": 1, "album": 3, "slow": 1, "flaky": 1, "snooze": 1, "async": 2, "fail": 0, "discard": 0}
_WEIGHTS = (34, 20, 16, 8, 4, 10, 5, 3)


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything a run has. ``cuts``: how often every connection to the database is terminated; that and
    ``restarts`` count for PostgreSQL only. ``storage_faults``: at least so many calls of the storage fail.
    """

    jobs: int = 2_000
    kills: int = 200
    zombies: int = 40
    stops: int = 10
    restarts: int = 3
    cuts: int = 5
    storage_faults: int = 100
    subscriber_kills: int = 20
    janitor_kills: int = 5
    creator_kills: int = 5


@dataclass(frozen=True, slots=True)
class Life:
    """One worker process from start to end.

    ``doom``: ``kill`` at a ``point`` after passing it ``skip`` times, or without one at a moment ``after`` so many
    seconds; ``freeze`` at a point for ``frozen`` leases; ``stop`` by SIGTERM. ``fault_rate``: how likely each call of
    its storage fails.
    """

    number: int
    doom: str
    point: str | None
    skip: int
    after: float
    frozen: float
    fault_rate: float

    def __str__(self) -> str:
        at = f"at {self.point}, passed {self.skip} times" if self.point else f"after {self.after:.2f} s"
        lasting = f", for {self.frozen:.2f} leases" if self.doom == "freeze" else ""
        faults = f", storage fails {self.fault_rate:.0%}" if self.fault_rate else ""
        return f"life {self.number}: {self.doom} {at}{lasting}{faults}"


@dataclass(frozen=True, slots=True)
class Order:
    """A job that the creator asks for, in a transaction that is rolled back or not; with what follows."""

    number: int
    company: str
    kind: str
    milliseconds: int
    size: int
    priority: int
    delay: float
    key: str | None
    rolled_back: bool
    cancelled: bool
    retried: bool


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens once so many lives have ended: ``restart`` or ``cut`` of the database, or ``kill`` of a process."""

    after_lives: int
    what: str
    whom: str = "database"

    def __str__(self) -> str:
        return f"after {self.after_lives} lives: {self.what} {self.whom}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will happen, the same for the same seed and size; ``str`` of it shows all faults."""

    seed: int
    size: Size
    lives: tuple[Life, ...]
    troubles: tuple[Trouble, ...]
    orders: tuple[Order, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _lines(self) -> Iterator[str]:
        yield f"seed {self.seed}: " + ", ".join(f"{count} {name}" for name, count in asdict(self.size).items())
        kinds = [order.kind for order in self.orders]
        yield "jobs: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in FILES)
        yield from map(str, self.lives)
        yield from map(str, self.troubles)


def draw(seed: int, size: Size) -> Plan:
    """The plan of this seed and size."""
    source = random.Random(f"jobkit chaos {seed}")
    dooms = ["kill"] * size.kills + ["freeze"] * size.zombies + ["stop"] * size.stops
    source.shuffle(dooms)
    # Every third kill comes at any moment; the others go round the points, so that each has its share.
    turns = itertools.cycle(POINTS)
    points = [next(turns) if number % 3 else None for number in range(size.kills)]
    source.shuffle(points)
    rates = (0.0, 0.05, 0.1, 0.15) if size.storage_faults else (0.0,)
    lives = tuple(_life(number, doom, points, rates, source) for number, doom in enumerate(dooms))
    # Whatever strikes the creator may cost it the job that it is about to create.
    spare = 2 * (size.creator_kills + size.restarts + size.cuts)
    return Plan(seed, size, lives, _troubles(size, len(lives), source), _orders(size.jobs + spare, source))


def _life(number: int, doom: str, points: list[str | None], rates: tuple[float, ...], source: random.Random) -> Life:
    point = points.pop() if doom == "kill" else source.choice(FREEZE_POINTS) if doom == "freeze" else None
    return Life(
        number=number,
        doom=doom,
        point=point,
        skip=source.choice((0, 1, 2, 4, 7)),
        after=round(source.uniform(0.0, 1.0) ** 2, 3),
        frozen=round(source.uniform(1.7, 2.6), 3),
        fault_rate=source.choice(rates),
    )


def _troubles(size: Size, lives: int, source: random.Random) -> tuple[Trouble, ...]:
    wanted = [("restart", "database")] * size.restarts + [("cut", "database")] * size.cuts
    wanted += [("kill", f"subscriber-{n % 2}") for n in range(size.subscriber_kills)]
    wanted += [("kill", "janitor")] * size.janitor_kills + [("kill", "creator")] * size.creator_kills
    found = [Trouble(source.randrange(1, max(2, lives)), what, whom) for what, whom in wanted]
    return tuple(sorted(found, key=lambda trouble: trouble.after_lives))


def _orders(jobs: int, source: random.Random) -> tuple[Order, ...]:
    orders: list[Order] = []
    created = 0
    while created < jobs:
        number, [kind] = len(orders), source.choices(list(FILES), _WEIGHTS)
        # Some ask again with a key that was used just before, and get that job.
        former = orders[-1] if orders else None
        repeats = former is not None and former.key is not None and not former.rolled_back and source.random() < 0.3
        if former is not None and repeats:
            orders.append(_again(former, number))
            continue
        orders.append(
            Order(
                number=number,
                company=source.choice(COMPANIES),
                kind=kind,
                milliseconds=source.randrange(150, 400) if kind == "slow" else source.randrange(0, 30),
                size=source.choice((100, 5_000, 70_000)),
                priority=source.choice((0, 0, 0, 5, -5)),
                delay=source.choice((0.0,) * 9 + (0.5,)),
                key=f"key-{number}" if source.random() < 0.15 and kind != "snooze" else None,
                rolled_back=source.random() < 0.1,
                cancelled=source.random() < 0.05,
                retried=source.random() < 0.3,
            )
        )
        created += not orders[-1].rolled_back
    return tuple(orders)


def _again(former: Order, number: int) -> Order:
    return Order(**{**asdict(former), "number": number, "rolled_back": False, "cancelled": False, "retried": False})
