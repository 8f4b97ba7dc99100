"""The plan of a chaos run, what it refuses to run on, and what a verdict says of a run in which too little happened."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

import jobkit
from jobkit.testing.chaos import Size, Target, draw, run
from jobkit.testing.chaos.__main__ import main
from jobkit.testing.chaos.checks import Objects, judge
from jobkit.testing.chaos.evidence import Evidence
from jobkit.testing.chaos.plan import FREEZE_POINTS, POINTS
from jobkit.testing.chaos.workers.subscriber import read_log

NOTHING = Size(
    *(0,) * len(Size.__dataclass_fields__)  # no jobs, no faults
)


def test_the_same_seed_and_size_give_the_same_plan_and_another_seed_another() -> None:
    size = Size(jobs=300)
    assert draw(7, size) == draw(7, size)
    assert str(draw(7, size)) == str(draw(7, size))
    assert draw(7, size).lives != draw(8, size).lives
    assert draw(7, size).orders != draw(8, size).orders


def test_a_plan_has_what_its_size_says_and_kills_at_every_point() -> None:
    size = Size()
    plan = draw(1, size)
    dooms = [life.doom for life in plan.lives]
    assert (dooms.count("kill"), dooms.count("freeze"), dooms.count("stop")) == (200, 40, 10)
    points = [life.point for life in plan.lives if life.doom == "kill"]
    assert min(points.count(point) for point in POINTS) >= 11
    assert points.count(None) == 67
    assert {life.point for life in plan.lives if life.doom == "freeze"} == set(FREEZE_POINTS)
    assert sum(not order.rolled_back for order in plan.orders) >= 2_000
    assert sum(order.rolled_back for order in plan.orders) > 100
    assert [trouble.what for trouble in plan.troubles].count("restart") == 3


def test_a_plan_is_printed_in_full() -> None:
    plan = draw(3, Size(jobs=50, kills=20, zombies=4))
    lines = str(plan).splitlines()
    assert lines[0].startswith("seed 3: 50 jobs, 20 kills, 4 zombies")
    assert len(lines) == 2 + len(plan.lives) + len(plan.troubles)
    assert any(re.fullmatch(r"life \d+: freeze at \S+, passed \d times, for \d\.\d+ leases.*", line) for line in lines)


def test_a_key_is_asked_for_again_with_the_same_input() -> None:
    orders = draw(1, Size()).orders
    keyed = [order for order in orders if order.key is not None]
    again = [order for order in keyed if order.key != f"key-{order.number}"]
    assert len(again) > 20
    by_key = {order.key: order for order in keyed if order.key == f"key-{order.number}"}
    for order in again:
        former = by_key[order.key]
        assert replace(order, number=former.number, cancelled=former.cancelled, retried=former.retried) == former


def test_a_database_with_a_job_is_refused_and_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    engine = sa.create_engine(url)
    jobkit.configure_sqlite(engine)
    jobkit.migrations.upgrade(engine)
    with engine.begin() as connection:
        job = jobkit.JobStore(connection).create("acme", job_type="note")
    with pytest.raises(jobkit.ConfigurationError, match="holds jobs"):
        run(Target(url, (tmp_path / "assets").as_uri()), draw(1, NOTHING), tmp_path / "run")
    with engine.connect() as connection:
        assert jobkit.JobStore(connection).get_by_id(job.id) == job
    engine.dispose()


def test_a_storage_with_an_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "precious").write_bytes(b"x")
    with pytest.raises(jobkit.ConfigurationError, match="holds jobs, or the storage objects"):
        run(
            Target(f"sqlite:///{tmp_path / 'jobs.db'}", (tmp_path / "assets").as_uri()),
            draw(1, NOTHING),
            tmp_path / "r",
        )
    assert (tmp_path / "assets" / "precious").exists()


def test_a_storage_that_processes_do_not_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(jobkit.ConfigurationError, match="memory"):
        run(Target(f"sqlite:///{tmp_path / 'jobs.db'}", "memory://x"), draw(1, NOTHING), tmp_path / "run")


def test_a_run_in_which_too_little_happened_proves_nothing(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'jobs.db'}")
    jobkit.migrations.upgrade(engine)
    evidence = Evidence()
    evidence.created = 0
    plan = replace(draw(1, Size(jobs=0, restarts=1)), orders=())
    objects = Objects((tmp_path / "assets").as_uri(), {})
    verdict = judge(engine, objects, evidence, plan, logs={"subscriber-0": []}, seconds=1.0, restartable=True)
    engine.dispose()
    assert verdict.violations == ()
    assert not verdict.holds
    assert "NOT PROVED" in str(verdict)
    told = " ".join(verdict.lacks)
    for point in POINTS:
        assert f"nobody was killed or frozen at {point}" in told
    for words in ("0 of 40 zombies", "0 zombie writes", "0 of 200 times: killed", "0 of 100 storage faults"):
        assert words in told
    assert "nothing to sweep" in told


def test_a_line_that_a_kill_cut_off_was_not_heard(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b'{"id": 1}\n{"id": 2}\n{"id": 3, "se')
    assert read_log(log) == [{"id": 1}, {"id": 2}]
    assert read_log(tmp_path / "none") == []


@pytest.mark.timeout(240)
def test_a_run_from_the_command_line_prints_its_plan_and_its_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"jobs": 60, "kills": 7, "zombies": 0, "stops": 1, "storage-faults": 0, "subscriber-kills": 1}
    sizes |= {"janitor-kills": 1, "creator-kills": 1, "seed": 4}
    code = main(
        [
            *("--database", f"sqlite:///{tmp_path / 'jobs.db'}", "--storage", (tmp_path / "assets").as_uri()),
            *("--json", str(tmp_path / "verdict.json"), "--folder", str(tmp_path / "run")),
            *(word for name, number in sizes.items() for word in (f"--{name}", str(number))),
        ]
    )
    told = capsys.readouterr().out
    assert code == 0, told
    assert told.startswith("seed 4: 60 jobs, 7 kills")
    assert "life 7: " in told
    assert "every promise was kept" in told
    assert '"holds": true' in (tmp_path / "verdict.json").read_text()
    again = main(["--database", f"sqlite:///{tmp_path / 'jobs.db'}", "--storage", (tmp_path / "assets").as_uri()])
    assert again == 2
