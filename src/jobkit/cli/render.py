"""``jobkit render``: call one renderer, without a database."""

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
    parser = commands.add_parser("render", help="render the files of one job, without a database")
    parser.add_argument("type", metavar="TYPE", help="the job type")
    parser.add_argument("input", metavar="INPUT", help="a JSON file with the job's input; - for standard input")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(), metavar="DIR", help="folder of the files (default: here)"
    )
    parser.add_argument("--app", metavar="MODULE:RUNNER", help="the Runner with the renderers (default: jobkit's own)")
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
    """``name``, with a number before it when ``names`` has it already."""
    found, number = name, 1
    while found in names:
        found, number = f"{number}-{name}", number + 1
    return found


def _built_in(job_type: str) -> Renderers:
    """jobkit's own renderer for ``job_type``, if there is one. Its extra must be installed."""
    renderers = Renderers()
    for name in BUILT_IN:
        module = import_module(f"jobkit.contrib.renderers.{name}")
        if job_type == module.JOB_TYPE:
            module.register(renderers)
    return renderers
