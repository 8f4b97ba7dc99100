"""``jobkit render``: one renderer, without a database."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from jobkit.cli.app import load
from jobkit.errors import ConfigurationError
from jobkit.keys import safe_filename
from jobkit.renderers import Renderers
from jobkit.text import describe, printable

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
    renderers = load(options.app)._renderers if options.app else _built_in()
    text = sys.stdin.read() if options.input == "-" else Path(options.input).read_text("utf-8")
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{options.input} is no JSON: {error}") from error
    try:
        files = renderers.render(options.type, given)
    except Exception as error:
        print(f"jobkit: {printable(describe(error))}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    for number, file in enumerate(files):
        name = safe_filename(file.filename)
        path = options.output / (name if name not in written else f"{number}-{name}")
        written.add(name)
        body = cast("bytes", file.body)  # Renderers.render has read it
        path.write_bytes(body)
        print(f"{path}: {printable(file.content_type)}, {len(body):,} bytes")
    return 0


def _built_in() -> Renderers:
    renderers = Renderers()
    for name in BUILT_IN:
        with suppress(ImportError, ConfigurationError):  # its extra is not installed
            import_module(f"jobkit.contrib.renderers.{name}").register(renderers)
    return renderers
