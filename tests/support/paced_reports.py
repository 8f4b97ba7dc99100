"""The FastAPI example with its typesetter held up: each page waits until the test lets it go, and is noted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from examples.fastapi_app import rendering
from jobkit import RenderContext, UserError

FOLDER = Path(os.environ["PACE"])
typeset = rendering.typeset


def paced(ctx: RenderContext, branch: str) -> bytes:
    with (FOLDER / "noted").open("a") as notes:
        notes.write(json.dumps([os.getpid(), ctx.input["title"], branch]) + "\n")
    while not ((FOLDER / branch).exists() or (FOLDER / "all").exists()):
        ctx.check()
        time.sleep(0.01)
    if branch == "Atlantis":
        raise UserError("Atlantis has sunk")
    return typeset(ctx, branch)


rendering.typeset = paced
runner = rendering.runner

from examples.fastapi_app.main import app  # noqa: E402

__all__ = ["app", "runner"]
