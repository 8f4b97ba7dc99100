"""Keys that may hold an object without a live row, on PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.sql import DUE, SELECT_DUE, Sql

INSERT_INTENTS = Sql(
    """
INSERT INTO {s}asset_intents (id, company_id, provider, object_key, not_before)
SELECT id, company, provider, key, clock_timestamp() + make_interval(secs => :grace)
FROM jsonb_to_recordset(CAST(:intents AS jsonb)) AS i(id uuid, company text, provider text, key text)
ON CONFLICT (provider, object_key) DO NOTHING
"""
)

# The company is part of the match, because the index of assets begins with it. clock_timestamp() may change between two
# rows, so an index cannot serve it.
_SWEEPABLE = """i.provider = :provider AND i.state = :state
    AND i.not_before <= statement_timestamp() + make_interval(secs => :early)
    AND NOT EXISTS (
        SELECT FROM {s}assets a
        WHERE a.company_id = i.company_id AND a.object_key = i.object_key AND a.provider = i.provider
    )"""

DUE_INTENTS = Sql(SELECT_DUE.replace("{sweepable}", _SWEEPABLE), *DUE)

# As an array the keys are found by index one by one; as a join, one plan compares each with all of the provider.
_KEYS = "ANY (ARRAY(SELECT jsonb_array_elements_text(CAST(:keys AS jsonb))))"

# SKIP LOCKED leaves out a key that another sweep holds, or the transaction that gives it its row.
CLAIM_INTENTS = Sql(
    f"""
WITH due AS MATERIALIZED (
    SELECT i.object_key FROM {{s}}asset_intents i
    WHERE i.object_key = {_KEYS} AND {_SWEEPABLE}
    FOR UPDATE OF i SKIP LOCKED
)
UPDATE {{s}}asset_intents i SET state = 'collected', not_before = clock_timestamp() + make_interval(secs => :hold)
FROM due WHERE i.provider = :provider AND i.object_key = due.object_key
RETURNING i.object_key
""",
    sa.column("object_key", sa.Text()),
)

DROP_INTENTS = Sql(
    f"DELETE FROM {{s}}asset_intents WHERE provider = :provider AND object_key = {_KEYS} AND state = 'collected'"
)

POSTPONE_INTENTS = Sql(
    f"""
UPDATE {{s}}asset_intents i
SET state = 'tombstone', attempts = i.attempts + 1, last_error = f.error,
    not_before = clock_timestamp() + make_interval(secs => 60 << least(i.attempts, 10))
FROM jsonb_to_recordset(CAST(:failures AS jsonb)) AS f(key text, error text)
WHERE i.provider = :provider AND i.object_key = f.key AND i.object_key = {_KEYS} AND i.state = 'collected'
"""
)


class Intents(base.Intents):
    """Intents on PostgreSQL."""

    _insert_intents, _due_intents, _claim_intents = INSERT_INTENTS, DUE_INTENTS, CLAIM_INTENTS
    _drop_intents, _postpone_intents = DROP_INTENTS, POSTPONE_INTENTS
