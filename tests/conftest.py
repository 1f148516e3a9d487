"""In which order tests run, and which do not: soak tests only by name, ``pytest -m soak``."""

import os
import signal
from pathlib import Path

import pytest

# Before torch is imported, and for every process that a test starts: a second thread makes small
# layers no faster, those of two test processes wait for each other, and bits depend on the number.
os.environ["OMP_NUM_THREADS"] = "1"

# A process takes whole files (`make test`), so the long ones come first, longest first.
LONG = [
    "pipeline/test_pipeline.py",
    "search/test_run.py",
    "cluster/test_drivers_and_nodes.py",
    "cluster/test_failures.py",
    "cluster/test_submit.py",
    "cluster/test_group.py",
    "packed/test_compiled_kernels.py",
    "storage/test_storage.py",
    "cluster/test_cluster.py",
    "cluster/test_connect.py",
    "device/test_export.py",
    "training/test_compile.py",
    "training/test_loop.py",
    "training/test_stack.py",
    "tracking/test_tracking.py",
    "training/test_step.py",
    "training/test_schemes.py",
    "pipeline/test_presets.py",
    "training/test_layers.py",
]


def pytest_configure():
    # A shell starts what it puts in the background with Ctrl-C ignored; tests send it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    long = [Path(__file__).parent / name for name in LONG]
    items.sort(key=lambda item: long.index(item.path) if item.path in long else len(long))
    if "soak" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="only with -m soak"))
