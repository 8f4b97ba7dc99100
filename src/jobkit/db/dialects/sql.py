"""A statement written out as SQL, with the types of its parameters and columns."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from jobkit.tables import JsonObject, UtcDateTime


class _Seconds(sa.types.TypeDecorator[float]):
    """A number of seconds: a float on PostgreSQL, the text of a time modifier on SQLite."""

    impl = sa.Float
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(sa.Text() if dialect.name == "sqlite" else sa.Float())

    def process_bind_param(self, value: float | None, dialect: sa.Dialect) -> Any:
        return str(value) if dialect.name == "sqlite" else value


# The type of a parameter by its name; the others are text.
_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    **dict.fromkeys(("began", "epoch", "id", "upto", "xid"), sa.BigInteger()),
    **dict.fromkeys(("each", "limit", "max_rescues", "priority", "seq", "suspect"), sa.Integer()),
    **dict.fromkeys(("after", "before", "by", "now", "run_at"), UtcDateTime()),
    **dict.fromkeys(("early", "far", "grace", "hold", "lease", "since", "within"), _Seconds()),
    "job_id": sa.Uuid(),
}


class Sql:
    """A statement with ``{s}`` where the schema goes. ``columns``: those of the result. ``types``: of parameters that
    have another type here than in other statements.

    Calling it with a connection gives the clause for that connection's ``schema_translate_map``, which SQLAlchemy
    itself does not apply to written-out SQL.
    """

    def __init__(self, template: str, *columns: sa.ColumnClause[Any], **types: sa.types.TypeEngine[Any]) -> None:
        self._template, self._columns, self._types = template, columns, {**_TYPES, **types}
        self._render = lru_cache(maxsize=16)(self._text)

    def __call__(self, connection: sa.Connection) -> Any:
        schemas = connection.get_execution_options().get("schema_translate_map")
        return self._render(schemas.get(None) if schemas else None)

    def _text(self, schema: str | None) -> Any:
        prefix = "" if schema is None else '"' + schema.replace('"', '""') + '".'
        clause = sa.text(self._template.replace("{s}", prefix))
        names = clause.compile().params
        clause = clause.bindparams(*(sa.bindparam(name, type_=self._types.get(name, sa.Text())) for name in names))
        return clause.columns(*self._columns) if self._columns else clause


# The columns of results, in the order of the tuples of ``jobkit.db.dialects.base`` that are made of them.
CLAIMED = (
    sa.column("id", sa.Uuid()),
    sa.column("company_id", sa.Text()),
    sa.column("job_type", sa.Text()),
    sa.column("input", JsonObject()),
    sa.column("source_task_id", sa.Text()),
    sa.column("fence", sa.BigInteger()),
    sa.column("attempt", sa.Integer()),
    sa.column("event_seq", sa.Integer()),
    sa.column("event_id", sa.BigInteger()),
)
QUEUED_JOB = (
    sa.column("id", sa.Uuid()),
    sa.column("company_id", sa.Text()),
    sa.column("priority", sa.Integer()),
    sa.column("at", UtcDateTime()),
    sa.column("scheduled", sa.Boolean()),
    sa.column("suspect", sa.Boolean()),
)
HELD = (sa.column("id", sa.Uuid()), sa.column("cancelled", sa.Boolean()))
ENDING = sa.column("ending", sa.Boolean())
LEASES = (sa.column("clock", sa.Float()), sa.column("first", sa.Float()), sa.column("last", sa.Float()))
APPENDED = (sa.column("job_id", sa.Uuid()), sa.column("id", sa.BigInteger()), sa.column("seq", sa.Integer()))
EVENT = (
    sa.column("id", sa.BigInteger()),
    sa.column("xid", sa.BigInteger()),
    sa.column("seq", sa.Integer()),
    sa.column("company_id", sa.Text()),
    sa.column("type", sa.Text()),
    sa.column("job_id", sa.Uuid()),
    sa.column("created_at", UtcDateTime()),
    sa.column("payload", JsonObject()),
)
DUE = (sa.column("company_id", sa.Text()), sa.column("object_key", sa.Text()), sa.column("not_before", UtcDateTime()))

# ``{by}`` is the time that decides whether a job is due: ``:by``, or the database's own when that is NULL.
SELECT_COMPANIES_DUE = """
SELECT company_id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NOT NULL AND run_at <= {by}
ORDER BY run_at, company_id LIMIT :limit
"""
SELECT_HAS_QUEUED = """
SELECT EXISTS (SELECT 1 FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL)
    OR COALESCE((SELECT run_at FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NOT NULL
        ORDER BY run_at, company_id LIMIT 1) <= {by}, false)
"""
# Both databases go from one company, or one priority of a company, to the next by index, however many jobs are between.
COMPANIES_BEYOND = """
WITH RECURSIVE c(company_id, n) AS (
    SELECT (SELECT company_id FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL AND company_id > :beyond
        ORDER BY company_id LIMIT 1), 1
  UNION ALL
    SELECT (SELECT company_id FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NULL AND company_id > c.company_id ORDER BY company_id LIMIT 1), c.n + 1
    FROM c WHERE c.company_id IS NOT NULL AND c.n < :limit
)"""
COMPANIES_OF_BOTH = """
SELECT company_id FROM (SELECT company_id FROM c WHERE company_id IS NOT NULL UNION {due}) x
ORDER BY company_id LIMIT :limit
"""
# The priorities of each company's scheduled jobs, as many as it takes to find ``each`` jobs that are due. Every look
# has the order of the index and LIMIT 1: for EXISTS, PostgreSQL may read the table.
LEVELS_OF = """
WITH RECURSIVE level(company_id, priority, n) AS (
    SELECT c.value, (SELECT priority FROM {s}content_jobs j
        WHERE status = 'queued' AND run_at IS NOT NULL AND j.company_id = c.value
        ORDER BY company_id, priority DESC, run_at, id LIMIT 1), 0
    FROM {companies}
  UNION ALL
    SELECT level.company_id, (SELECT priority FROM {s}content_jobs j
        WHERE status = 'queued' AND run_at IS NOT NULL AND j.company_id = level.company_id
            AND j.priority < level.priority
        ORDER BY company_id, priority DESC, run_at, id LIMIT 1),
        level.n + CASE WHEN (SELECT run_at FROM {s}content_jobs j
            WHERE status = 'queued' AND run_at IS NOT NULL AND j.company_id = level.company_id
                AND j.priority = level.priority
            ORDER BY company_id, priority DESC, run_at, id LIMIT 1) <= {by} THEN 1 ELSE 0 END
    FROM level WHERE level.priority IS NOT NULL AND level.n < :each
)"""
SELECT_DUE = """
SELECT i.company_id, i.object_key, i.not_before FROM {s}asset_intents i
WHERE i.not_before >= :after AND {sweepable}
ORDER BY i.not_before LIMIT :limit
"""
# A job that was ended by hand may have no time of its end.
OVER = "status IN ('done', 'failed', 'cancelled') AND COALESCE(finished_at, updated_at) <= :before"
