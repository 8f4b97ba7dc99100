"""``jobkit render``: one renderer, without a database."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from jobkit.assets.names import safe_filename
from jobkit.base.text import printable
from jobkit.cli.app import load
from jobkit.cli.output import complain
from jobkit.errors import ConfigurationError
from jobkit.rendering.renderers import Renderers

BUILT_IN = ("pdf_document", "convert", "spreadsheet")


def add(commands: Any) -> None:
    parser = commands.add_parser("render", help="make the files of one job type and input, without a database")
    parser.add_argument("type", metavar="TYPE", help="the job type")
    parser.add_argument("input", metavar="INPUT", help="a JSON file, the job's input; - reads standard input")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="where the files go (default: here)"
    )
    parser.add_argument("--app", metavar="MODULE:RUNNER", help="whose renderers (default: those that come with jobkit)")
    parser.set_defaults(command=_render)


def _render(options: argparse.Namespace) -> int:
    renderers = load(options.app).renderers if options.app else _built_in(options.type)
    try:
        read = sys.stdin.buffer.read() if options.input == "-" else Path(options.input).read_bytes()
        given = json.loads(read)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{options.input} is no JSON: {error}") from error
    try:
        files = renderers.render(options.type, given)
    except Exception as error:
        complain(error)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    for file in files:
        name = _unlike(written, safe_filename(file.filename))
        written.add(name)
        body = cast("bytes", file.body)  # Renderers.render has read it
        path = options.output / name
        path.write_bytes(body)
        print(f"{printable(str(path))}: {printable(file.content_type)}, {len(body):,} bytes")
    return 0


def _unlike(names: set[str], name: str) -> str:
    """``name``, or one like it that is not among ``names``."""
    found, number = name, 1
    while found in names:
        found, number = f"{number}-{name}", number + 1
    return found


def _built_in(job_type: str) -> Renderers:
    """The renderer for ``job_type`` that comes with jobkit, if there is one; its extra has to be installed."""
    renderers = Renderers()
    for name in BUILT_IN:
        module = import_module(f"jobkit.contrib.renderers.{name}")
        if job_type == module.JOB_TYPE:
            module.register(renderers)
    return renderers
