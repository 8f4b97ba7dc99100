"""What waits, and in which order, on PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa

from jobkit._dialects import shared
from jobkit._dialects.base import WAITING, Sql
from jobkit.columns import UtcDateTime

# One look at each priority, however many jobs wait for a later time.
_LEVELS = """
WITH RECURSIVE level(priority) AS (
    (SELECT priority FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NOT NULL
        ORDER BY priority DESC, run_at, id LIMIT 1)
  UNION ALL
    SELECT (SELECT priority FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND priority < level.priority
        ORDER BY priority DESC, run_at, id LIMIT 1)
    FROM level WHERE level.priority IS NOT NULL
)"""

DUE_JOBS = Sql(
    _LEVELS
    + """, turn AS (
    SELECT x.*, row_number() OVER (PARTITION BY x.company_id ORDER BY x.priority DESC, x.run_at, x.id) AS n
    FROM level CROSS JOIN LATERAL (
        SELECT id, company_id, priority, run_at FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND priority = level.priority AND run_at <= :now
        ORDER BY priority DESC, run_at, id LIMIT :window
    ) x
)
SELECT id, company_id, priority, run_at FROM turn ORDER BY n, priority DESC, run_at, id LIMIT :limit
""",
    *WAITING,
    window=sa.Integer(),
    limit=sa.Integer(),
    now=UtcDateTime(),
)

HEADS = Sql(
    """
SELECT x.* FROM jsonb_array_elements_text(CAST(:companies AS jsonb)) AS c(company) CROSS JOIN LATERAL (
    SELECT id, company_id, priority, created_at FROM {s}content_jobs
    WHERE status = 'queued' AND run_at IS NULL AND company_id = c.company
    ORDER BY company_id, priority DESC, created_at, id LIMIT :each
) x
""",
    *WAITING,
    companies=sa.Text(),
    each=sa.Integer(),
)

COMPANIES = Sql(
    """
WITH RECURSIVE c(company_id, n) AS (
    (SELECT company_id, 1 FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL ORDER BY company_id LIMIT 1)
  UNION ALL
    SELECT (SELECT company_id FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NULL AND company_id > c.company_id ORDER BY company_id LIMIT 1), c.n + 1
    FROM c WHERE c.company_id IS NOT NULL AND c.n < :limit
)
SELECT company_id FROM c WHERE company_id IS NOT NULL
""",
    limit=sa.Integer(),
)

HAS_QUEUED = Sql(
    _LEVELS
    + """
SELECT EXISTS (SELECT 1 FROM {s}content_jobs WHERE status = 'queued' AND run_at IS NULL)
    OR EXISTS (SELECT 1 FROM level WHERE EXISTS (
        SELECT 1 FROM {s}content_jobs
        WHERE status = 'queued' AND run_at IS NOT NULL AND priority = level.priority AND run_at <= :now))
""",
    now=UtcDateTime(),
)


class Queue(shared.Queue):
    """``jobkit._dialects.base.QueueStatements`` for PostgreSQL."""

    _due, _heads, _companies, _has_queued = DUE_JOBS, HEADS, COMPANIES, HAS_QUEUED
