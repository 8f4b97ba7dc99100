"""``pdf-document``: Markdown typeset as a paginated PDF. Needs ``jobkit[pdf]``.

The job's input::

    {"markdown": "# Report\\n…", "title": "…", "author": "…", "filename": "report.pdf", "paper": "a4", "language": "en"}

Only ``markdown`` is needed. ``title``: printed above the text and kept as the PDF's title; without it a heading of the
first level that opens the text is the title. ``author``: a name, or a list of names. ``filename``: by default made of
the title. ``paper``: ``a4`` or ``us-letter``. ``language``: a code such as ``en`` or ``pt-BR``, for hyphenation, the
direction of the text and screen readers; without it lines are neither hyphenated nor justified.

CommonMark, tables, strikethrough and task lists are understood; HTML is shown as text, an image as its description.
Nothing in the text can read a file, reach the network or run code: it reaches the typesetter as data. Only the fonts
inside the typesetter are used, so that the same input gives the same bytes on every machine with the same versions of
typst and markdown-it-py. They cover European scripts, Hebrew, Arabic and Devanagari; characters they lack (Chinese,
Japanese, Korean, Thai, emoji) are drawn as empty boxes.

Refused with ``ValueError``: more than 1,048,576 characters, quotes and lists nested deeper than 12 levels, more than
20,000 blocks, 50,000 table cells, 100,000 changes of style, a table of more than 40 columns.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jobkit.contrib.renderers import _fields
from jobkit.contrib.renderers._breaks import pieces
from jobkit.contrib.renderers._markdown import MAX_CHARACTERS, MAX_NESTING, Reader, plain
from jobkit.errors import ConfigurationError
from jobkit.rendering.context import RenderContext
from jobkit.rendering.renderers import Renderers
from jobkit.types import Rendered

JOB_TYPE = "pdf-document"
PAPERS = {"a4": 28, "us-letter": 31}
"""Side margins in millimetres: the line is as long on both papers."""

_FIELDS = ("markdown", "title", "author", "filename", "paper", "language")
_LANGUAGE = re.compile(r"[a-zA-Z]{2,3}(?:-[a-zA-Z]{2})?")
_RUNNING_TITLE = 90


def register(renderers: Renderers) -> None:
    """Make ``render`` the renderer of ``pdf-document``; ``ConfigurationError`` without ``jobkit[pdf]``."""
    _libraries()
    renderers.register(JOB_TYPE)(render)


def render(ctx: RenderContext) -> Rendered:
    """The PDF of the job's ``markdown``. ``ValueError``, naming the field, when the input is not right."""
    document = Document.of(ctx.input)
    markdown_it, typst, fonts = _libraries()
    ctx.progress(0.1, "reading the document")
    parser = markdown_it.MarkdownIt("commonmark", {"html": False, "maxNesting": MAX_NESTING})
    parser.enable(["table", "strikethrough"])
    for ruler in (parser.block.ruler, parser.inline.ruler):  # the parser asks at every step whether to go on
        ruler.before(ruler.get_active_rules()[0], "jobkit_check", lambda *_: ctx.check())
    data = document.typeset(Reader(parser.parse(document.markdown), ctx.check))
    compiler = typst.Compiler(
        input=_template(),
        root=ctx.workdir,  # empty: nothing to read even if the template were to ask
        font_paths=fonts,
        ignore_system_fonts=True,
        sys_inputs={"document": json.dumps(data)},
    )
    ctx.progress(0.4, "setting the pages")
    pdf: bytes = compiler.compile(format="pdf")
    return Rendered(data["filename"], "application/pdf", pdf)


@dataclass(frozen=True, slots=True)
class Document:
    """A job's input, checked."""

    markdown: str
    title: str | None
    authors: tuple[str, ...]
    filename: str | None
    paper: str
    language: str | None

    @classmethod
    def of(cls, value: Any) -> Document:
        _fields.object_of(value, _FIELDS, JOB_TYPE)
        markdown = _fields.text(value, "markdown", limit=MAX_CHARACTERS)
        if markdown is None:
            raise ValueError("markdown is missing")
        author = value.get("author")
        names = author if isinstance(author, list) else [] if author is None else [author]
        if len(names) > 50:
            raise ValueError(f"author has {len(names)} names, the limit is 50")
        paper = _fields.choice(value, "paper", PAPERS) or "a4"
        language = _fields.text(value, "language", limit=10)
        if language is not None and not _LANGUAGE.fullmatch(language):
            raise ValueError(f"language {language!r} is not a code such as 'en' or 'pt-BR'")
        filename = _fields.filename(value, ".pdf")
        if None in names:
            raise ValueError("author must be text, not NoneType")
        authors = tuple(_fields.text({"author": name}, "author", limit=200) or "" for name in names)
        return cls(markdown, _fields.text(value, "title", limit=500), authors, filename, paper, language)

    def typeset(self, text: Reader) -> dict[str, Any]:
        """What the template is given, the title taken from the first heading when the input has none."""
        blocks = text.blocks
        first = blocks[0] if blocks and blocks[0]["t"] == "heading" and blocks[0]["level"] == 1 else None
        heading = first
        if self.title is not None and (first is None or plain(first["runs"]).strip() != self.title):
            heading = {"t": "heading", "level": 1, "runs": [{"x": pieces(self.title)}], "id": "title"}
        title = None if heading is None else plain(heading["runs"])
        return {
            "title": title,
            "running": pieces(_shortened(title or "")),
            "authors": self.authors,
            "byline": pieces(", ".join(self.authors)),
            "filename": self._name(title),
            "paper": self.paper,
            "margin": PAPERS[self.paper],
            "lang": (self.language or "en").partition("-")[0].lower(),
            "region": (self.language or "").partition("-")[2] or None,
            "hyphenate": self.language is not None,
            "heading": heading,
            "anchors": text.anchors,
            "blocks": blocks[1:] if heading is first and first is not None else blocks,
        }

    def _name(self, title: str | None) -> str:
        words = _fields.UNFIT_FOR_NAME.sub(" ", title or "").split()
        return self.filename or _fields.ended(" ".join(words)[:100].strip(" .") or "document", ".pdf")


def _shortened(title: str) -> str:
    return title if len(title) <= _RUNNING_TITLE else f"{title[: _RUNNING_TITLE - 1]}…"


@cache
def _libraries() -> tuple[Any, Any, Any]:
    try:
        import markdown_it
        import typst
    except ImportError as error:
        raise ConfigurationError(f"{JOB_TYPE} needs {error.name}: pip install jobkit[pdf]") from error
    return markdown_it, typst, typst.Fonts(include_system_fonts=False)


@cache
def _template() -> bytes:
    return Path(__file__).with_suffix(".typ").read_bytes()
