from __future__ import annotations

import re
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from jobkit.base.text import MAX_ERROR_CHARACTERS, error_message, sanitise, storable

# Every code point, the halves of surrogate pairs too.
ANYTHING = st.text(st.characters(exclude_categories=()), max_size=300)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("", ValueError, "^name is blank$"),
        (" \t\n\u2003", ValueError, "^name is blank$"),
        ("a\0b", ValueError, "^name contains a NUL character$"),
        ("a\ud800b", ValueError, "^name contains a lone surrogate$"),
        ("\ude00", ValueError, "^name contains a lone surrogate$"),
        ("x" * 11, ValueError, "^name has 11 characters, the limit is 10$"),
        (None, TypeError, "^name must be text, not NoneType$"),
        (b"bytes", TypeError, "^name must be text, not bytes$"),
        (7, TypeError, "^name must be text, not int$"),
    ],
)
def test_text_that_cannot_be_stored_is_refused_by_name(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        storable(value, "name", limit=10)


@pytest.mark.parametrize("control", ["\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\u2029"])
def test_text_of_one_line_has_no_control_characters(control: str) -> None:
    with pytest.raises(ValueError, match=f"name contains the control character {re.escape(ascii(control))}"):
        storable(f"a{control}b", "name", controls=False)
    assert storable(f"a{control}b", "name") == f"a{control}b"
    assert storable("a b\xa0é\u200f🎈", "name", controls=False)


@pytest.mark.parametrize("value", ["a", "x" * 10, "日本語", "🐍", " padded ", "a\r\n\tb"])
def test_other_text_is_returned_unchanged(value: str) -> None:
    assert storable(value, "name", limit=10) == value


def test_blank_text_is_storable_where_blank_is_allowed() -> None:
    assert storable(" ", "name", blank=True) == " "


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class RiggedText(str):
    def __getitem__(self, key: object) -> str:
        raise RuntimeError("no slices")

    def replace(self, *_: object) -> str:  # type: ignore[override]
        raise RuntimeError("no changes")


class Rigged(Exception):
    def __str__(self) -> str:
        return RiggedText("plain")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no such font"), "no such font"),
        (ValueError(), "ValueError"),
        (ValueError("  \n "), "ValueError"),
        (KeyError("title"), "'title'"),
        (SystemExit(3), "3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (Speechless(), "Speechless"),
        (ValueError("tabs\tand\r\nlines\nstay"), "tabs\tand\nlines\nstay"),
        (ValueError("nul\0, escape\x1b[31m, \ud800"), "nul\ufffd, escape\ufffd[31m, \ufffd"),
        (ValueError("evil\u202egnp.exe"), "evil\ufffdgnp.exe"),
        (Rigged(), "plain"),
    ],
)
def test_a_failure_is_described_in_words_that_can_be_stored(error: BaseException, expected: str) -> None:
    assert error_message(error) == expected


@pytest.mark.parametrize("length", [MAX_ERROR_CHARACTERS - 1, MAX_ERROR_CHARACTERS])
def test_a_message_within_the_limit_stays_whole(length: int) -> None:
    assert sanitise("é" * length) == "é" * length


@pytest.mark.parametrize("length", [MAX_ERROR_CHARACTERS + 1, 5_000_000])
def test_a_longer_message_is_cut_and_says_so(length: int) -> None:
    assert sanitise("x" * length) == "x" * (MAX_ERROR_CHARACTERS - 1) + "…"


@given(ANYTHING)
def test_a_description_is_always_storable(message: str) -> None:
    described = error_message(ValueError(message))
    assert storable(described, "error_message", limit=MAX_ERROR_CHARACTERS) == described
    assert sanitise(described) == described


def test_both_databases_store_every_described_character_and_give_it_back(engine: sa.Engine) -> None:
    everything = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    pieces = [sanitise(everything[start : start + 1_900]) for start in range(0, len(everything), 1_900)]
    with engine.connect() as connection:
        connection.execute(sa.text("CREATE TEMPORARY TABLE said (id integer, message text)"))
        rows = [{"id": number, "message": piece} for number, piece in enumerate(pieces)]
        connection.execute(sa.text("INSERT INTO said VALUES (:id, :message)"), rows)
        assert list(connection.scalars(sa.text("SELECT message FROM said ORDER BY id"))) == pieces
