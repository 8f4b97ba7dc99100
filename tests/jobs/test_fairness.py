"""Which job comes next: its time, its priority, its company's turn; and what that costs with long queues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from jobkit import JobRequest, JobStore
from jobkit.base.clock import utcnow
from jobkit.jobs import claims
from jobkit.jobs.claims import Claim
from jobkit.jobs.fairness import RoundRobin
from tests.support.databases import Database
from tests.support.filled import Spelling, insert
from tests.support.plans import explained
from tests.support.runners import note, only, seen

Create = Callable[..., jobkit.Job]
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def hours(count: float) -> datetime:
    return NOW + timedelta(hours=count)


def take(
    engine: sa.Engine, rotation: RoundRobin, limit: int = 1, *, check_scheduled: bool = True, now: datetime = NOW
) -> list[Claim]:
    with engine.begin() as connection:
        return claims.claim(
            connection, limit=limit, worker_id="w", lease=60.0, now=now,
            pick=lambda c, terms: rotation.claim(c, terms, check_scheduled=check_scheduled),
        )[0]  # fmt: skip


def fill(engine: sa.Engine, company: str, count: int, **options: Any) -> None:
    with engine.begin() as connection:
        JobStore(connection, clock=lambda: NOW).create_many(
            company, (JobRequest("note", {"n": n}, **options) for n in range(count))
        )


def test_a_job_is_not_started_before_its_time(engine: sa.Engine, disk: jobkit.AssetStore, create: Create) -> None:
    times = [NOW]
    runner = jobkit.Runner(engine, disk, only(), clock=lambda: times[0])
    job = create(run_at=hours(1).astimezone(timezone(timedelta(hours=-7))))
    assert (job.run_at, seen(engine, job).run_at) == (hours(1), hours(1))
    for early in (timedelta(hours=1), timedelta(microseconds=1)):
        times[0] = hours(1) - early
        assert runner.run_until_idle(timeout=60) == 0
        assert (seen(engine, job).status, seen(engine, job).fence) == ("queued", 0)
    times[0] = hours(1)
    assert runner.run_until_idle(timeout=60) == 1
    assert seen(engine, job).started_at == hours(1)


def test_a_runner_whose_clock_is_ahead_starts_no_job_before_its_time(engine: sa.Engine) -> None:
    ahead = utcnow() + timedelta(hours=1)
    with engine.begin() as connection:
        early = JobStore(connection).create("acme", job_type="note", run_at=ahead - timedelta(minutes=30))
        due = JobStore(connection).create("acme", job_type="note", run_at=utcnow() - timedelta(seconds=1))
    found = take(engine, RoundRobin(engine, wall_clock=True), 9, now=ahead)
    assert [claim.job_id for claim in found] == [due.id]
    found = take(engine, RoundRobin(engine), 9, now=ahead)  # a clock of tests decides by itself
    assert [claim.job_id for claim in found] == [early.id]


@pytest.mark.parametrize(
    ("run_at", "due"),
    [(datetime(1, 1, 2, tzinfo=UTC), 1), (NOW - timedelta(days=9999), 1), (datetime(9999, 12, 30, tzinfo=UTC), 0)],
)
def test_a_time_may_be_far_away(
    run_at: datetime, due: int, engine: sa.Engine, disk: jobkit.AssetStore, create: Create
) -> None:
    job = create(run_at=run_at)
    assert seen(engine, job).run_at == run_at
    assert jobkit.Runner(engine, disk, only()).run_until_idle(timeout=60) == due


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"run_at": datetime(2030, 1, 1)}, ValueError),
        ({"run_at": "2030-01-01T00:00Z"}, TypeError),
        ({"run_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))}, ValueError),
        ({"priority": True}, TypeError),
        ({"priority": "1"}, TypeError),
        ({"priority": 1.0}, TypeError),
        ({"priority": None}, TypeError),
        ({"priority": 2**31}, ValueError),
        ({"priority": -(2**31)}, ValueError),
    ],
)
def test_what_is_no_time_or_priority_is_refused(options: Any, error: type[Exception], create: Create) -> None:
    with pytest.raises(error, match=next(iter(options))):
        create(**options)


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
def test_within_a_company_priority_then_time_then_creation(limit: int, engine: sa.Engine) -> None:
    created = iter(hours(n - 100) for n in range(100))
    wanted = {
        "plain": {}, "late, due": {"run_at": hours(-1)}, "early, due": {"run_at": hours(-99.5)},
        "second": {}, "high": {"priority": 2**31 - 1}, "high, due": {"priority": 2**31 - 1, "run_at": hours(-0.5)},
        "low": {"priority": -(2**31) + 1}, "low, due": {"priority": -5, "run_at": hours(-50)},
        "high, not due": {"priority": 7, "run_at": hours(1)},
    }  # fmt: skip
    for name, options in wanted.items():
        with engine.begin() as connection:
            JobStore(connection, clock=lambda: next(created)).create(
                "acme", job_type="note", input={"name": name}, **options
            )
    rotation, order = RoundRobin(engine), []
    while found := take(engine, rotation, limit):
        order += [claim.input["name"] for claim in found] if limit == 1 else [frozenset(c.input["name"] for c in found)]
    expected = ["high", "high, due", "plain", "early, due", "second", "late, due", "low, due", "low"]
    if limit == 1:
        assert order == expected
    else:
        assert order == [frozenset(expected[at : at + limit]) for at in range(0, len(expected), limit)]


LONG = {
    "plain": {},
    "due": {"run_at": hours(-1)},
    "high": {"priority": 100},
    "high, due": {"priority": 100, "run_at": hours(-9)},
}


@pytest.mark.parametrize("limit", [1, 4])
@pytest.mark.parametrize("short", ["plain", "due"])
@pytest.mark.parametrize("long", LONG)
def test_a_company_with_a_long_queue_does_not_hold_up_others(
    long: str, short: str, limit: int, engine: sa.Engine
) -> None:
    fill(engine, "a", 500, **LONG[long])
    for company in ("b", "z"):
        fill(engine, company, 2, **LONG[short])
    rotation, order = RoundRobin(engine), []
    while len(order) < 24:
        found = take(engine, rotation, limit)
        assert len(found) == limit
        order += [claim.company_id for claim in found]
    assert sorted(company for company in order if company != "a") == ["b", "b", "z", "z"]


def test_a_company_with_both_kinds_shares_its_turn_and_a_late_comer_gets_one(engine: sa.Engine) -> None:
    fill(engine, "a", 300)
    fill(engine, "a", 300, run_at=hours(-1))
    rotation = RoundRobin(engine)
    for _ in range(5):
        take(engine, rotation, 2)
    fill(engine, "late", 1)
    fill(engine, "late too", 1, run_at=hours(-1))
    rotation._listed_at = rotation._due_at = float("-inf")  # a second later
    companies = [claim.company_id for _ in range(4) for claim in take(engine, rotation, 2)]
    assert {"late", "late too"} < set(companies)


def test_several_runners_take_every_job_once_and_go_round_the_companies(engine: sa.Engine, database: Database) -> None:
    for company, count in (("a", 120), ("b", 4), ("c", 4)):
        fill(engine, company, count)
        fill(engine, company, count, run_at=hours(-1))
    runners = [(database.connect(), RoundRobin(engine)) for _ in range(3)]
    order: list[Claim] = []
    while True:
        rounds = [claim for mine, rotation in runners for claim in take(mine, rotation, 4)]
        if not rounds:
            break
        order += rounds
    assert len(order) == len({claim.job_id for claim in order}) == 256
    assert max(n for n, claim in enumerate(order) if claim.company_id != "a") < 80


def test_neither_kind_starves_while_jobs_keep_coming(engine: sa.Engine) -> None:
    fill(engine, "a", 40)
    fill(engine, "b", 1, run_at=hours(-1))
    rotation, order = RoundRobin(engine), []
    for _ in range(10):
        order += [claim.company_id for claim in take(engine, rotation, 2, check_scheduled=False)]
        fill(engine, "a", 2)
    assert "b" in order[:4]


def test_a_run_with_both_kinds_and_the_future(engine: sa.Engine, disk: jobkit.AssetStore) -> None:
    for company in ("a", "b"):
        fill(engine, company, 20)
        fill(engine, company, 20, run_at=hours(-1), priority=1)
        fill(engine, company, 20, run_at=hours(1), priority=9)
    order: list[tuple[str, int]] = []

    def render(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        order.append((ctx.company_id, ctx.input["n"]))
        return note(ctx)

    runner = jobkit.Runner(engine, disk, only(render), concurrency=3, clock=lambda: NOW)
    assert runner.run_until_idle(timeout=60) == 80
    assert len(order) == 80


# --- any number of companies and jobs


def fill_many(engine: sa.Engine, company: str, numbers: range, **columns: str) -> None:
    """A queued job for each number ``i``, of the company that ``company`` says as SQL; ``run_at`` as minutes."""
    spelled = Spelling(engine.dialect.name)
    values = {"id": spelled.id("i"), "job_type": "'note'", "company_id": company, "event_seq": "1", **columns}
    if "run_at" in columns:
        values["run_at"] = spelled.time(columns["run_at"])
    with engine.begin() as connection:
        insert(connection, "content_jobs", numbers, **values)


def gather(engine: sa.Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")


@pytest.mark.parametrize("kind", ["plain", "due", "both"])
def test_ten_thousand_companies_with_backlogs_have_their_first_job_within_one_round(
    kind: str, engine: sa.Engine
) -> None:
    due = {"run_at": "-1"}
    fill_many(engine, "'c' || (i % 10000)", range(1, 20_001), **(due if kind == "due" else {}))
    if kind == "both":
        fill_many(engine, "'c' || (i % 10000)", range(20_001, 30_001), **due)
    gather(engine)
    rotation = RoundRobin(engine)
    take(engine, rotation)  # the first claim of a runner cannot know that more jobs wait than it takes
    round_ = Counter(claim.company_id for _ in range(100) for claim in take(engine, rotation, 100))
    assert (len(round_), sum(round_.values())) == (10_000, 10_000)


@pytest.mark.parametrize("others", ["plain", "due", "not yet due"])
def test_two_hundred_thousand_due_jobs_of_one_company_hold_up_no_other(others: str, engine: sa.Engine) -> None:
    fill_many(engine, "'m'", range(1, 200_001), run_at="-100", priority="i % 5")
    waits = {"plain": {}, "due": {"run_at": "-1"}, "not yet due": {"run_at": "1000000 + i"}}[others]
    fill_many(engine, "'c' || i", range(1_000_000, 1_003_000), **waits)
    fill(engine, "z", 2, run_at=hours(-1), priority=-9)
    fill(engine, "a", 2, priority=-9)
    gather(engine)
    rotation, order = RoundRobin(engine), list[Claim]()
    round_ = 3 if others == "not yet due" else 3_003
    while len(order) < round_:
        order += take(engine, rotation, min(20, round_ - len(order)))
    by_company = Counter(claim.company_id for claim in order)
    assert len(by_company) == round_
    assert by_company["m"] == by_company["z"] == by_company["a"] == 1
    assert seen(engine, next(claim.job_id for claim in order if claim.company_id == "m")).priority == 4


def test_a_company_that_comes_while_a_round_goes_on_has_its_turn_within_the_next(engine: sa.Engine) -> None:
    fill_many(engine, "'c' || (i % 3000)", range(1, 9_001))
    rotation = RoundRobin(engine)
    order = [claim.company_id for _ in range(10) for claim in take(engine, rotation, 100)]
    fill(engine, "a late one", 1)
    order = [claim.company_id for _ in range(31) for claim in take(engine, rotation, 100)]
    assert "a late one" in order


def test_priority_decides_within_a_company_only(engine: sa.Engine) -> None:
    fill(engine, "a", 50, priority=100)
    fill(engine, "b", 50, priority=100, run_at=hours(-1))
    fill(engine, "c", 1, priority=-100)
    fill(engine, "c", 1, priority=5, run_at=hours(-1))
    rotation = RoundRobin(engine)
    order = [claim for _ in range(2) for claim in take(engine, rotation, 3)]
    assert Counter(claim.company_id for claim in order) == {"a": 2, "b": 2, "c": 2}
    assert [seen(engine, claim.job_id).priority for claim in order if claim.company_id == "c"] == [5, -100]


# --- what it costs


@pytest.mark.parametrize("due", [True, False])
def test_a_hundred_thousand_scheduled_jobs_are_never_read_or_sorted_by_a_claim(due: bool, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        for company in range(20):
            JobStore(connection, notify=False).create_many(
                f"c{company}",
                (JobRequest("note", run_at=hours(1 + n), priority=n % 3) for n in range(5_000)),
            )
    fill(engine, "c3", 30)
    if due:
        fill(engine, "c4", 10, run_at=hours(-1))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE"))
    rotation = RoundRobin(engine)
    with explained(engine) as found:
        companies = [claim.company_id for _ in range(3) for claim in take(engine, rotation, 4)]
    assert set(companies) == ({"c3", "c4"} if due else {"c3"})
    assert "content_jobs: index content_jobs_due_idx" in found
    assert "content_jobs: all" not in found
    steps = count_rows_read(engine, rotation)
    assert steps < 2_000


def count_rows_read(engine: sa.Engine, rotation: RoundRobin) -> float:
    """How much a claim reads: rows on PostgreSQL, hundreds of the virtual machine's instructions on SQLite."""
    if engine.dialect.name == "sqlite":
        steps = [0]
        with engine.begin() as connection:
            driver: Any = connection.connection.driver_connection
            driver.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 100)
            try:
                claims.claim(connection, limit=4, worker_id="w", lease=60.0, now=NOW,
                             pick=lambda c, terms: rotation.claim(c, terms, check_scheduled=True))  # fmt: skip
            finally:
                driver.set_progress_handler(None, 0)
        return steps[0]
    query = sa.text(
        "SELECT coalesce(sum(idx_tup_fetch), 0) + coalesce(sum(seq_tup_read), 0) FROM pg_stat_xact_user_tables "
        "WHERE relname = 'content_jobs'"
    )
    with engine.begin() as connection:
        claims.claim(connection, limit=4, worker_id="w", lease=60.0, now=NOW,
                     pick=lambda c, terms: rotation.claim(c, terms, check_scheduled=True))  # fmt: skip
        return float(connection.execute(query).scalar_one())
