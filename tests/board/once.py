"""A pytest plugin: once a test has failed, its other parameters are left out. One failure is enough to kill a bug."""

from __future__ import annotations

from typing import Any

import pytest

_failed: set[tuple[str, str]] = set()


def _function(item: pytest.Item) -> tuple[str, str]:
    return item.location[0], getattr(item, "originalname", item.name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _function(item) in _failed:
        pytest.skip("it has failed already")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" and report.failed:
        _failed.add(_function(item))
    return report
