"""Suites for pytest of what jobkit needs of a storage and of a database: subclass one and give it your own.

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
