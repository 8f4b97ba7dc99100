"""Markdown as a plain tree of blocks and runs: JSON for the template to walk, with every limit checked on the way.

A run is a piece of a line in one style: ``{"x": pieces, "s": style letters, "u": address}`` or ``{"n": 1}`` for a line
break. Style letters: ``b`` strong, ``i`` emphasis, ``s`` struck, ``c`` code, ``a`` what stands for an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote

from jobkit.contrib.renderers._breaks import LONGEST_WORD, columns, pieces

Node = dict[str, Any]
Run = dict[str, Any]

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 12
"""Quotes and lists inside each other: at this depth a line still has room for words."""
MAX_COLUMNS = 40
MAX_CELLS = 50_000
MAX_BLOCKS = 20_000
MAX_RUNS = 100_000
MAX_NESTING = 2 * MAX_DEPTH + 8
"""For the parser's ``maxNesting``: there it drops what is deeper, so it must lie beyond MAX_DEPTH, where we refuse."""

_MAX_HIGHLIGHTED = 60_000  # characters of code in a document: the highlighter takes up to 60 µs for each
_MAX_CODE_LINE = 1_000  # characters
_MAX_WHOLE_CODE = 16  # lines on the page: a block of so many is not split
_MAX_PIECES = 1_000  # in a paragraph of the template: the typesetter's time grows with their square
_LINK = re.compile(r"(?:https?://|mailto:).", re.IGNORECASE)
_TASK = re.compile(r"\[([ xX])\] ")
_LINE_ENDS = re.compile("[\x0b\x0c\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_LONG_CODE_LINE = re.compile(rf"[^\n]{{{_MAX_CODE_LINE}}}(?=[^\n])")
_STYLES = {"strong": "b", "em": "i", "s": "s"}


def clean(text: str) -> str:
    """``text`` with every kind of line end a newline and control characters replaced by ``�``."""
    return _CONTROLS.sub("\ufffd", _LINE_ENDS.sub("\n", text))


class Reader:
    """Reads the tokens of one Markdown document into ``blocks``. ``ValueError`` for what could not be typeset.

    ``anchors``: the label of each heading by the name that a link to it would use.
    """

    def __init__(self, tokens: Iterable[Any], check: Callable[[], None]) -> None:
        self.blocks: list[Node] = []
        self._stack: list[Node] = [{"t": "document", "body": self.blocks}]
        self._check = check
        self._blocks = self._runs = self._cells = self._code = 0
        self.anchors: dict[str, str] = {}
        self._repeats: dict[str, int] = {}
        before = None
        for token in tokens:
            self._read(token, before)
            before = token

    def _read(self, token: Any, before: Any) -> None:
        kind = token.type
        if kind == "inline":
            self._text(_runs(token.children or ()), before)
        elif kind == "blockquote_open":
            self._open({"t": "quote", "body": []})
        elif kind in ("bullet_list_open", "ordered_list_open"):
            start = int(token.attrs.get("start", 1)) if kind == "ordered_list_open" else None
            self._open({"t": "list", "start": start, "loose": False, "body": []})
        elif kind == "list_item_open":
            self._open({"t": "item", "task": None, "body": []})
        elif kind in ("blockquote_close", "bullet_list_close", "ordered_list_close", "list_item_close"):
            self._stack.pop()
        elif kind in ("fence", "code_block"):
            self._add(self._code_block(token))
        elif kind == "hr":
            self._add({"t": "rule"})
        elif kind == "table_open":
            self._open({"t": "table", "align": [], "rows": []})
        elif kind == "tr_open":
            self._check()
            self._stack[-1]["rows"].append([])
        elif kind == "table_close":
            _lay_out(self._stack.pop())

    def _add(self, node: Node) -> None:
        self._blocks += 1
        if self._blocks > MAX_BLOCKS:
            raise ValueError(f"markdown has more than {MAX_BLOCKS:,} paragraphs, headings and list items")
        if self._blocks % 100 == 0:
            self._check()
        self._stack[-1]["body"].append(node)

    def _open(self, node: Node) -> None:
        self._add(node)
        self._stack.append(node)
        if sum(one["t"] in ("quote", "list") for one in self._stack) > MAX_DEPTH:
            raise ValueError(f"markdown has quotes and lists nested deeper than {MAX_DEPTH} levels")

    def _text(self, runs: list[Run], opener: Any) -> None:
        self._runs += len(runs)
        if self._runs > MAX_RUNS:
            raise ValueError(f"markdown changes its style more than {MAX_RUNS:,} times")
        if opener.type in ("th_open", "td_open"):
            self._cell(runs, opener)
        elif opener.type == "heading_open":
            anchor = self._anchor(plain(runs))
            self._add({"t": "heading", "level": int(opener.tag[1]), "runs": _broken(runs), "id": anchor})
        else:
            self._paragraph(runs, loose=not opener.hidden)

    def _paragraph(self, runs: list[Run], *, loose: bool) -> None:
        item = self._stack[-1]
        if item["t"] == "item":
            self._stack[-2]["loose"] |= loose
            task = _TASK.match(runs[0].get("x", "")) if runs and not item["body"] and runs[0].keys() == {"x"} else None
            if task:
                item["task"] = task[1] != " "
                runs = [{"x": runs[0]["x"][task.end() :]}, *runs[1:]]
        for part in _parts(_broken(runs)):
            self._add({"t": "p", "runs": part})

    def _cell(self, runs: list[Run], opener: Any) -> None:
        table = self._stack[-1]
        self._cells += 1
        if self._cells > MAX_CELLS:
            raise ValueError(f"markdown has more than {MAX_CELLS:,} table cells")
        if opener.type == "th_open":
            table["align"].append(str(opener.attrs.get("style", "")).removeprefix("text-align:") or "left")
            if len(table["align"]) > MAX_COLUMNS:
                raise ValueError(f"markdown has a table of more than {MAX_COLUMNS} columns")
        table["rows"][-1].append(runs)

    def _code_block(self, token: Any) -> Node:
        text = token.content.removesuffix("\n")
        self._code += len(text)
        words = token.info.split() if self._code <= _MAX_HIGHLIGHTED else []
        language = words[0] if words and re.fullmatch(r"[\w#+-]{1,30}", words[0]) else None
        if len(text) > _MAX_CODE_LINE:
            text = _LONG_CODE_LINE.sub(r"\g<0>\n", text)
        widths = [len(line) for line in text.split("\n")]
        whole = sum(1 + width // 80 for width in widths) <= _MAX_WHOLE_CODE
        return {"t": "code", "text": text, "lang": language, "whole": whole, "keep": 3 if max(widths) <= 200 else 0}

    def _anchor(self, text: str) -> str:
        """A label for the heading, found under the name GitHub gives it: a repeated heading gets -1, -2."""
        name = slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        self._repeats[slug] = repeat = self._repeats.get(slug, -1) + 1
        if repeat:
            name = f"{slug}-{repeat}"
        return self.anchors.setdefault(name, f"heading-{len(self.anchors)}")


def _runs(children: Iterable[Any]) -> list[Run]:
    """The inline tokens of one block, neighbours in the same style joined."""
    found: list[Run] = []
    open_styles: list[str] = []
    address = ""
    for token in children:
        kind, text = token.type, token.content
        style = ""
        if kind.endswith(("_open", "_close")):
            name = kind.rpartition("_")[0]
            if name == "link":
                address = _address(str(token.attrs.get("href", ""))) if token.nesting > 0 else ""
            elif token.nesting > 0:
                open_styles.append(_STYLES[name])
            else:
                open_styles.remove(_STYLES[name])
            continue
        if kind == "hardbreak":
            found.append({"n": 1})
            continue
        if kind == "softbreak":
            text = " "
        elif kind == "code_inline":
            style = "c"
        elif kind == "image":
            style, text = "a", plain(_runs(token.children or ())) or str(token.attrs.get("src", ""))
        run = {"x": text, "s": style + "".join(sorted(set(open_styles))), "u": address}
        run = {key: value for key, value in run.items() if value}
        if (
            found
            and "x" in run
            and found[-1].keys() == run.keys()
            and all(found[-1][k] == run[k] for k in run if k != "x")
        ):
            found[-1]["x"] += text
        elif "x" in run:
            found.append(run)
    return found


def _address(href: str) -> str:
    """Where a link may lead: the web, a mail or a heading of the document; else nowhere, and its text is text."""
    if href.startswith("#"):
        return "#" + unquote(href[1:]).lower()
    return href if len(href) <= 2_000 and _LINK.match(href) else ""


def plain(runs: Iterable[Run]) -> str:
    """The text of runs, broken into pieces or not."""
    return "".join("".join(run.get("x", " ")) for run in runs)


def _broken(runs: list[Run], longest: int = LONGEST_WORD) -> list[Run]:
    """Runs with their text in pieces that fit the line."""
    return [{**run, "x": pieces(run["x"], longest)} if "x" in run else run for run in runs]


def _parts(runs: list[Run]) -> Iterator[list[Run]]:
    """Runs in groups of at most ``_MAX_PIECES`` pieces: only the monstrous paragraph is more than one."""
    part: list[Run] = []
    room = _MAX_PIECES
    for run in runs:
        rest = run.get("x", [""])
        while rest:
            taken, rest = rest[:room], rest[room:]
            part.append({**run, "x": taken} if "x" in run else run)
            room -= len(taken)
            if room <= 0:
                yield part
                part, room = [], _MAX_PIECES
    if part:
        yield part


def _lay_out(table: Node) -> None:
    """Give a table its column widths, its type size, and cells whose words fit them."""
    rows = table["rows"]
    text = [[plain(runs) for runs in row] for row in rows]
    shape = columns(text)
    table["widths"], table["size"] = shape.widths, shape.size
    table["rows"] = [[_broken(runs, fits) for runs, fits in zip(row, shape.longest, strict=True)] for row in rows]
    # Rows of up to eight lines or so stay on one page; a longer one may break, or it could not be shown at all.
    table["whole"] = [all(len(cell) < 8 * fits for cell, fits in zip(row, shape.longest, strict=True)) for row in text]
