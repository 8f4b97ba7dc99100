"""A sweep that dies by SIGKILL at a named step: ``python -m tests.support.doomed_sweep URL FOLDER STEP``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

import jobkit
from jobkit.assets.intents import GarbageCollector
from jobkit.db.dialects import statements_for
from jobkit.storage.local import LocalStorage
from tests.support.doomed import die, then_die


def when_state_is(state: str, owner: Any, name: str, *, after: bool) -> None:
    original = getattr(owner, name)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if options["state"] == state and not after:
            die()
        result = original(self, *args, **options)
        return die() if options["state"] == state and result else result

    setattr(owner, name, call)


def in_visit(state: str, *, after: bool) -> None:
    visit = GarbageCollector._visit

    def call(self: GarbageCollector, tally: Any, visited: str, keys: Any) -> None:
        if visited == state and not after:
            die()
        visit(self, tally, visited, keys)
        if visited == state:
            die()

    GarbageCollector._visit = call  # type: ignore[method-assign]


def steps(statements: Any) -> dict[str, Callable[[], None]]:
    return {
        "second: claimed, not committed": lambda: when_state_is("collected", statements, "claim_intents", after=True),
        "second: claimed": lambda: in_visit("collected", after=False),
        "second: one removed": lambda: then_die(LocalStorage, "remove"),
        "second: record gone, not committed": lambda: then_die(statements, "drop_intents"),
        "second: done": lambda: in_visit("collected", after=True),
        "tombstone: claimed, not committed": lambda: when_state_is(
            "tombstone", statements, "claim_intents", after=True
        ),
        "tombstone: claimed": lambda: in_visit("tombstone", after=False),
        "tombstone: done": lambda: in_visit("tombstone", after=True),
        "pending: looked": lambda: when_state_is("pending", statements, "claim_intents", after=False),
        "pending: claimed, not committed": lambda: when_state_is("pending", statements, "claim_intents", after=True),
        "pending: claimed": lambda: in_visit("pending", after=False),
        "pending: done": lambda: in_visit("pending", after=True),
    }


STEPS = tuple(steps(None))


def main(url: str, folder: str, step: str) -> None:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        jobkit.configure_sqlite(engine)
    steps(type(statements_for(engine)))[step]()
    jobkit.AssetStore(folder, engine=engine).collect_garbage(dry_run=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
