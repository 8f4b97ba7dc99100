"""SQL that converts UUIDs and times in SQLite, which has neither type, from the host's text to jobkit's."""

from __future__ import annotations

import sqlalchemy as sa

from jobkit.tables import UtcDateTime

_DATE = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"
_TIME = "[0-9][0-9]:[0-9][0-9]:[0-9][0-9]"


def copied(table: sa.Table, name: str, declared: str) -> str:
    """SQL for the value of a column in jobkit's format."""
    if (table.name, name) == ("content_jobs", "id"):
        return "lower(replace(id, '-', ''))"  # as jobkit's statements compare it; an asset's id may have dashes
    # SQLAlchemy keeps a UUID as 32 digits in CHAR(32); as text, a company's id is what str(uuid) gives.
    if name in ("company_id", "created_by_agent_id") and declared in ("CHAR(32)", "UUID"):
        groups = ((1, 8), (9, 4), (13, 4), (17, 4), (21, 12))
        dashed = " || '-' || ".join(f"substr({name}, {start}, {length})" for start, length in groups)
        return (
            f"CASE WHEN length({name}) = 32 AND {name} NOT GLOB '*[^0-9a-fA-F]*' THEN lower({dashed}) ELSE {name} END"
        )
    if not isinstance(table.c[name].type, UtcDateTime):
        return name
    seconds, fraction = _parts(name)
    return f"{seconds} || '.' || substr(substr({fraction}, 2) || '000000', 1, 6)"


def unreadable(table: sa.Table) -> dict[str, sa.ColumnElement[bool]]:
    """For each column to be checked, the condition that jobkit cannot read its value."""
    times = [column.name for column in table.columns if isinstance(column.type, UtcDateTime)]
    checks = {name: _no_time(name) for name in times if name != "lease_until"}
    if table.name == "content_jobs":
        checks = {name: checks[name] for name in ("created_at", "updated_at", "started_at", "finished_at")}
        checks |= {"id": _no_uuid("lower(id)"), "result_asset_id": _no_uuid("lower(result_asset_id)")}
        checks["input"] = (
            "input IS NOT NULL AND CASE WHEN json_valid(input) THEN json_type(input) <> 'object' ELSE true END"
        )
    else:
        checks |= {"id": _no_uuid("id"), "byte_size": "typeof(byte_size) <> 'integer'"}
    return {name: sa.literal_column(f"({condition})", sa.Boolean()) for name, condition in checks.items()}


def _no_uuid(value: str) -> str:
    dashed = "-".join("[0-9a-f]" * digits for digits in (8, 4, 4, 4, 12))
    return (
        f"{value} IS NOT NULL AND NOT ({value} GLOB '{dashed}' "
        f"OR length({value}) = 32 AND {value} NOT GLOB '*[^0-9a-f]*')"
    )


def _parts(name: str) -> tuple[str, str]:
    """SQL for the parts of a time: in UTC up to its second, and the fraction, which strftime would round."""
    zone = (
        f"CASE WHEN substr({name}, -1) = 'Z' THEN 'Z' "
        f"WHEN length({name}) > 19 AND substr({name}, -6) GLOB '[+-][0-9][0-9]:[0-9][0-9]' THEN substr({name}, -6) "
        "ELSE '' END"
    )
    seconds = f"strftime('%Y-%m-%d %H:%M:%S', substr({name}, 1, 19) || {zone})"
    return seconds, f"substr({name}, 20, length({name}) - 19 - length({zone}))"


def _no_time(name: str) -> str:
    seconds, fraction = _parts(name)
    return (
        f"{name} IS NOT NULL AND NOT (typeof({name}) = 'text' "
        f"AND substr({name}, 1, 19) GLOB '{_DATE}[ T]{_TIME}' AND {seconds} IS NOT NULL "
        f"AND ({fraction} = '' OR {fraction} GLOB '.[0-9]*' AND {fraction} NOT GLOB '.*[^0-9]*'))"
    )
