"""Training over Ray actors gives, bit for bit, what one process gives."""

from __future__ import annotations

import numpy as np
import pytest
import ray

from bnncore import check
from bnncore.cluster import group
from bnncore.networks.ensemble import Ensemble
from bnncore.params import RayParams
from bnncore.training import loop, plans, schemes
from tests import tiny
from tests.small import differences, plan

IN_SEQUENCE_OR_ALONE = [
    "bagging",
    "boosting",
    "gradient_boosting",
    "snapshot",
    "stochastic_rounding",
]
# What a step computes is proved with threads, for all of `small.GRID`, in tests/training/test_step.
# These show what threads do not: the sums of real collectives, of two and of four; states that are
# merged, and jobs that arrive whole. By their numbers of actors, so that those are used again.
SPREAD = [
    (1, "voting", "shared_conv", {"recipe": {"distill": 0.5, "optimizer": "adamw"}}),
    (2, "tentaclenet", "tentaclenet", {"classifier": "features"}),
    (2, "fusion", "shared_conv", {}),
    (4, "tentaclenet", "tentaclenet", {"classifier": "features"}),
    (4, "fusion", "no_shared", {"recipe": {"distill": 0.5}, "teacher": "ensemble"}),
]
# Members times shards of a batch.
SHARDED = [
    (2, "fusion", "shared_conv", {"recipe": {"batch_size": 50}}),  # ends with a batch of 42 images
    (4, "fusion", "shared_conv", {"recipe": {"batch_size": 50}}),
]


def named(cases) -> list[str]:
    return [f"{count}-{scheme}" for count, scheme, *_ in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "scheme", "sharing", "extra"), SPREAD, ids=named(SPREAD))
def test_same_bits_over_actors(cluster, count, scheme, sharing, extra):
    p, images = plan(scheme, sharing, members=4, **extra)
    alone = schemes.train(p, lambda jobs: loop.train_many(jobs, images))
    assert differences(alone.state, p.start)  # it has learned something
    cluster.params = RayParams(actors=count)
    spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    assert differences(alone.state, spread.state) == []
    for name, history in alone.histories.items():
        for a, b in zip(history, spread.histories[name], strict=True):
            assert (a["train_loss"], a["val_loss"]) == (b["train_loss"], b["val_loss"])
    if (count, scheme) == (4, "tentaclenet"):
        _stayed_within_its_bytes(p, spread.histories["e"])


def _stayed_within_its_bytes(p, history) -> None:
    """What four actors exchange: logits, and the gradients of what they share."""
    shared = sum(
        v.numel() for n, v in Ensemble(p.spec).parameters_by_name() if n.startswith("shared.")
    )
    padding = 4 * 3  # each tensor is cut in four equal parts
    logits = 64 * 10 * 4
    for epoch in history:
        assert epoch["actors"] == 4
        assert epoch["sent_per_step"] <= 2 * (logits + 4 * shared + 4 * padding)
        assert 0 < epoch["exchange_share"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", IN_SEQUENCE_OR_ALONE)
def test_same_bits_of_members_that_train_alone(cluster, scheme):
    p, images = plan(scheme, "no_shared", members=2)
    alone = schemes.train(p, lambda jobs: loop.train_many(jobs, images))
    assert differences(alone.state, p.start)
    cluster.params = RayParams(actors=2)
    spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    assert differences(alone.state, spread.state) == []


@pytest.mark.slow
@pytest.mark.parametrize(("count", "scheme", "sharing", "extra"), SHARDED, ids=named(SHARDED))
def test_same_bits_over_members_times_shards(cluster, count, scheme, sharing, extra):
    extra = {**extra, "recipe": {"shards": 2, **extra.get("recipe", {})}}
    p, images = plan(scheme, sharing, members=2, **extra)
    alone = schemes.train(p, lambda jobs: loop.train_many(jobs, images))
    whole, _ = plan(scheme, sharing, members=2, **{**extra, "recipe": {"shards": 1}})
    other = schemes.train(whole, lambda jobs: loop.train_many(jobs, images))
    assert differences(alone.state, other.state), "batch norm sees other images"
    cluster.params = RayParams(actors=count)
    spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    assert differences(alone.state, spread.state) == []
    assert [e["actors"] for h in spread.histories.values() for e in h] == [count] * 2


@pytest.mark.slow
def test_a_users_network_trains_over_actors_to_the_same_bits(cluster):
    """Its function, and a binarizer of the user's own, are found by name in other processes."""
    data = tiny.dataset((12, 12, 1), 4, train=32)
    sections = [{"name": n, "scheme": n, "sharing": "no_shared", "members": 2}
                for n in ("fusion", "snapshot")]  # fmt: skip
    p = tiny.parse(
        model={
            "backbone": "examples.own_cnn:small_cnn",
            "binarizer": {"weight": "tests.networks.test_binarize:half"},
        },
        ensembles={"train": sections},
    )
    check.check(p, data.image, 4)
    (fp32,) = loop.train_many([plans.first_job(p, data, None)], data)
    (bnn,) = loop.train_many([plans.first_job(p, data, fp32.state)], data)
    cluster.params = RayParams(actors=2)
    for section in p.ensembles.train:
        its = plans.plan(p, section, data, fp32.state, bnn.state)
        here = schemes.train(its, lambda jobs: loop.train_many(jobs, data)).state
        there = schemes.train(its, lambda jobs: cluster.train_many(jobs, data)).state
        assert differences(here, there) == []


@pytest.mark.slow
def test_blocks_that_are_no_power_of_two_agree_within_rounding(cluster):
    p, images = plan(members=6, epochs=1)
    alone = schemes.train(p, lambda jobs: loop.train_many(jobs, images))
    cluster.params = RayParams(actors=2)
    spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    losses = [r.histories["e"][0]["train_loss"] for r in (alone, spread)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("members", range(1, 12))
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_blocks(members, count):
    parts = group.blocks(tuple(range(members)), count)
    assert sum(parts, ()) == tuple(range(members))
    assert len(parts) <= count
    sizes = {len(part) for part in parts[:-1]}
    assert len(sizes) <= 1


@pytest.mark.slow
def test_the_members_share_one_copy_of_the_data(local_ray):
    _, images = plan()

    @ray.remote(num_cpus=0)  # the actors of other tests hold the CPUs
    def shares(found) -> bool:
        return not found.train.images.flags.writeable and not found.train.images.flags.owndata

    assert ray.get(shares.remote(ray.put(images)))


@pytest.mark.slow
def test_order_of_results_is_the_order_of_jobs(cluster):
    p, images = plan("voting", "all_frozen", members=5, epochs=1)
    jobs = [p.job((i,), f"e.{i}") for i in range(5)]
    seen = []
    results = cluster.train_many(jobs, images, on_epoch=lambda job, _: seen.append(job.name))
    assert [t.job.name for t in results] == [j.name for j in jobs]
    assert sorted(seen) == [j.name for j in jobs]
    assert all(np.isfinite(t.outputs).all() for t in results)
