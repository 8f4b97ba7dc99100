"""What a storage and a database have to do for jobkit, as suites for pytest: subclass one, and give it your own.

::

    class TestOurStorage(AssetStoreConformance):
        @pytest.fixture
        def location(self):
            return "sftp://files.example/jobs", {"username": "app"}
"""

import pytest

pytest.register_assert_rewrite("jobkit.testing.conformance.assets", "jobkit.testing.conformance.jobs")

from jobkit.testing.conformance.assets import AssetStoreConformance  # noqa: E402
from jobkit.testing.conformance.jobs import JobStoreConformance  # noqa: E402

__all__ = ["AssetStoreConformance", "JobStoreConformance"]
