"""Marks what the TPU interpreter runs as slow: it takes most of the time here, and one Python running it is enough."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/pallas_kernels/" in item.nodeid and "tpu" in item.nodeid.partition("[")[2]:
            item.add_marker(pytest.mark.slow)
