"""The demo: renders a Markdown document as a PDF, with an SQLite file and a folder."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from sqlalchemy.orm import Session

from jobkit import migrations, signals
from jobkit.assets.store import AssetStore
from jobkit.contrib.renderers import pdf_document
from jobkit.db.sqlite import configure_sqlite
from jobkit.jobs.store import JobStore
from jobkit.rendering.renderers import Renderers
from jobkit.runner.runner import Runner
from jobkit.types import JobEvent, JobStatus

COMPANY = "demo"
REPORT = Path(__file__).with_name("report.md")


def run(directory: Path, document: Path | None = None) -> int:
    """Render ``document`` as a PDF in ``directory`` and print its path; 0, or 1 when the job failed.

    Each run in the same directory adds a job and its file.
    """
    source = document or REPORT
    markdown = source.read_text(encoding="utf-8")
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    database, folder = directory / "jobkit.db", directory / "assets"
    print(f"database  {database}\nassets    {folder}\ndocument  {source} ({len(markdown.encode()):,} bytes)\n")

    engine = sa.create_engine(sa.URL.create("sqlite", database=str(database)))
    configure_sqlite(engine)
    migrations.upgrade(engine)
    renderers = Renderers()
    pdf_document.register(renderers)
    assets = AssetStore(folder)
    runner = Runner(engine, assets, renderers)

    start = time.monotonic()

    def show(event: JobEvent) -> None:
        rest = ", ".join(f"{name} {value}" for name, value in event.payload.items())
        print(f"{time.monotonic() - start:6.2f} s  {event.type:<20} {rest}")

    unsubscribe = signals.subscribe(COMPANY, show)
    try:
        with runner:
            job = runner.submit(COMPANY, job_type=pdf_document.JOB_TYPE, input={"markdown": markdown})
            runner.run_until_idle(timeout=60)
    finally:
        unsubscribe()
    with Session(engine) as session:
        done = JobStore(session).get_by_id(job.id, company_id=COMPANY)
        files = assets.list_by_job(session, job.id, company_id=COMPANY)
    engine.dispose()
    if done is None or done.status is not JobStatus.DONE:
        print(f"\nThe job failed: {done.error_message if done else 'it is gone'}")
        return 1
    viewer = {"darwin": "open", "win32": "start"}.get(sys.platform) or os.environ.get("BROWSER") or "xdg-open"
    for asset in files:
        assets.verify(asset)
        path = Path(unquote(urlsplit(folder.as_uri()).path), *asset.object_key.split("/"))
        print(f"\nThe file: {path}\n          {asset.byte_size:,} bytes, sha256 {asset.sha256[:16]}… verified")
        print(f"To see it: {viewer} {shlex.quote(str(path))}")
    return 0
