"""``jobkit assets verify`` and ``jobkit assets gc``, as an operator runs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from jobkit import AssetStore
from jobkit.cli import main
from jobkit.maintenance import audit
from jobkit.tables import assets as rows_of_assets
from tests.cli.test_commands import APP, jobkit_command
from tests.support.databases import Database
from tests.support.files import intents, keep, objects, put
from tests.support.sweeping import DAY, age, delete


@pytest.fixture
def run(database: Database, tmp_path: Path) -> Any:
    """Run a command on the app of ``test_cli``, whose assets are those of the fixture ``disk``."""
    (tmp_path / "app.py").write_text(APP)
    url = database.engine.url.render_as_string(hide_password=False)

    def run(*arguments: str) -> tuple[int, str]:
        ran = jobkit_command("assets", *arguments, "--app", "app:make", cwd=tmp_path, APP_DATABASE=url)
        assert "Traceback" not in ran.stderr
        return ran.returncode, ran.stdout + ran.stderr

    return run


def test_verify_reads_every_asset_and_says_which_are_bad(
    run: Any, disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    good, cut, gone = keep(disk, engine), keep(disk, engine), keep(disk, engine, company="globex")
    assert run("verify") == (0, "3 assets read, all as their rows say\n")
    (tmp_path / "assets" / cut.object_key).write_bytes(b"cut")
    (tmp_path / "assets" / gone.object_key).unlink()
    status, told = run("verify")
    assert status == 1
    assert "3 assets read, 2 bad" in told
    assert re.search(rf"^{re.escape(cut.object_key)}: .*3 bytes", told, re.MULTILINE)
    assert re.search(rf"^{re.escape(gone.object_key)}: .*no object", told, re.MULTILINE)
    assert good.object_key not in told
    assert run("verify", "--company", "globex")[1].endswith("1 assets read, 1 bad\n")
    assert run("verify", "--company", "nobody") == (0, "0 assets read, all as their rows say\n")


def test_assets_of_another_storage_are_told_not_read(
    run: Any, disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    keep(AssetStore(tmp_path / "other", engine=engine, provider="archive"), engine)
    status, told = run("verify")
    assert status == 0
    assert "1 assets are in storage 'archive'" in told


def test_an_audit_goes_through_all_pages_and_leaves_out_what_is_deleted_meanwhile(
    disk: AssetStore, engine: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "PAGE", 3)
    kept = [keep(disk, engine, company=f"company-{number % 3}") for number in range(10)]
    found = audit.audit(engine, disk)
    first = next(found)
    victim = next(asset for asset in reversed(kept) if asset.id != first.asset.id and asset.company_id == "company-0")
    delete(disk, engine, victim)
    disk.collect_garbage(dry_run=False)
    findings = [first, *found]
    assert {f.asset.id for f in findings} == {asset.id for asset in kept} - {victim.id}
    assert [f.problem for f in findings if f.problem] == []


def test_an_audit_survives_whatever_the_storage_raises(
    disk: AssetStore, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(disk, engine)
    with engine.begin() as connection:
        connection.execute(rows_of_assets.update().values(object_key="elsewhere/x/a.txt"))
    keep(disk, engine)
    problems = [finding.problem for finding in audit.audit(engine, disk)]
    assert sorted(bool(problem) for problem in problems) == [False, True]
    monkeypatch.setattr(AssetStore, "verify", lambda *_: 1 / 0)
    assert [finding.problem for finding in audit.audit(engine, disk)].count("division by zero") == 2


def test_gc_tells_first_and_removes_only_with_yes(
    run: Any, disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    kept, young, gone = keep(disk, engine), put(disk), keep(disk, engine, b"deleted")
    delete(disk, engine, gone)
    before = intents(engine)
    status, told = run("gc")
    assert status == 0
    assert "0 abandoned, 1 deleted, 7 bytes" in told
    assert gone.object_key in told
    assert "nothing was changed" in told
    assert (intents(engine), len(objects((tmp_path / "assets").as_uri()))) == (before, 3)
    status, told = run("gc", "--yes", "--older-than", "0.5")
    assert (status, intents(engine)) == (0, {young.object_key: "pending", gone.object_key: "collected"})
    assert "1 deleted" in told
    assert "nothing was changed" not in told
    assert "1 abandoned, 0 deleted" in run("gc", "--yes", "--older-than", "0")[1]
    age(engine, DAY)
    assert "records of earlier sweeps: 2" in run("gc", "--yes")[1]
    assert (intents(engine), list(objects((tmp_path / "assets").as_uri()))) == ({}, [kept.object_key])


def test_gc_exits_with_1_when_something_could_not_be_removed(
    run: Any, disk: AssetStore, engine: sa.Engine, tmp_path: Path
) -> None:
    stored = put(disk)
    (tmp_path / "assets" / stored.object_key).unlink()
    (tmp_path / "assets" / stored.object_key / "in the way").mkdir(parents=True)
    status, told = run("gc", "--yes", "--older-than", "0")
    assert status == 1
    assert "could not be removed: 1" in told
    assert stored.object_key in told
    assert intents(engine) == {stored.object_key: "tombstone"}


@pytest.mark.parametrize("hours", ["-1", "nan", "soon", "1e99"])
def test_hours_that_are_none_are_refused(hours: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["assets", "gc", "--app", "x:y", f"--older-than={hours}"])
    assert ended.value.code == 2
    assert "hours" in capsys.readouterr().err


def test_without_tables_each_command_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    for command in ("verify", "gc"):
        ran = jobkit_command(
            "assets", command, "--app", "app:runner", cwd=tmp_path, APP_DATABASE=f"sqlite:///{tmp_path}/a.db"
        )
        assert ran.returncode == 2
        assert "jobkit migrate" in ran.stderr
