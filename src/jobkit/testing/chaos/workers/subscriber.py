"""A subscriber: a process that renders nothing, hears every event and writes it to a file, where it takes up again
after it was killed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jobkit import signals
from jobkit.events.relay import Relay
from jobkit.testing.chaos.workers.process import Process, Witness
from jobkit.types import CONTENT_JOB_EVENTS, JobEvent

# A subscriber checks one event in this many.
CHECKED = 4


def main(process: Process) -> None:
    """Write down what is heard, from the last cursor in the file on, until SIGTERM."""
    path = log_of(process.folder, process.name)
    heard = read_log(path)
    cursor = heard[-1]["cursor"] if heard else None
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.ftruncate(log, path.read_bytes().rfind(b"\n") + 1)
    witness = Witness(process)
    told = bool(heard)

    def hear(_company: str, *, event: JobEvent) -> None:
        nonlocal told
        line = {
            "life": process.settings["life"],
            "id": event.id,
            "seq": event.seq,
            "cursor": event.cursor,
            "company": event.company_id,
            "type": event.type,
            "job": str(event.job_id),
        }
        os.write(log, json.dumps(line).encode() + b"\n")
        if not told:
            told = True
            process.tell(heard=True)
        witness.sometimes(event, CHECKED)

    by_name = {signal.name: signal for signal in vars(signals).values() if isinstance(signal, signals.JobSignal)}
    for name in CONTENT_JOB_EVENTS:
        by_name[name].connect(hear)
    relay = Relay(process.engine(), after=cursor)
    process.persist(relay.start)
    process.tell(ready=True)
    while not process.ends_within(0.5):
        pass
    relay.stop()


def log_of(folder: Path, name: str) -> Path:
    """Where a subscriber writes."""
    return folder / f"{name}.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """What was heard, in order. A line that a kill cut off was not heard."""
    if not path.exists():
        return []
    text = path.read_bytes()
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
