"""Soak tests run only where they are asked for by name: ``pytest -m soak``."""

import signal

import pytest


def pytest_configure():
    # A shell starts what it puts in the background with Ctrl-C ignored; tests send it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if "soak" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="only with -m soak"))
