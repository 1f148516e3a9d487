"""One cluster of this machine, and one handle on it, for all tests of the room."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import ray
import torch

from bnncore.cluster.cluster import Cluster
from bnncore.cluster.connect import connect
from bnncore.params import RayParams
from bnncore.training import loop, schemes
from tests import driver


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


@pytest.fixture
def seed(request) -> int:
    """A seed of the moment, printed so that a failure can be repeated: BNNCORE_TEST_SEED."""
    seed = int(os.environ.get("BNNCORE_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"\n{request.node.name}: BNNCORE_TEST_SEED={seed}")
    return seed


@pytest.fixture(scope="package")
def undisturbed() -> dict[str, torch.Tensor]:
    """What `driver.work` gives when nothing happens to it."""
    p, images = driver.work()
    return schemes.train(p, lambda jobs: loop.train_many(jobs, images)).state
