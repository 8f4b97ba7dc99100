"""The renderer: a ZIP with a PDF for each branch. Knows nothing of the web.

STORAGE_URL says where files go, any fsspec URL; without it, into a folder.
"""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Iterator

from jobkit import AssetStore, RenderContext, Renderers, Runner
from jobkit.contrib.renderers import pdf_document

from .database import FOLDER, engine

JOB_TYPE = "branch-reports"

assets = AssetStore(os.environ.get("STORAGE_URL") or FOLDER / "fastapi-assets", engine=engine)
renderers = Renderers()
documents = Renderers()
pdf_document.register(documents)


@renderers.register(JOB_TYPE)
def branch_reports(ctx: RenderContext) -> None:
    """One PDF for each branch. The page shows every step; a cancelled job stops at the next."""
    title, branches = ctx.input["title"], ctx.input["branches"]
    with ctx.writer(f"{title}.zip", "application/zip") as file, zipfile.ZipFile(file, "w") as archive:
        for number, branch in enumerate(branches):
            ctx.progress(number / len(branches), f"{branch}, {number + 1} of {len(branches)}")
            archive.writestr(f"{number + 1:02} {branch}.pdf", typeset(ctx, branch))


def typeset(ctx: RenderContext, branch: str) -> bytes:
    lines = "\n".join(f"| {month} | {sold:,} | {returned} |" for month, sold, returned in figures(branch))
    text = f"# {ctx.input['title']}: {branch}\n\n| Month | Sold | Returned |\n|---|--:|--:|\n{lines}\n"
    [pdf] = documents.render(pdf_document.JOB_TYPE, {"markdown": text})
    assert isinstance(pdf.body, bytes)
    return pdf.body


def figures(branch: str) -> Iterator[tuple[str, int, int]]:
    """Made up, but the same each time. Yours come from your tables."""
    made_up = random.Random(branch)
    for month in ("January", "February", "March", "April", "May", "June"):
        sold = made_up.randrange(200, 3000)
        yield month, sold, made_up.randrange(sold // 20)


runner = Runner(engine, assets, renderers)
