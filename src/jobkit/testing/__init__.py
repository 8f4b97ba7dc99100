"""For tests of hosts, and for authors of storages and databases' drivers. Nothing else of jobkit imports it.

``jobkit.testing.conformance`` needs pytest; this package does not.
"""

from jobkit.testing.faulty import Fault, FaultPlan, FaultyFileSystem, faulty_filesystem

__all__ = ["Fault", "FaultPlan", "FaultyFileSystem", "faulty_filesystem"]
