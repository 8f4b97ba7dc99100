"""A worker with jobkit: a started runner as it is by default."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

import jobkit
from tests.benchmarks.measuring import until
from tests.benchmarks.workers.files import content
from tests.benchmarks.workers.report import Report


def work(url: str, root: Path, jobs: int, report: Report) -> None:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        jobkit.configure_sqlite(engine)
    renderers = jobkit.Renderers()

    @renderers.register("note")
    def note(ctx: jobkit.RenderContext) -> jobkit.Rendered:
        report.begin()
        return jobkit.Rendered("note.txt", "text/plain", content(ctx.input["n"]))

    with jobkit.Runner(engine, jobkit.AssetStore(root, engine=engine), renderers) as runner:
        until(lambda: runner.metrics().ended >= jobs)
        report.end(jobs)
    engine.dispose()
