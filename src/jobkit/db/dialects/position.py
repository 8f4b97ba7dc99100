"""A place in the event log, and the cursor that names it."""

from __future__ import annotations

import re
from typing import NamedTuple

# The numbers of transactions that each epoch of a log has for itself; see ``postgresql.moves``.
EPOCH = 1 << 48
_CURSOR = re.compile(r"([0-9]{1,19})-([0-9]{1,19})", re.ASCII)


class Position(NamedTuple):
    """A place in the event log: everything at or below it has been read. ``xid`` is 1 on SQLite; on PostgreSQL it is
    the number of the transaction, and ``EPOCH`` more for each time that the log has come to another server.
    """

    xid: int
    id: int

    @property
    def epoch(self) -> int:
        """How often the log had come to another server by then."""
        return self.xid // EPOCH

    def __str__(self) -> str:
        return f"{self.xid}-{self.id}"

    @classmethod
    def parse(cls, cursor: str) -> Position:
        """The position that ``str()`` gave; ``ValueError`` for anything else."""
        found = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
        if found is None or not (int(found[1]) or int(found[2])):
            raise ValueError(f"not a cursor of an event: {cursor!r:.80}")
        return cls(int(found[1]), int(found[2]))
