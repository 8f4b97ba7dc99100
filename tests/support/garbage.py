"""What nobody holds any more is gone, now."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected() -> Iterator[None]:
    """What was made within it and is held by nobody is collected when it is left."""
    gc.freeze()  # what other tests have left need not be looked through each time
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
