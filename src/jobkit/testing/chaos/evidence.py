"""Evidence: what the processes of a run told the harness, collected while they live."""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from jobkit.testing.chaos.plan import Life


@dataclass
class Evidence:
    """What was told so far. Job ids are texts."""

    #: Jobs that a transaction of the creator was about to commit, or to roll back.
    tried: set[str] = field(default_factory=set)
    acked: set[str] = field(default_factory=set)
    rolled_back: set[str] = field(default_factory=set)
    #: Jobs that somebody asked to cancel, or to retry.
    asked: dict[str, set[str]] = field(default_factory=lambda: {"cancel": set(), "retry": set()})
    #: The last order that was begun, and how many were carried out when the creator had done.
    order: int = -1
    created: int | None = None
    #: How often each point struck, and how often a life ended otherwise because it never came there.
    struck: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    #: At which point each worker struck.
    struck_by: dict[str, str] = field(default_factory=dict)
    #: By worker: rejected writes and ended jobs, as it last told.
    rejected: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    #: Calls of the storage that failed, by operation.
    faults: Counter[str] = field(default_factory=Counter)
    #: Killed, frozen, stopped, restarted, cut, by what it was.
    done_to: Counter[str] = field(default_factory=Counter)
    #: What the janitor did.
    janitor: Counter[str] = field(default_factory=Counter)
    #: What no process may ever tell or do.
    violations: list[str] = field(default_factory=list)

    def hear(self, message: dict[str, Any]) -> None:
        """Take in what one process told."""
        name = message["from"]
        for key in ("struck", "fault", "rejected", "ended", "early", "created", "gone"):
            if key in message:
                getattr(self, f"_{key}")(name, message[key], message)
        for key in ("trying", "acked", "rolled_back"):
            if key in message and message["job"]:
                {"trying": self.tried, "acked": self.acked, "rolled_back": self.rolled_back}[key].add(message["job"])
        for key in ("trying", "acked", "rolled_back", "in_doubt"):
            self.order = max(self.order, message.get(key, -1))
        if "asking" in message:
            self.asked[message["asking"]].add(message["job"])
        self.janitor.update({key: message[key] for key in ("swept", "settled", "rescued") if key in message})

    def end(self, name: str, life: Life | None, code: int) -> None:
        """A worker's process has ended with this code. ``life``: what was planned for it."""
        if code == -signal.SIGKILL and life is not None and life.doom != "stop":
            self.done_to["killed"] += 1
            self.done_to["killed at any moment"] += name not in self.struck_by
        elif code:
            self.violations.append(f"I11: {name} ended by itself with {code}")
        elif life is not None and life.doom == "kill" and life.point is not None:
            self.violations.append(f"I11: {name} ended by itself")
        elif life is not None and life.doom == "stop":
            self.done_to["stopped"] += 1

    def _struck(self, name: str, point: str, _: dict[str, Any]) -> None:
        self.struck[point] += 1
        self.struck_by[name] = point

    def _fault(self, name: str, operation: str, _: dict[str, Any]) -> None:
        self.faults[operation] += 1

    def _rejected(self, name: str, count: int, _: dict[str, Any]) -> None:
        self.rejected[name] = count

    def _ended(self, name: str, count: int, _: dict[str, Any]) -> None:
        self.ended[name] = count

    def _early(self, name: str, words: str, _: dict[str, Any]) -> None:
        self.violations.append(f"I9: {name} was told before the commit: {words}")

    def _created(self, name: str, number: int, _: dict[str, Any]) -> None:
        self.created = number

    def _gone(self, name: str, gone: bool, message: dict[str, Any]) -> None:
        if gone:
            self.violations.append(f"I1: {name} could not {message['refused']} job {message['job']}: it is gone")
