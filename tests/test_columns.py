"""Columns that mean the same on both databases, read through whatever connection a host lends."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql, sqlite

import jobkit
from jobkit import JobStore
from jobkit.base.ids import new_id
from jobkit.tables import JOB_COLUMNS, JsonObject, UtcDateTime, content_job_events, content_jobs, metadata
from tests.support.databases import Database

DIALECTS = [sqlite.dialect(), postgresql.dialect()]
NOON = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
FIRST, LAST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, 23, 59, 59, 999_999, tzinfo=UTC)


def read(kind: Any, dialect: sa.Dialect, value: object) -> Any:
    """What the column type makes of a value from the driver."""
    processor = kind().result_processor(dialect, None)
    return processor(value)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
@pytest.mark.parametrize(
    "value",
    [
        "2026-03-01 12:00:00.250000",
        "2026-03-01 12:00:00.250",
        "2026-03-01T12:00:00.250000",
        "2026-03-01T12:00:00.250Z",
        "2026-03-01T14:00:00.250+02:00",
        NOON,
        NOON.replace(tzinfo=None),
        NOON.astimezone(timezone(timedelta(hours=-7))),
    ],
    ids=repr,
)
def test_a_time_is_read_as_aware_utc_however_the_driver_hands_it_over(dialect: sa.Dialect, value: object) -> None:
    found = read(UtcDateTime, dialect, value)
    assert found == NOON
    assert found.tzinfo is UTC


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
@pytest.mark.parametrize("value", ['{"a": [1, null]}', b'{"a": [1, null]}', {"a": [1, None]}], ids=repr)
def test_json_is_read_decoded_or_not(dialect: sa.Dialect, value: object) -> None:
    assert read(JsonObject, dialect, value) == {"a": [1, None]}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
@pytest.mark.parametrize("kind", [UtcDateTime, JsonObject])
def test_null_is_none(dialect: sa.Dialect, kind: Any) -> None:
    assert read(kind, dialect, None) is None


def test_a_job_has_the_columns_of_its_table_in_their_order() -> None:
    assert [field.name for field in fields(jobkit.Job)] == [column.name for column in JOB_COLUMNS]
    assert set(content_jobs.c) - set(JOB_COLUMNS) == {content_jobs.c.error_detail}


def test_no_column_on_sqlite_is_declared_with_a_type_that_sqlite3_or_django_converts() -> None:
    declared = {
        column.type.dialect_impl(DIALECTS[0]).compile(dialect=DIALECTS[0]).split("(")[0]
        for table in metadata.sorted_tables
        for column in table.c
    }
    assert declared == {"CHAR", "TEXT", "JSON", "INTEGER", "BIGINT", "FLOAT"}


@pytest.fixture
def converters() -> Iterator[None]:
    """What Django and others register for the whole process, and one for JSON on top."""
    before = dict(sqlite3.converters)
    for name in ("bool", "date", "time", "datetime", "timestamp"):
        sqlite3.register_converter(name, lambda raw: pytest.fail(f"a converter was called with {raw!r}"))
    sqlite3.register_converter("JSON", json.loads)
    yield
    sqlite3.converters.clear()
    sqlite3.converters.update(before)


@pytest.mark.usefixtures("converters")
def test_rows_are_read_alike_through_a_connection_with_detect_types(sqlite_database: Database) -> None:
    plain = sqlite_database.engine
    lent = sqlite_database.connect(connect_args={"detect_types": sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES})
    with lent.begin() as connection:
        job = JobStore(connection).create("acme", job_type="note", input={"a": [1, {"b": None}]})
        JobStore(connection).transition(job.id, status="running", started_at=NOON)
    with plain.connect() as one, lent.connect() as other:
        assert JobStore(one).get_by_id(job.id) == JobStore(other).get_by_id(job.id)
        payloads = [connection.scalars(sa.select(content_job_events.c.payload)).all() for connection in (one, other)]
    assert payloads == [[{"jobId": str(job.id)}] * 2] * 2


@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/St_Johns"])
def test_the_session_time_zone_of_postgresql_changes_no_time(postgres_database: Database, zone: str) -> None:
    engine = postgres_database.connect(connect_args={"options": f"-c TimeZone={zone}"})
    with engine.begin() as connection:
        job = JobStore(connection).create("acme", job_type="note")
        JobStore(connection).transition(job.id, started_at=NOON)
        found = JobStore(connection).get_by_id(job.id)
        assert found is not None
        assert (found.created_at, found.started_at) == (job.created_at, NOON)
        assert found.started_at.tzinfo is UTC  # type: ignore[union-attr]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.datetimes(FIRST.replace(tzinfo=None), LAST.replace(tzinfo=None), timezones=st.timezones()), max_size=8)
)
def test_times_of_any_zone_come_back_equal_and_sort_as_time_does(engine: sa.Engine, times: list[datetime]) -> None:
    times = [*times, FIRST, LAST, NOON, NOON + timedelta(microseconds=1), datetime(999, 1, 1, tzinfo=UTC)]
    column = content_jobs.c.finished_at
    with engine.connect() as connection:  # rolled back
        made = [{"id": new_id(), "company_id": "acme", "job_type": "note", "finished_at": time} for time in times]
        connection.execute(content_jobs.insert(), made)
        found = list(connection.scalars(sa.select(column).order_by(column)))
        assert found == sorted(time.astimezone(UTC) for time in times)
        assert all(time.tzinfo is UTC for time in found)
        earlier = connection.scalar(sa.select(sa.func.count()).where(column < NOON))
        assert earlier == sum(time.astimezone(UTC) < NOON for time in times)


@pytest.mark.parametrize("value", [datetime(2026, 3, 1), date(2026, 3, 1), "2026-03-01"])
def test_a_time_column_takes_nothing_but_aware_datetimes(engine: sa.Engine, value: Any) -> None:
    with engine.connect() as connection, pytest.raises(sa.exc.StatementError):
        connection.execute(content_jobs.update().values(finished_at=value))


def test_a_row_that_the_host_inserts_itself_gets_the_databases_defaults(engine: sa.Engine) -> None:
    before = datetime.now(UTC) - timedelta(seconds=5)
    with engine.begin() as connection:
        job_id = new_id()
        connection.execute(content_jobs.insert().values(id=job_id, company_id="acme", job_type="note"))
        job = JobStore(connection).get_by_id(job_id)
    assert job is not None
    assert (job.status, job.input, job.fence, job.event_seq) == (jobkit.JobStatus.QUEUED, {}, 0, 0)
    assert before < job.created_at < datetime.now(UTC) + timedelta(seconds=5)
    assert job.updated_at.tzinfo is UTC
