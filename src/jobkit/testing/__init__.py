"""Tools for tests of hosts, storages and database drivers. Nothing else in jobkit imports this package.

``jobkit.testing.conformance`` needs pytest; this package does not.
"""

from jobkit.testing.assertions import assert_job_created, assert_no_job_created
from jobkit.testing.clock import FrozenClock
from jobkit.testing.faulty import Fault, FaultPlan, FaultyFileSystem, faulty_filesystem
from jobkit.testing.inline import drain, inline
from jobkit.testing.storage import temporary_assets

__all__ = [
    "Fault",
    "FaultPlan",
    "FaultyFileSystem",
    "FrozenClock",
    "assert_job_created",
    "assert_no_job_created",
    "drain",
    "faulty_filesystem",
    "inline",
    "temporary_assets",
]
