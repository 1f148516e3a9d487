"""One cluster for all tests of the search that train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from bnncore.cluster.cluster import Cluster
from bnncore.cluster.connect import connect
from bnncore.params import RayParams


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    connect(RayParams(), num_cpus=2)
    with Cluster(RayParams(gpus_per_actor=0.0)) as started:
        yield started
    ray.shutdown()
