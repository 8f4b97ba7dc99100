"""Keys that may hold an object without a live row, on SQLite."""

from __future__ import annotations

import sqlalchemy as sa

from jobkit.db.dialects import base
from jobkit.db.dialects.sql import DUE, SELECT_DUE, Sql
from jobkit.tables import SQLITE_TIME, sqlite_in

INSERT_INTENTS = Sql(
    f"""
INSERT INTO {{s}}asset_intents (id, company_id, provider, object_key, not_before)
SELECT json_extract(value, '$.id'), json_extract(value, '$.company'), json_extract(value, '$.provider'),
    json_extract(value, '$.key'), {sqlite_in(":grace")}
FROM json_each(:intents) WHERE true
ON CONFLICT (provider, object_key) DO NOTHING
"""
)

# The company is part of the match, because the index of assets begins with it.
# The plus signs keep the planner from reading all keys of the provider instead of those that are due.
_SWEEPABLE = f"""+i.provider = :provider AND i.state = :state AND i.not_before <= {sqlite_in(":early")}
    AND NOT EXISTS (
        SELECT 1 FROM {{s}}assets a
        WHERE a.company_id = i.company_id AND a.object_key = i.object_key AND a.provider = i.provider
    )"""

DUE_INTENTS = Sql(SELECT_DUE.replace("{sweepable}", _SWEEPABLE), *DUE)

CLAIM_INTENTS = Sql(
    f"""
UPDATE {{s}}asset_intents AS i SET state = 'collected', not_before = {sqlite_in(":hold")}
WHERE i.provider = :provider AND i.object_key IN (SELECT value FROM json_each(:keys))
    AND {_SWEEPABLE.replace("i.not_before", "+i.not_before")}
RETURNING object_key
""",
    sa.column("object_key", sa.Text()),
)

DROP_INTENTS = Sql(
    """
DELETE FROM {s}asset_intents
WHERE provider = :provider AND object_key IN (SELECT value FROM json_each(:keys)) AND state = 'collected'
"""
)

POSTPONE_INTENTS = Sql(
    f"""
UPDATE {{s}}asset_intents AS i
SET state = 'tombstone', attempts = attempts + 1, last_error = json_extract(f.value, '$.error'),
    not_before = strftime({SQLITE_TIME}, 'now', (60 << min(attempts, 10)) || ' seconds')
FROM json_each(:failures) AS f
WHERE i.provider = :provider AND i.object_key = json_extract(f.value, '$.key') AND i.state = 'collected'
"""
)


class Intents(base.Intents):
    """Intents on SQLite."""

    _insert_intents, _due_intents, _claim_intents = INSERT_INTENTS, DUE_INTENTS, CLAIM_INTENTS
    _drop_intents, _postpone_intents = DROP_INTENTS, POSTPONE_INTENTS
