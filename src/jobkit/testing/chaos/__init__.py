"""Chaos: kills, freezes and disconnects the processes of a run, then checks its database and storage from outside.

::

    python -m jobkit.testing.chaos --database sqlite:////tmp/chaos/jobs.db --storage file:///tmp/chaos/assets

Workers, a creator, a janitor and subscribers are processes that use jobkit as a host does. A plan drawn from a seed
says where each worker dies, which is frozen for longer than its lease, when the database restarts and the storage
fails. Then the faults end, and every job has to. The verdict goes by the rows, the objects and what the subscribers
heard, and does not hold when a fault that was planned never struck.
"""

from jobkit.testing.chaos.harness import Target, run
from jobkit.testing.chaos.plan import Plan, Size, draw
from jobkit.testing.chaos.verdict import Verdict

__all__ = ["Plan", "Size", "Target", "Verdict", "draw", "run"]
