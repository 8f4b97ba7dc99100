"""The processes of a run, as their harness holds them: forked by a zygote, signalled by name, heard on one pipe."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DEADLINE = 60.0


class Processes:
    """Started with the ``with``; all of them are dead after it."""

    def __init__(self, folder: Path, database: str, storage: str, setup: str) -> None:
        self._folder = folder
        self._arguments = [str(folder), database, storage, setup]
        self._pending = b""

    def __enter__(self) -> Self:
        # In a session of its own: Ctrl-C in a terminal is for the harness alone, which then ends all of them.
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "jobkit.testing.chaos.workers.zygote", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,
        )
        self._selector = selectors.DefaultSelector()
        assert self._zygote.stdout is not None
        self._selector.register(self._zygote.stdout, selectors.EVENT_READ)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._selector.close()
        # Whoever still lives may have filled the pipe, and must not keep the zygote from its end.
        self._zygote.stdout.close()
        try:
            self._zygote.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self._zygote.kill()
            self._zygote.wait()

    def start(self, name: str, role: str, settings: dict[str, Any]) -> None:
        """Fork one more."""
        self._send({"name": name, "role": role, "settings": settings})

    def signal(self, name: str, number: int) -> None:
        """Send a signal to the one of this name; nothing happens when it has ended."""
        self._send({"name": name, "signal": int(number)})

    def messages(self, timeout: float) -> Iterator[dict[str, Any]]:
        """What they told, waiting up to ``timeout`` seconds for the first of it."""
        if not self._selector.select(max(0.0, timeout)):
            return
        assert self._zygote.stdout is not None
        data = os.read(self._zygote.stdout.fileno(), 1 << 20)
        if not data:
            raise RuntimeError(f"the zygote ended: see {self._folder / 'stderr.log'}")
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def _send(self, order: dict[str, Any]) -> None:
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(order).encode() + b"\n")
        self._zygote.stdin.flush()
