"""One cluster of this machine, and one handle on it, for all tests of the room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from bnncore.cluster.cluster import Cluster
from bnncore.cluster.connect import connect
from bnncore.params import RayParams


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """A cluster of four CPUs and no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        connect(RayParams(), num_cpus=4, num_gpus=0)
        yield
        ray.shutdown()


@pytest.fixture(scope="package")
def handle(local_ray) -> Iterator[Cluster]:
    with Cluster(RayParams(actors=4)) as cluster:
        yield cluster


@pytest.fixture
def cluster(handle) -> Cluster:
    """With four slots; a test says by its `params` how many of them are used."""
    handle.params = RayParams(actors=4)
    return handle
