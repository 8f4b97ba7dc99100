from __future__ import annotations

import threading
import time
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobkit.base import ids
from jobkit.base.ids import new_id, parse_id, require_company_id


def test_a_new_id_is_a_uuid_version_7_with_the_time_in_front() -> None:
    before = time.time_ns() // 1_000_000
    made = new_id()
    after = time.time_ns() // 1_000_000
    assert made.version == 7
    assert made.variant == "specified in RFC 4122"
    assert before <= made.int >> 80 <= after


def test_ids_made_one_after_the_other_sort_in_that_order_as_uuid_and_as_text() -> None:
    made = [new_id() for _ in range(20_000)]
    assert made == sorted(made)
    assert [str(i) for i in made] == sorted(str(i) for i in made)
    assert len(set(made)) == len(made)


def test_ids_go_on_ascending_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_last", ids._last)
    first = new_id()
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    later = [new_id() for _ in range(1_000)]
    assert [first, *later] == sorted([first, *later])
    assert all(made.version == 7 for made in later)


def test_threads_never_make_the_same_id_and_each_sees_its_own_ascend() -> None:
    made: list[list[UUID]] = [[] for _ in range(4)]
    together = threading.Barrier(4)

    def make(into: list[UUID]) -> None:
        together.wait()
        into += [new_id() for _ in range(5_000)]

    threads = [threading.Thread(target=make, args=(into,)) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one for into in made for one in into}) == 20_000
    assert all(into == sorted(into) for into in made)


@given(st.uuids())
def test_every_spelling_of_a_uuid_is_read(value: UUID) -> None:
    spellings = (value, str(value), str(value).upper(), value.hex, f"{{{value}}}", value.urn)
    assert [parse_id(spelling) for spelling in spellings] == [value] * len(spellings)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nope",
        " ",
        "\0",
        "\ud800",
        "1" * 31,
        "1" * 33,
        "g" * 32,
        # int() would read each of these four, and so does UUID().
        "0x" + "1" * 30,
        "1_" * 15 + "11",
        "１" * 32,
        " " + "1" * 31,
        "' OR 1=1 --",
        None,
        7,
        7.5,
        UUID(int=7).bytes,
        UUID("0190163d-8694-739b-aea5-966c26f8ad90").int,
        [],
        {},
        True,
    ],
)
def test_whatever_is_no_id_is_none(value: object) -> None:
    assert parse_id(value) is None


@given(st.text(max_size=40))
def test_reading_an_id_never_raises(value: str) -> None:
    assert parse_id(value) is None or parse_id(value) == UUID(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("acme", "acme"), (7, "7"), (UUID(int=7), "00000000-0000-0000-0000-000000000007"), (0, "0")],
)
def test_a_company_is_the_text_of_whatever_the_host_calls_it(value: object, expected: str) -> None:
    assert require_company_id(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "^company_id is missing$"),
        ("", "^company_id is blank$"),
        ("  ", "^company_id is blank$"),
        ("a\0", "^company_id contains a NUL character$"),
        ("\udfff", "^company_id contains a lone surrogate$"),
        ("c" * 256, "^company_id has 256 characters, the limit is 255$"),
    ],
)
def test_what_can_be_no_company_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_company_id(value)
