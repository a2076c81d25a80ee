"""The order of the test files."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter gate first: it takes longest, and a worker that ran it last would keep the other waiting."""
    items.sort(key=lambda item: "test_interpreter_gate" not in item.nodeid)
