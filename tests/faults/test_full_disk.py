"""A disk that is really full: a small file system of memory, mounted for one process in a namespace of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import jobkit
from tests.support.files import intents, rows
from tests.support.runners import seen

Create = Callable[..., jobkit.Job]

MOUNT = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
# Where no file system may be mounted, files at least cannot grow: another error at the same place.
NO_MOUNT = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20)); "

WORK = """
import json, os, sys, tempfile
import sqlalchemy as sa
import jobkit
url, folder, where = sys.argv[1:]
tempfile.tempdir = folder
engine = sa.create_engine(url)
if engine.dialect.name == "sqlite":
    jobkit.configure_sqlite(engine)

def render(ctx):
    for number in range(ctx.input.get("files", 1)):
        yield jobkit.Rendered(f"{number}.bin", "text/plain", (b"x" * 65_536 for _ in range(ctx.input["blocks"])))

store = jobkit.AssetStore(where)
# One at a time: whoever writes while another one fills the disk fails too.
renderers = jobkit.Renderers(default=render, describe_error=str)
done = jobkit.Runner(engine, store, renderers, concurrency=1, lease=2).run_until_idle(timeout=60)
base = store.spool_folder().parent
left = [name for _, _, names in os.walk(base) for name in names]
objects = [name for at, _, names in os.walk(folder) for name in names if not at.startswith(str(base))]
print(json.dumps({"done": done, "left": left, "objects": len(objects)}))
engine.dispose()
"""


@cache
def mountable() -> bool:
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=240, check=False).returncode == 0
    except FileNotFoundError:
        return False


def work(url: str, folder: Path, where: str, *, room: str) -> dict[str, Any]:
    """Work on all jobs with ``folder`` on a disk of its own; what is on it afterwards."""
    folder.mkdir()
    code = WORK if mountable() else NO_MOUNT + WORK
    command = [sys.executable, "-c", code, url, str(folder), where]
    if mountable():
        command = ["unshare", "-Urm", "sh", "-c", MOUNT, "sh", room, str(folder), *command]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ran.stdout, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


FULL = "[Errno 28] No space left on device"


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_full_disk_fails_the_jobs_that_do_not_fit_and_leaves_room_for_the_others(
    engine: sa.Engine, database: Any, create: Create, tmp_path: Path, where: str
) -> None:
    jobs = [create(input={"blocks": blocks}) for blocks in (1, 160, 2, 80, 8)]
    folder = tmp_path / "disk"
    found = work(database.url, folder, str(folder) if where == "folder" else "memory://full", room="size=4m")
    assert found == {"done": 5, "left": [], "objects": 3 if where == "folder" else 0}
    full = FULL if mountable() else "[Errno 27] File too large"
    assert [seen(engine, job).error_message for job in jobs] == [None, full, None, full, None]
    assert sorted(row.byte_size >> 16 for row in rows(engine)) == [1, 2, 8]
    assert intents(engine) == {}


def test_a_disk_without_room_for_a_folder_fails_the_job_and_an_intent_names_what_may_be_there(
    engine: sa.Engine, database: Any, create: Create, tmp_path: Path
) -> None:
    job = create(input={"blocks": 1 if mountable() else 80})
    folder = tmp_path / "disk"
    # The root, the folder for unfinished files, this process's, its file: the company's folder is one too many.
    found = work(database.url, folder, str(folder), room="size=4m,nr_inodes=6")
    assert found == {"done": 1, "left": [], "objects": 0}
    assert seen(engine, job).error_message.startswith(FULL if mountable() else "[Errno 27] File too large")
    assert rows(engine) == []
    assert len(intents(engine)) == mountable()
