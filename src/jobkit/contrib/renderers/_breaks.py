"""Where a line may break inside a long word, and how wide the columns of a table are.

Widths are in ems, estimated by kinds of characters: close enough to share out a line, and the same on every machine.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

LONGEST_WORD = 34
"""Characters of an unbroken word that fit wherever body text stands, deep inside lists too."""

# Scripts that break between any two characters are left to the typesetter.
_BREAKS_ANYWHERE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
_AFTER_PUNCTUATION = re.compile(r"(?<=[/?&=._,;:@#+-])(?=[^/?&=._,;:@#+-])")
_JOINED = ("Mn", "Mc", "Me", "Cf", "Sk")  # marks, joiners and modifiers stay with what they stand on

_LINE = 45.0  # of table text at full size, between the margins
_GUTTER = 1.4  # what the padding of a cell takes
_SIZES = (1.0, 0.92, 0.84, 0.77)
_LONGEST_CELL_WORD = 20  # a longer one is cut before a column is made wider for it


def pieces(text: str, longest: int = LONGEST_WORD) -> list[str]:
    """``text`` in pieces between which a line may break; joined they are ``text`` again.

    Only words longer than ``longest`` are cut: after the punctuation of addresses and paths, else anywhere.
    """
    cuts = [0]
    for word in _long_words(longest).finditer(text):
        cuts += (word.start() + cut for cut in _cuts(word[0], longest))
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]


@cache
def _long_words(longest: int) -> re.Pattern[str]:
    return re.compile(f"[^\\s{_BREAKS_ANYWHERE}]{{{longest + 1},}}")


def _cuts(word: str, longest: int) -> Iterator[int]:
    step = 1 if len(word) <= 200 else 4  # a blob needs no fine raggedness, and every cut costs time
    for start, end in pairwise([0, *(match.start() for match in _AFTER_PUNCTUATION.finditer(word)), len(word)]):
        if start:
            yield start
        if end - start > longest:
            for cut in range(start + step, end, step):
                if unicodedata.category(word[cut]) not in _JOINED and word[cut - 1] != "\u200d":
                    yield cut


@dataclass(frozen=True, slots=True)
class Columns:
    """``widths`` are shares of the line, or None where every column may be as wide as it likes. ``size`` scales the
    text. ``longest``: how many characters of a word fit into each column.
    """

    widths: list[float] | None
    size: float
    longest: list[int]


def columns(rows: Sequence[Sequence[str]]) -> Columns:
    """Columns for a table with this text in its cells, the first row in bold; every row has the same length."""
    least = [0.0] * len(rows[0])
    most = [0.0] * len(rows[0])
    for index, row in enumerate(rows):
        weight = 1.05 if index else 1.15
        for column, text in enumerate(row):
            words = [_width(part) * weight for word in text.split(" ") for part in pieces(word, _LONGEST_CELL_WORD)]
            least[column] = max(least[column], _GUTTER + max(words))
            most[column] = max(most[column], _GUTTER + sum(words) + 0.25 * text.count(" "))
    if sum(most) <= 0.7 * _LINE:
        return Columns(None, 1.0, [LONGEST_WORD] * len(most))
    size = next((size for size in _SIZES if sum(least) <= _LINE / size), _SIZES[-1])
    widths = _share(least, most, _LINE / size)
    return Columns([round(w, 2) for w in widths], size, [max(1, int((w - _GUTTER) / 0.53)) for w in widths])


def _share(least: list[float], most: list[float], line: float) -> list[float]:
    """Every column its least and a part of what is left, or, when the least are too much, none more than is fair."""
    if sum(least) <= line:
        wish = sum(most) - sum(least)
        spare = line - sum(least)
        return [
            low + spare * ((high - low) / wish if wish else 1 / len(least))
            for low, high in zip(least, most, strict=True)
        ]
    fair = line / len(least)
    for _ in least:
        small = [low for low in least if low <= fair]
        if len(small) == len(least):
            break
        fair = (line - sum(small)) / (len(least) - len(small))
    return [min(low, fair) for low in least]


def _width(word: str) -> float:
    return sum(_advance(character) for character in word)


@cache
def _advance(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 1.0
    if character in "ijlt.,;:|!'()[]fI":
        return 0.33
    if character in "mwMW%@":
        return 0.85
    return 0.68 if character.isupper() else 0.5
