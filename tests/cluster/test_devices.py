"""Who asks for which device: a cluster with GPUs that are not there, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bnncore.training import memory
from tests.small import plan

SCRIPT = """
import json, os
import ray
from bnncore.cluster.cluster import Cluster
from bnncore.cluster.connect import connect
from bnncore.cluster.crew import Crew, Work
from bnncore.params import RayParams

def told(place, data):
    assigned = ray.get_runtime_context().get_assigned_resources()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return assigned.get("GPU", 0), place.device, place.threads, place.share, seen

connect(RayParams(), num_cpus=4, num_gpus=2)
found = {}
GIB = 2**30
for name, gpus, needs in (
    ("open", None, [1, GIB, 5 * GIB, 40 * GIB]), ("half", 0.5, [40 * GIB]), ("none", 0, [1])
):
    with Cluster(RayParams(gpus_per_actor=gpus)) as cluster:
        cluster._gpu = 16 * GIB
        results = {}
        works = [Work(str(need), told, (), bytes=need) for need in needs]
        Crew(cluster, None).run(works, lambda work, result: results.update({work.name: result}))
        tasks = [results[str(need)] for need in needs]
        found[name] = cluster.device, cluster._bundles(1), cluster.slots(), tasks
with Cluster(RayParams()) as cluster:
    found["unknown"] = cluster.place(1)[0]  # no task finds a GPU here, so a whole one is asked for
ray.shutdown()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_actors_and_tasks_reserve_what_they_train_on():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    device, bundles, slots, tasks = found["open"]
    assert (device, bundles, slots) == ("cuda", [{"CPU": 1.0, "GPU": 1.0}], 2)
    small, one, several, large = tasks
    for (gpus, device, threads, share, visible), expected in (
        (small, 1 / 8), (one, 1 / 8), (several, 1 / 3), (large, 1)
    ):  # fmt: skip
        assert (device, threads) == ("cuda", 1)
        assert [gpus, share] == pytest.approx([expected] * 2, abs=1e-3)
        assert visible in ("0", "1")
    assert found["half"][1] == [{"CPU": 1.0, "GPU": 0.5}]
    assert found["half"][3][0][:4] == [0.5, "cuda", 1, 0.5]
    assert found["none"] == [
        "cpu",
        [{"CPU": 1.0}],
        4,
        [[0, "cpu", 1, 1.0, *found["none"][3][0][4:]]],
    ]
    assert found["unknown"] == 1.0


def test_what_a_training_is_expected_to_take_grows_with_members_and_images():
    small, _ = plan(subset=0.05)
    model = small.spec.model
    base, members, images = (memory.expected(model, *n) for n in ((1, 64), (4, 64), (1, 256)))
    context = memory.CUDA_BYTES
    assert members - context == 4 * (base - context)
    assert 3.5 * (base - context) < images - context < 4 * (base - context)
