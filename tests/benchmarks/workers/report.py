"""What a worker tells of itself."""

from __future__ import annotations

import json
import sys

from tests.benchmarks.measuring import MIB, Figures, Meter, memory


class Report:
    """Costs from the first file to the last job done; memory and modules as they then are."""

    def __init__(self, postmaster: int | None) -> None:
        self._meter = Meter(postmaster)
        self.begin = self._meter.begin
        self.costs: Figures = {}
        self.memory: Figures = {}
        self.modules: list[str] = []

    def end(self, jobs: int) -> None:
        self.costs = self._meter.end(jobs)
        self.memory = {f"{field}, MiB": memory(field) / MIB for field in ("VmHWM", "VmRSS")}
        # Only what was loaded from a file: the rest is part of the interpreter, or cannot be imported by its name.
        self.modules = sorted(name for name, module in sys.modules.items() if getattr(module, "__file__", None))

    def tell(self) -> None:
        print(json.dumps({"costs": self.costs, "memory": self.memory, "modules": self.modules}))
