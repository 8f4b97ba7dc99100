"""Writers that die: ``python -m tests.support.writers URL FOLDER LIVES TURNS SEED``.

Six processes at a time, forked from this one, put files and give them rows, delete and roll back; some die by SIGKILL.
Each line on the output tells what happened to one of them.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

import jobkit
from jobkit.storage.local import LocalStorage
from tests.support.doomed import die

AT_ONCE = 6
COMPANY = "acme"


def say(word: str) -> None:
    os.write(1, f"{word}\n".encode())


class Writer:
    def __init__(self, url: str, folder: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.engine = sa.create_engine(url, poolclass=sa.NullPool)
        if self.engine.dialect.name == "sqlite":
            jobkit.configure_sqlite(self.engine, synchronous="NORMAL", busy_timeout=60)
        self.store = jobkit.AssetStore(folder, engine=self.engine)
        self.mine: list[jobkit.Asset] = []

    def turn(self) -> None:
        """Put one file, and do one of the things that hosts do with it."""
        body = self.random.randbytes(self.random.randint(1, 3_000))
        stored = self.store.put_file(COMPANY, original_filename="a.bin", content_type="a/b", body=body)
        act = self.random.choice([self.keep, self.keep, self.keep, self.roll_back, self.savepoint, self.forget])
        try:
            with Session(self.engine) as session:
                act(session, stored)
        except jobkit.AssetNotFound:
            say("swept")
        if self.mine and self.random.random() < 0.4:
            self.delete(self.mine.pop(0))

    def keep(self, session: Session, stored: Any) -> None:
        asset = self.store.create(session, COMPANY, stored, source_task_id=None)
        session.commit()
        self.mine.append(asset)
        say("kept")

    def roll_back(self, session: Session, stored: Any) -> None:
        self.store.create(session, COMPANY, stored, source_task_id=None)
        session.rollback()
        say("rolled-back")

    def savepoint(self, session: Session, stored: Any) -> None:
        with session.begin_nested() as savepoint:
            self.store.create(session, COMPANY, stored, source_task_id=None)
            savepoint.rollback()
        session.commit()
        say("rolled-back")

    def forget(self, session: Session, stored: Any) -> None:
        say("forgotten")

    def delete(self, asset: jobkit.Asset) -> None:
        with Session(self.engine) as session:
            self.store.delete(session, asset)
            if self.random.random() < 0.3:
                session.rollback()
            else:
                session.commit()
                say("deleted")

    def doom(self) -> None:
        """Die in the next turn: before the object, after it, in the transaction of its row, or in that of a delete."""
        publish = LocalStorage.publish
        point = self.random.choice(["before", "after", "in create", "in delete"])

        def die_around(storage: LocalStorage, *args: Any) -> None:
            if point == "before":
                die()
            publish(storage, *args)
            die()

        if point in ("before", "after"):
            LocalStorage.publish = die_around  # type: ignore[method-assign]
        elif point == "in create" or not self.mine:
            sa.event.listen(self.engine, "commit", self._die_at_commit_of_create)
        else:
            sa.event.listen(self.engine, "commit", die)
            self.delete(self.mine.pop())
        self.turn()
        die()

    def _die_at_commit_of_create(self, connection: sa.Connection) -> None:
        self.commits = getattr(self, "commits", 0) + 1
        if self.commits == 2:  # the first one is that of the record
            die()


def live(url: str, folder: str, turns: int, seed: int) -> None:
    writer = Writer(url, folder, seed)
    for _ in range(turns):
        writer.turn()
    if seed % 2:
        writer.doom()


def main(url: str, folder: str, lives: int, turns: int, seed: int) -> None:
    """Fork ``lives`` writers, six at a time; each takes ``turns`` turns, and every other one then dies in its next."""
    Writer(url, folder, 0)  # so that everything is imported before the forks
    running: set[int] = set()
    for number in range(lives):
        if len(running) == AT_ONCE:
            running.discard(ended())
        process = os.fork()
        if not process:
            live(url, folder, turns, seed + number)
            os._exit(0)
        running.add(process)
    while running:
        running.discard(ended())


def ended() -> int:
    process, status = os.wait()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        say("died")
    elif status:
        say("failed")
    return process


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(argument) for argument in sys.argv[3:]))
