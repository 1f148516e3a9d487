"""Soak tests run only where they are asked for by name: ``pytest -m soak``.

Where tests are spread over processes (``-n``), those of one file stay together, and so do those of
a room that shares a Ray cluster.
"""

import pytest

SHARED = ("cluster", "search")  # rooms whose tests share a cluster


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    soak = "soak" in config.getoption("markexpr")
    for item in items:
        room = item.path.parent.name
        group = room if room in SHARED else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
        if not soak and item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="only with -m soak"))
