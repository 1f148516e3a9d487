"""One cluster for all tests of the search that train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from bnncore.cluster.cluster import Cluster
from bnncore.params import RayParams


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR",
             log_to_driver=False, _node_ip_address="127.0.0.1")  # fmt: skip
    with Cluster(RayParams(gpus_per_actor=0.0)) as started:
        yield started
    ray.shutdown()
