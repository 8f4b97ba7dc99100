"""The size limit is read from the environment as ``Number(x) || default`` reads it, once, at import."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from jobkit.assets.limits import DEFAULT_MAX_BYTES, configured_limit, parse_limit

PAPERCLIP = "PAPERCLIP_GENERATED_ASSET_MAX_BYTES"
JOBKIT = "JOBKIT_GENERATED_ASSET_MAX_BYTES"
INFINITY = "Infinity"

# The founding contract's table: what is in the environment, the limit, and whether the log has a warning.
TABLE: list[tuple[str | None, int | float | str, bool]] = [
    (None, DEFAULT_MAX_BYTES, False),
    ("", DEFAULT_MAX_BYTES, False),
    ("   ", DEFAULT_MAX_BYTES, False),
    *[(zero, DEFAULT_MAX_BYTES, False) for zero in ("0", "00", "-0", "0.0", "1e-400", "0x0")],
    *[
        (text, DEFAULT_MAX_BYTES, True)
        for text in ("abc", "10MB", "42abc", "1,000", "true", "null", "1n", "0x", "-0x10", "+0x10", "4 2", "e5", ".")
    ],
    *[(python_only, DEFAULT_MAX_BYTES, True) for python_only in ("1_000", "٣", "inf", "infinity", "nan", "0b1_0")],
    ("NaN", DEFAULT_MAX_BYTES, True),
    ("1e9", 1_000_000_000, False),
    ("1E3", 1_000, False),
    ("0x10", 16, False),
    ("0X1f", 31, False),
    ("0b11", 3, False),
    ("0o17", 15, False),
    ("010", 10, False),
    *[
        (f"{space}42{space}", 42, False)
        for space in (" ", "\n", "\t", "\v", "\f", "\xa0", "\ufeff", "\u2003", "\u2028")
    ],
    *[(f"{space}42", DEFAULT_MAX_BYTES, True) for space in ("\x1c", "\x1f", "\x85", "\u180e")],
    ("+7", 7, False),
    ("5.", 5, False),
    (".5", 0.5, False),
    ("1.5", 1.5, False),
    *[(negative, DEFAULT_MAX_BYTES, True) for negative in ("-5", "-0.5", "-Infinity", "-1e400")],
    (INFINITY, INFINITY, False),
    ("+Infinity", INFINITY, False),
    ("1e400", INFINITY, False),
    ("9007199254740993", 9007199254740992, False),
    ("0x20000000000001", 9007199254740992, False),
    ("0x" + "f" * 5_000, INFINITY, False),
    ("9" * 5_000, INFINITY, False),
]

# Each row is an import of its own, in a child of a process that has everything but jobkit loaded.
IMPORTS = f"""
import json, logging, os, sys
import alembic.command, blinker, fsspec, sqlalchemy.orm
class Keep(logging.Handler):
    def emit(self, record): heard.append((record.levelname, record.getMessage()))
logging.getLogger("jobkit").addHandler(Keep())
for text in json.load(sys.stdin):
    reading, writing = os.pipe()
    if not os.fork():
        heard = []
        os.environ.pop({JOBKIT!r}, None)
        os.environ.pop({PAPERCLIP!r}, None)
        if text is not None:
            os.environ[{PAPERCLIP!r}] = text
        import jobkit
        limit = jobkit.MAX_GENERATED_ASSET_BYTES
        os.environ[{PAPERCLIP!r}] = "7"
        assert jobkit.MAX_GENERATED_ASSET_BYTES == limit
        os.write(writing, json.dumps([limit, heard]).encode())
        os._exit(0)
    os.close(writing)
    print(os.read(reading, 65536).decode())
    os.close(reading)
    os.wait()
"""


@pytest.fixture(scope="module")
def imported() -> list[tuple[Any, list[list[str]]]]:
    """What each row of the table gave, in its order."""
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONWARNINGS": "error"}
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        input=json.dumps([row[0] for row in TABLE]),
        capture_output=True,
        encoding="utf-8",
        env=environment,
        check=True,
        timeout=60,
    )
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("row", range(len(TABLE)), ids=[repr(row[0]) for row in TABLE])
def test_the_environment_counts_as_the_founding_table_says(row: int, imported: list[Any]) -> None:
    _, expected, warns = TABLE[row]
    limit, heard = imported[row]
    assert limit == (float("inf") if expected == INFINITY else expected)
    assert [level for level, _ in heard] == ["WARNING"] * warns
    if warns:
        assert PAPERCLIP in heard[0][1]
        assert str(DEFAULT_MAX_BYTES) in heard[0][1]


def test_a_whole_number_is_an_int() -> None:
    assert isinstance(parse_limit("1e9"), int)
    assert isinstance(parse_limit("5."), int)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({JOBKIT: "5", PAPERCLIP: "7"}, (5, JOBKIT)),
        ({PAPERCLIP: "7"}, (7, PAPERCLIP)),
        ({JOBKIT: "", PAPERCLIP: "7"}, (DEFAULT_MAX_BYTES, "the default")),
        ({JOBKIT: "0", PAPERCLIP: "7"}, (DEFAULT_MAX_BYTES, "the default")),
        ({}, (DEFAULT_MAX_BYTES, "the default")),
    ],
)
def test_jobkits_own_variable_wins(environment: dict[str, str], expected: tuple[int, str]) -> None:
    assert configured_limit(environment) == expected


def test_a_warning_quotes_only_the_start_of_a_long_value(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="jobkit"):
        configured_limit({JOBKIT: "x" * 10_000})
    (record,) = caplog.records
    assert len(record.getMessage()) < 250


PUTS = """
import sys, jobkit
store = jobkit.AssetStore(sys.argv[1])
store.put_file("acme", original_filename="ten.bin", content_type="application/octet-stream", body=b"x" * 10)
try:
    store.put_file("acme", original_filename="eleven.bin", content_type="application/octet-stream", body=b"x" * 11)
except jobkit.AssetTooLarge as error:
    print(error)
"""


@pytest.mark.parametrize("variable", [JOBKIT, PAPERCLIP])
def test_put_file_obeys_the_environment_and_says_where_the_limit_came_from(variable: str, tmp_path: Any) -> None:
    command = [sys.executable, "-c", PUTS, str(tmp_path / "assets")]
    environment = {name: value for name, value in os.environ.items() if name not in (JOBKIT, PAPERCLIP)}
    environment[variable] = "0xA"
    run = subprocess.run(command, env=environment, check=True, timeout=240, capture_output=True, encoding="utf-8")
    assert run.stdout == f"'eleven.bin' is larger than the limit of 10 bytes ({variable})\n"
