"""The zygote: a process that has imported jobkit, and nothing more, and forks the others from itself.

A worker that is killed is followed by the next one, hundreds of times. Each of them would spend most of its life on
importing modules. The zygote makes no engine and no thread, so a child of it is as good as a fresh process.

It takes orders on its standard input and tells what happens on its standard output, a JSON object a line. Children
write to that same pipe: lines of less than ``PIPE_BUF`` arrive whole, whoever is killed. At the end of its input it
kills whoever is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from fsspec import get_filesystem_class

from jobkit.testing.chaos.workers.creator import main as creator
from jobkit.testing.chaos.workers.janitor import main as janitor
from jobkit.testing.chaos.workers.process import HANDLED, Process
from jobkit.testing.chaos.workers.subscriber import main as subscriber
from jobkit.testing.chaos.workers.worker import main as worker

ROLES = {"worker": worker, "creator": creator, "janitor": janitor, "subscriber": subscriber}


def main(folder: str, database: str, storage: str, setup: str) -> None:
    """Serve until standard input ends. The drivers of both URLs are imported beforehand, and ``setup`` is called."""
    sa.make_url(database).get_dialect().import_dbapi()
    get_filesystem_class(storage.partition("://")[0])
    if setup:
        module, _, function = setup.partition(":")
        getattr(import_module(module), function)()
    children: dict[int, str] = {}
    asleep, awake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(awake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        selector.register(asleep, selectors.EVENT_READ)
        pending, over = b"", False
        while not over:
            for key, _ in selector.select():
                if key.fd == asleep:
                    os.read(asleep, 4096)
                elif not (data := os.read(0, 65536)):
                    over = True
                else:
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        _obey(json.loads(line), children, folder, (asleep, awake))
            _reap(children)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _obey(order: dict[str, Any], children: dict[int, str], folder: str, pipe: tuple[int, int]) -> None:
    if "signal" in order:
        # A pid belongs to its child until it is reaped, which happens here only.
        for pid, name in children.items():
            if name == order["name"]:
                os.kill(pid, order["signal"])
        return
    # What the harness sends before the child has a handler for it waits, instead of killing the child.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    pid = os.fork()
    if pid == 0:
        _become(order, folder, pipe)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    children[pid] = order["name"]


def _become(order: dict[str, Any], folder: str, pipe: tuple[int, int]) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in pipe:
            os.close(descriptor)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        log = os.open(Path(folder, "stderr.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(log, 2)
        os.close(log)
        ROLES[order["role"]](Process(order["name"], order["settings"]))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _reap(children: dict[int, str]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        told = {"from": children.pop(pid), "exit": os.waitstatus_to_exitcode(status)}
        os.write(1, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
