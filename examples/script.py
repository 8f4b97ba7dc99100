"""jobkit in a bare script: an SQLite file, a folder, a renderer of its own.

    python examples/script.py [FOLDER]

Needs nothing but jobkit. Run it again in the same folder: each run adds a job and its two files.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit

COMPANY = "acme"
SALES = [["tea", 3, 4.5], ["coffee", 2, 7.25], ["cups", 12, 1.1]]


def price_list(ctx: jobkit.RenderContext) -> Iterator[jobkit.Rendered]:
    """A table as CSV, and a note about it. The first file is the job's result; both are its assets."""
    with ctx.writer("prices.csv", "text/csv") as out, io.TextIOWrapper(out, encoding="utf-8", newline="") as text:
        csv.writer(text).writerows([["item", "count", "price"], *ctx.input["rows"]])
    total = sum(count * price for _, count, price in ctx.input["rows"])
    yield jobkit.Rendered("note.txt", "text/plain", f"{len(ctx.input['rows'])} items, {total:.2f} in all\n".encode())


def tell(company_id: str, *, event: jobkit.JobEvent) -> None:
    print(f"{event.seq}  {event.type:<20} {dict(event.payload)}")


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(f"sqlite:///{folder / 'script.db'}")
    jobkit.configure_sqlite(engine)
    jobkit.migrations.upgrade(engine)

    renderers = jobkit.Renderers()
    renderers.register("price-list")(price_list)
    assets = jobkit.AssetStore(folder / "assets", engine=engine)
    runner = jobkit.Runner(engine, assets, renderers)
    for signal in (
        jobkit.signals.content_job_queued,
        jobkit.signals.content_job_running,
        jobkit.signals.content_job_done,
        jobkit.signals.content_job_failed,
    ):
        signal.connect(tell)

    job = runner.submit(COMPANY, job_type="price-list", input={"rows": SALES})
    runner.run_until_idle(timeout=60)

    with Session(engine) as session:
        ended = jobkit.JobStore(session).get_by_id(job.id, company_id=COMPANY)
        files = assets.list_by_job(session, job.id, company_id=COMPANY)
    engine.dispose()
    for file in files:
        assets.verify(file)
        print(f"\n{folder / 'assets' / file.object_key}  ({file.content_type}, {file.byte_size} bytes)")
        with assets.open(file) as body:
            print(body.read().decode(), end="")
    return 0 if ended is not None and ended.status == "done" else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "jobkit-demo")))
