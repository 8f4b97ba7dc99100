"""What is sent to a database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

Heard = Callable[[sa.Connection, str, Any], object]


@contextmanager
def hearing(engine: sa.Engine, heard: Heard) -> Iterator[None]:
    """Call ``heard`` with every statement and its parameters, as the driver gets them, right before it is sent."""

    def listen(connection: sa.Connection, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        heard(connection, statement, parameters)

    sa.event.listen(engine, "before_cursor_execute", listen)
    try:
        yield
    finally:
        sa.event.remove(engine, "before_cursor_execute", listen)
