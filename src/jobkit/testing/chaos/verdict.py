"""The verdict: what a run did, what came of it, and whether that is enough to go by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

# The promises that are counted by themselves, each with the words a violation of it begins with.
COUNTED = {
    "lost": "I1: ",
    "done_twice": "I2: ",
    "orphan_rows": "I5: ",
    "wrong_bytes": "I6: ",
    "garbage": "I7: ",
    "missing_events": "I8: ",
}
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a run. ``violations``: what must never be. ``lacks``: faults that were planned and did not strike,
    or not often enough, so that nothing is proved. It holds when there is neither.
    """

    seed: int
    database: str
    storage: str
    seconds: float
    jobs: dict[str, int]
    #: Jobs that lost their worker so often that they were stopped, or whose storage failed: with the words they got.
    unlucky: dict[str, int]
    faults: dict[str, int]
    points: dict[str, int]
    zombie_writes_rejected: int
    events: int
    events_heard: dict[str, int]
    objects: int
    object_bytes: int
    swept: dict[str, int]
    lost: int
    done_twice: int
    orphan_rows: int
    wrong_bytes: int
    garbage: int
    missing_events: int
    violations: tuple[str, ...]
    lacks: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every promise was kept, under as many faults as were planned."""
        return not self.violations and not self.lacks

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "holds": self.holds}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        def counts(found: dict[str, int]) -> str:
            return ", ".join(f"{count:,} {name}" for name, count in found.items()) or "none"

        lines = [
            f"seed {self.seed} on {self.database} and {self.storage}, {self.seconds:.0f} s: "
            + ("every promise was kept" if self.holds else "NOT PROVED" if not self.violations else "VIOLATED"),
            f"  jobs: {counts(self.jobs)}",
            f"  ended by their bad luck: {counts(self.unlucky)}",
            f"  faults: {counts(self.faults)}",
            f"  killed or frozen at: {counts(self.points)}",
            f"  zombie writes rejected: {self.zombie_writes_rejected:,}",
            f"  events: {self.events:,}; heard: {counts(self.events_heard)}",
            f"  objects: {self.objects:,}, {self.object_bytes:,} bytes; {counts(self.swept)}",
            "  " + ", ".join(f"{getattr(self, name)} {name.replace('_', ' ')}" for name in COUNTED),
        ]
        lines += [f"  violated: {words}" for words in self.violations[:_SHOWN]]
        if len(self.violations) > _SHOWN:
            lines.append(f"  and {len(self.violations) - _SHOWN} more violations")
        lines += [f"  lacks: {words}" for words in self.lacks]
        return "\n".join(lines)


def counted(violations: list[str]) -> dict[str, int]:
    """How many violations there are of each promise that is counted by itself."""
    return {name: sum(words.startswith(begin) for words in violations) for name, begin in COUNTED.items()}
