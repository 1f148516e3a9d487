"""One cluster for the tests of a file that train; it ends before another room begins its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from bnncore.cluster.cluster import Cluster
from bnncore.cluster.connect import connect
from bnncore.params import RayParams


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    connect(RayParams(), num_cpus=2)
    with Cluster(RayParams(gpus_per_actor=0.0)) as started:
        yield started
    ray.shutdown()
