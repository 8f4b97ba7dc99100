"""A job's input. Whatever is accepted comes back alike from both databases; the rest is refused alike by both."""

from __future__ import annotations

import enum
import json
import math
import sys
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from jobkit import JobStore
from jobkit.jobs.creation import MAX_DEPTH, MAX_INPUT_BYTES
from jobkit.tables import content_job_events, content_jobs
from tests.support.shared import shared_database


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest) -> Iterator[sa.Engine]:
    """A database for the whole table of inputs: every test here rolls back."""
    with shared_database(request) as database:
        yield database.engine


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


def nested(depth: int, *, lists: bool = False) -> dict[str, Any]:
    """An object ``depth`` levels deep, the outermost counted."""
    value: Any = [] if lists else {}
    for level in range(depth - 2):
        value = [value] if lists and level < depth - 3 else {"k": value}
    return {"k": value}


def itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def sized(size: int) -> dict[str, Any]:
    """An object that is exactly ``size`` bytes of JSON."""
    return {"k": "x" * (size - len('{"k":""}'))}


ACCEPTED: list[tuple[Any, Any]] = [
    ({}, {}),
    ({"": {"": [[], {}, ""]}}, {"": {"": [[], {}, ""]}}),
    ({"a": None, "b": True, "c": False}, {"a": None, "b": True, "c": False}),
    ({"t": (1, (2, 3))}, {"t": [1, [2, 3]]}),
    ({1: "a", 2.5: "b", False: "c", None: "d"}, {"1": "a", "2.5": "b", "false": "c", "null": "d"}),
    ({"a": Colour.RED, Colour.RED: Level.HIGH}, {"a": "red", "red": 3}),
    (OrderedDict(a=1), {"a": 1}),
    (defaultdict(list, a=[1]), {"a": [1]}),
    ({"n": 2**63, "m": -(2**64), "h": 10**4299}, {"n": 2**63, "m": -(2**64), "h": 10**4299}),
    ({"f": [0.1, 1.0, 5e-324, 1e16, 1e22, 1e23, sys.float_info.max]},) * 2,
    ({"f": [-1e23, 123456789012345678e4, 1.5e300]},) * 2,
    ({"f": [-0.0, {"g": -0.0}], "h": -0.05}, {"f": [0.0, {"g": 0.0}], "h": -0.05}),
    ({"1e+23": '-0.0 "1e+23\\', "-0.0": 1e23}, {"1e+23": '-0.0 "1e+23\\', "-0.0": 1e23}),
    ({"s": '"\\/\b\f\n\r\t\x7f\u2028\u2029🐍日本語\ufeff\uffff'},) * 2,
    ({"literal": "\\u0000 and \\ud800"},) * 2,
    ({"brackets": "[" * 500 + "{" * 500},) * 2,
    (nested(MAX_DEPTH), nested(MAX_DEPTH)),
    (nested(MAX_DEPTH, lists=True), nested(MAX_DEPTH, lists=True)),
    (sized(MAX_INPUT_BYTES), sized(MAX_INPUT_BYTES)),
]

REFUSED: list[tuple[Any, str]] = [
    ([], "input must be a JSON object (a dict), not list"),
    ("{}", "input must be a JSON object (a dict), not str"),
    (7, "input must be a JSON object (a dict), not int"),
    (False, "input must be a JSON object (a dict), not bool"),
    (UserDict(a=1), "input must be a JSON object (a dict), not UserDict"),
    ({"a": math.nan}, "input cannot be stored: Out of range float values are not JSON compliant"),
    ({"a": [math.inf]}, "input cannot be stored: Out of range float values are not JSON compliant"),
    ({"a": {"b": -math.inf}}, "input cannot be stored: Out of range float values are not JSON compliant"),
    ({math.nan: 1}, "input cannot be stored: Out of range float values are not JSON compliant"),
    ({"a": "x\0"}, "input contains a NUL character"),
    ({"a": [{"x\0": 1}]}, "input contains a NUL character"),
    ({"a": ("x", ("y\0",))}, "input contains a NUL character"),
    ({"a": "\ud800"}, "input contains a lone surrogate"),
    ({"\udfff": 1}, "input contains a lone surrogate"),
    ({"a": "\ud83d\ude00"}, "input contains a lone surrogate"),
    (nested(MAX_DEPTH + 1), "input is nested deeper than 100 levels"),
    (nested(MAX_DEPTH + 1, lists=True), "input is nested deeper than 100 levels"),
    (nested(100_000), "input is nested deeper than 100 levels, or contains itself"),
    (itself(), "input cannot be stored: Circular reference detected"),
    (sized(MAX_INPUT_BYTES + 1), "input cannot be stored: it is 1048577 bytes of JSON, the limit is 1048576"),
    ({"a": "é" * MAX_INPUT_BYTES}, "input cannot be stored: it is 2097160 bytes of JSON, the limit is 1048576"),
    ({"f": [1e300] * 4_000}, "input cannot be stored: it is 1216007 bytes of JSON, the limit is 1048576"),
    ({"a": {1, 2}}, "input cannot be stored: Object of type set is not JSON serializable"),
    ({"a": b"x"}, "input cannot be stored: Object of type bytes is not JSON serializable"),
    ({"a": datetime(2026, 1, 1, tzinfo=UTC)}, "input cannot be stored: Object of type datetime is not JSON serializa"),
    ({"a": date(2026, 1, 1)}, "input cannot be stored: Object of type date is not JSON serializable"),
    ({"a": UUID(int=1)}, "input cannot be stored: Object of type UUID is not JSON serializable"),
    ({"a": Decimal(1)}, "input cannot be stored: Object of type Decimal is not JSON serializable"),
    ({(1, 2): 3}, "input cannot be stored: keys must be str, int, float, bool or None, not tuple"),
    ({"h": 10**4300}, "input cannot be stored: Exceeds the limit (4300 digits) for integer string conversion"),
    ({1: "a", "1": "b"}, "input has two keys that are the same in JSON"),
    ({"a": [{None: 1, "null": 2}]}, "input has two keys that are the same in JSON"),
]


def spelled(value: Any) -> str:
    """The value as text that tells 1 from 1.0 and True, and 0.0 from -0.0, and does not tell the order of keys."""
    return json.dumps(value, sort_keys=True)


@pytest.mark.parametrize(("value", "expected"), ACCEPTED, ids=range(len(ACCEPTED)))
def test_an_accepted_input_is_returned_and_read_back_as_json_says(session: Session, value: Any, expected: Any) -> None:
    jobs = JobStore(session)
    created = jobs.create("acme", job_type="note", input=value)
    assert spelled(created.input) == spelled(expected)
    assert spelled(jobs.get_by_id(created.id).input) == spelled(expected)  # type: ignore[union-attr]
    assert type(created.input) is dict


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_refused_input_names_the_field_and_leaves_the_transaction_usable(
    session: Session, value: Any, message: str
) -> None:
    jobs = JobStore(session)
    kept = jobs.create("acme", job_type="kept")
    with pytest.raises(ValueError) as refused:
        jobs.create("acme", job_type="note", input=value)
    assert str(refused.value).startswith(message)
    assert refused.type is ValueError
    assert [job.id for job in jobs.list_by_company("acme")] == [kept.id]
    assert session.scalars(sa.select(content_job_events.c.job_id)).all() == [kept.id]


def test_the_copy_shares_nothing_with_what_the_caller_gave(session: Session) -> None:
    given_input = {"list": [1], "object": {"a": 1}}
    job = JobStore(session).create("acme", job_type="note", input=given_input)
    given_input["list"].append(2)  # type: ignore[attr-defined]
    job.input["object"]["b"] = 2
    assert JobStore(session).get_by_id(job.id).input == {"list": [1], "object": {"a": 1}}  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [sized(100), {"k": "é" * 46}])
def test_the_limit_is_the_stores_and_counts_bytes(session: Session, value: dict[str, Any]) -> None:
    assert JobStore(session, max_input_bytes=100).create("acme", job_type="note", input=value).input == value
    with pytest.raises(ValueError, match=r"^input cannot be stored: it is 100 bytes of JSON, the limit is 99$"):
        JobStore(session, max_input_bytes=99).create("acme", job_type="note", input=value)


KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**300), 10**300)
DOCUMENTS = st.dictionaries(
    KEYS,
    st.recursive(
        st.none() | st.booleans() | NUMBERS | KEYS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
        max_leaves=12,
    ),
    max_size=5,
)


def without_negative_zero(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_negative_zero(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_negative_zero(item) for item in value]
    return 0.0 if isinstance(value, float) and value == 0 else value


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(DOCUMENTS, min_size=1, max_size=8))
def test_any_json_object_comes_back_equal_number_types_included(
    engine: sa.Engine, documents: list[dict[str, Any]]
) -> None:
    with engine.connect() as connection:  # rolled back
        jobs = JobStore(connection)
        created = [jobs.create("acme", job_type="note", input=document) for document in documents]
        stored = {row.id: row.input for row in connection.execute(sa.select(content_jobs.c.id, content_jobs.c.input))}
    for document, job in zip(documents, created, strict=True):
        assert spelled(job.input) == spelled(stored[job.id]) == spelled(without_negative_zero(document))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=2)
    | st.datetimes()
    | st.text(st.characters(exclude_categories=()), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=()), max_size=2) | st.integers(0, 3), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.text(max_size=2) | st.integers(0, 9) | st.none(), ANYTHING, max_size=4))
def test_whatever_is_accepted_a_database_can_store_and_the_rest_is_a_value_error_about_the_input(
    engine: sa.Engine, value: dict[Any, Any]
) -> None:
    with engine.connect() as connection:  # rolled back
        jobs = JobStore(connection)
        try:
            created = jobs.create("acme", job_type="note", input=value)
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = None
            assert spelled(jobs.get_by_id(created.id).input) == spelled(created.input)  # type: ignore[union-attr]
        assert refusal is None or refusal.startswith("input ")
        assert len(jobs.list_by_company("acme")) == (refusal is None)
