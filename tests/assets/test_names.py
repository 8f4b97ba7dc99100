"""Object keys: made so that whatever can be put can be got, checked so that nobody else's can."""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime, timedelta, timezone
from pathlib import PurePosixPath
from uuid import UUID, uuid4

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobkit.assets.names import MAX_KEY_BYTES, check_key, company_prefix, object_key
from jobkit.base.ids import new_id
from jobkit.errors import AssetKeyRefused

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
ID = UUID("0198c0de-0000-7000-8000-000000000000")
DEVICES = ["con", "PRN", "aux.txt", "NUL", "com1", "LPT9.log"]


def name_of(filename: str | None, namespace: str = "generated") -> str:
    key = object_key("acme", namespace, filename, unique=ID, at=AT)
    check_key("acme", key)
    return key.rpartition("/")[2].removeprefix(f"{ID}-")


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("report.pdf", "report.pdf"),
        ("Report 2026 (final).PDF", "Report_2026_final.pdf"),
        (None, "file"),
        ("", "file"),
        ("   ", "file"),
        ("a..png", "a.png"),
        ("x..y", "x.y"),
        ("foo..", "foo"),
        ("...", "file"),
        ("..", "file"),
        (".", "file"),
        ("....png", "png"),
        (".bashrc", "bashrc"),
        ("日本.png", "file.png"),
        (unicodedata.normalize("NFD", "café.txt"), "cafe.txt"),
        ("a__b.txt", "a_b.txt"),
        ("../../etc/passwd", "passwd"),
        ("/etc/passwd", "passwd"),
        ("C:\\Users\\me\\cv.docx", "cv.docx"),
        ("folder/", "folder"),
        ("dots... ", "dots"),
        ("trail. . ", "trail"),
        ("a*b?[c].t*t", "a_b_c.tt"),
        ("~root.txt", "root.txt"),
        ("a\nb\tc\x7f.txt", "a_b_c.txt"),
        ("archive.tar.gz", "archive.tar.gz"),
        ("x." + "e" * 40, "x." + "e" * 15),
        ("n" * 300 + ".txt", "n" * 120 + ".txt"),
    ],
)
def test_a_users_file_name_gets_in_only_as_a_safe_stem(filename: str | None, expected: str) -> None:
    assert name_of(filename) == expected


@pytest.mark.parametrize(
    ("namespace", "expected"),
    [
        ("generated", "generated"),
        (" issues / 17 ", "issues/17"),
        ("a//b/", "a/b"),
        ("/", "misc"),
        ("..", "file"),
        ("../../x", "file/file/x"),
        ("a..b", "a.b"),
        (".spool", "spool"),
        ("a*?", "a"),
        ("CON", "_CON"),
        ("con.txt/aux", "_con.txt/_aux"),
        ("/".join("abcdefghij"), "a/b/c/d/e/f/g/h"),
    ],
)
def test_a_namespace_is_made_of_safe_segments(namespace: str, expected: str) -> None:
    key = object_key("acme", namespace, "x.txt", unique=ID, at=AT)
    check_key("acme", key)
    assert key == f"acme/{expected}/2026/03/01/{ID}-x.txt"


@pytest.mark.parametrize(
    ("at", "day"),
    [
        (datetime(2025, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), "2025/12/31"),
        (datetime(2026, 1, 1, tzinfo=UTC), "2026/01/01"),
        (datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2))), "2025/12/31"),
        (datetime(2025, 12, 31, 20, tzinfo=timezone(timedelta(hours=-5))), "2026/01/01"),
    ],
)
def test_the_day_in_a_key_is_that_of_utc(at: datetime, day: str) -> None:
    assert object_key("acme", "generated", "x", unique=ID, at=at) == f"acme/generated/{day}/{ID}-x"


@pytest.mark.parametrize("company", ["acme", "Acme", "a.b", "a-b_c", "17", str(ID), "x" * 64])
def test_a_plain_company_id_stays_readable(company: str) -> None:
    assert company_prefix(company) == company


@pytest.mark.parametrize(
    "company",
    [
        *["../x", "a/b", "*", ".", "..", "", " ", ".spool", "a.", "a..b", "a\\b", "a b", "-\n", "a\0b", "\ud800"],
        *["x" * 65, "x" * 255, "🏭", "é", unicodedata.normalize("NFD", "é"), "~" + "0" * 40, *DEVICES],
    ],
)
def test_any_other_company_id_becomes_a_prefix_that_no_plain_one_can_be(company: str) -> None:
    prefix = company_prefix(company)
    assert re.fullmatch(r"~[0-9a-f]{40}", prefix)
    assert company_prefix(prefix) != prefix
    check_key(company, object_key(company, "generated", "x.txt", unique=ID, at=AT))


@given(st.lists(st.text(max_size=300), min_size=2, max_size=6, unique=True))
@example(["é", unicodedata.normalize("NFD", "é")])
@example(["a", "a/b", "a/B", "a/", "~a"])
def test_different_companies_have_different_prefixes(companies: list[str]) -> None:
    assert len({company_prefix(company) for company in companies}) == len(companies)


@given(st.text(max_size=255), st.text(max_size=255), st.none() | st.text(max_size=400))
@example("../x", "con.txt/..", "..")
@example("acme", "/".join(["con"] * 40), "...x...")
def test_every_key_that_is_made_passes_the_check_and_is_safe_everywhere(
    company: str, namespace: str, filename: str | None
) -> None:
    key = object_key(company, namespace, filename, unique=new_id(), at=AT)
    check_key(company, key)
    assert re.fullmatch(r"[A-Za-z0-9._~/-]+", key)
    assert len(key) <= MAX_KEY_BYTES
    parts = PurePosixPath(key).parts
    assert "/".join(parts) == key
    for part in parts:
        assert len(part) <= 255
        assert part.strip(".") == part
        assert ".." not in part
        assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)", part.partition(".")[0], re.IGNORECASE)


@given(st.text(max_size=60), st.text(max_size=60))
@example("acme", "acme2")
@example("acme2", "acme")
@example("Acme", "acme")
@example("a", "a/b")
def test_a_key_is_refused_to_every_other_company(owner: str, other: str) -> None:
    key = object_key(owner, "generated", "x.txt", unique=ID, at=AT)
    if owner == other:
        check_key(other, key)
    else:
        with pytest.raises(AssetKeyRefused, match="does not belong"):
            check_key(other, key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "acme",
        "acme/",
        "/acme/x",
        "acme//x",
        "acme/./x",
        "acme/../beta/x",
        "acme/x/..",
        "acme/a..b",
        "acme/.hidden",
        "acme/trailing.",
        "acme/trailing ",
        "acme/a\\b",
        "acme\\..\\beta",
        "acme/a\0b",
        "acme/x\n",
        "acme/a*",
        "acme/a?",
        "acme/[a]",
        "acme/{a,b}",
        "acme/é",
        "acme/a%2e%2e",
        "acme/a:b",
        "file:///acme/x",
        "acme/" + "x" * MAX_KEY_BYTES,
        None,
        b"acme/x",
        7,
    ],
)
def test_a_key_that_jobkit_cannot_have_made_is_refused(key: object) -> None:
    with pytest.raises(AssetKeyRefused, match="object key"):
        check_key("acme", key)  # type: ignore[arg-type]


def test_a_refusal_quotes_only_the_start_of_a_long_key() -> None:
    with pytest.raises(AssetKeyRefused) as refused:
        check_key("acme" * 100, f"acme/{uuid4()}/" + "x" * 5_000)
    assert len(str(refused.value)) < 300
