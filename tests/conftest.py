"""Soak tests run only where they are asked for by name: ``pytest -m soak``."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "soak" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="only with -m soak"))
