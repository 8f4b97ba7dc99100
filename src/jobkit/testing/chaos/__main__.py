"""``python -m jobkit.testing.chaos``: a run, its plan and its verdict printed; the exit code says whether it holds."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from jobkit.errors import ConfigurationError
from jobkit.testing.chaos import Size, Target, draw, run


def main(arguments: list[str] | None = None) -> int:
    """Run, print, return 0 when every promise was kept and proved, 1 otherwise."""
    parsed = _parser().parse_args(arguments)
    size = Size(**{field.name: getattr(parsed, field.name) for field in fields(Size)})
    plan = draw(random.randrange(1_000_000) if parsed.seed is None else parsed.seed, size)
    print(plan, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="jobkit-chaos-")) if parsed.folder is None else parsed.folder
    print(f"logs are in {folder}", flush=True)
    target = Target(
        parsed.database,
        parsed.storage,
        json.loads(parsed.storage_options),
        restart=parsed.restart and (lambda: subprocess.run(parsed.restart, shell=True, check=True)),
        workers=parsed.workers,
        lease=parsed.lease,
        setup=parsed.setup,
    )
    try:
        verdict = run(target, plan, folder)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    print(verdict)
    if parsed.json is not None:
        parsed.json.write_text(verdict.to_json(), encoding="utf-8")
    return 0 if verdict.holds else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobkit.testing.chaos", description=__doc__)
    parser.add_argument("--database", required=True, help="URL of an empty database that can be thrown away")
    parser.add_argument("--storage", required=True, help="URL of an empty storage that can be thrown away")
    parser.add_argument("--storage-options", default="{}", help="what fsspec needs besides the URL, as JSON")
    parser.add_argument("--restart", metavar="COMMAND", help="restarts the database's server at once, as a crash would")
    parser.add_argument("--setup", default="", metavar="MODULE:FUNCTION", help="called before workers are forked")
    parser.add_argument("--seed", type=int, help="the same seed and sizes give the same plan")
    parser.add_argument("--workers", type=int, default=Target.workers, help="how many live at a time")
    parser.add_argument("--lease", type=float, default=Target.lease, help="in seconds")
    parser.add_argument("--folder", type=Path, help="where the logs go; a new one of the system's otherwise")
    parser.add_argument("--json", type=Path, help="where the verdict goes as JSON")
    for field in fields(Size):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=field.default, help="how many (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
