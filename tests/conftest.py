"""Soak tests run only where they are asked for by name: ``pytest -m soak``.

Where tests are spread over processes (``-n``), those of one file stay together, and so do those of
a room that shares a Ray cluster.
"""

import pytest

SHARED = ("cluster", "search")  # rooms whose tests share a cluster


def pytest_itemcollected(item):
    room = item.path.parent.name
    item.add_marker(pytest.mark.xdist_group(room if room in SHARED else str(item.path)))


def pytest_collection_modifyitems(config, items):
    if "soak" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="only with -m soak"))
