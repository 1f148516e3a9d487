"""Training over Ray actors gives, bit for bit, what one process gives."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import ray
import torch
from torch.nn import functional as F

from bnncore.cluster import actors
from bnncore.networks.combine import TreeSum, tree_sum
from bnncore.networks.ensemble import Ensemble
from bnncore.params import RayParams
from bnncore.training import schemes, train
from tests.small import differences, plan


@pytest.fixture(scope="module")
def cluster():
    """Four slots on this machine; tests say how many of them are used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    actors.connect(RayParams(), num_cpus=4)
    with actors.Cluster(RayParams(actors=4)) as cluster:
        yield cluster
    ray.shutdown()
    torch.set_num_threads(threads)


CUSTOM = {"own": ["binary_conv"], "frozen": False, "name": "trained"}
GRID = [
    ("tentaclenet", "tentaclenet", {"classifier": "logits"}),
    ("tentaclenet", "tentaclenet", {"classifier": "features"}),
    ("fusion", "no_shared", {}),
    ("fusion", "shared_conv", {}),
    ("fusion", "c1", {}),
    ("fusion", "c2", {}),
    ("fusion", "c3", {}),
    ("fusion", "c3_blocks", {}),
    ("fusion", "all_frozen", {}),
    ("fusion", CUSTOM, {}),
    ("voting", "shared_conv", {}),
]
IN_SEQUENCE_OR_ALONE = [
    "bagging",
    "boosting",
    "gradient_boosting",
    "snapshot",
    "stochastic_rounding",
]
SHARDED = [
    ("tentaclenet", "tentaclenet", {"classifier": "logits"}),
    ("fusion", "shared_conv", {"recipe": {"batch_size": 50}}),  # ends with a batch of 42 images
    ("voting", "shared_conv", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "sharing", "extra"), GRID, ids=[f"{a}-{b if isinstance(b, str) else b['name']}-"
                                             f"{''.join(c.values())}" for a, b, c in GRID]
)  # fmt: skip
def test_same_bits_over_1_2_and_4_actors(cluster, scheme, sharing, extra):
    p, images = plan(scheme, sharing, **extra)
    alone = schemes.train(p, lambda jobs: train.train_many(jobs, images))
    assert differences(alone.state, p.start)  # it has learned something
    for count in (1, 2, 4):
        cluster.params = RayParams(actors=count)
        spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
        assert differences(alone.state, spread.state) == []
        for name, history in alone.histories.items():
            for a, b in zip(history, spread.histories[name], strict=True):
                assert (a["train_loss"], a["val_loss"]) == (b["train_loss"], b["val_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", IN_SEQUENCE_OR_ALONE)
def test_same_bits_of_members_that_train_alone(cluster, scheme):
    p, images = plan(scheme, "no_shared", members=2)
    alone = schemes.train(p, lambda jobs: train.train_many(jobs, images))
    assert differences(alone.state, p.start)
    cluster.params = RayParams(actors=2)
    spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    assert differences(alone.state, spread.state) == []


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "sharing", "extra"), SHARDED, ids=[s[0] for s in SHARDED])
def test_same_bits_over_members_times_shards(cluster, scheme, sharing, extra):
    extra = {**extra, "recipe": {"shards": 2, **extra.get("recipe", {})}}
    p, images = plan(scheme, sharing, members=2, **extra)
    alone = schemes.train(p, lambda jobs: train.train_many(jobs, images))
    whole, _ = plan(scheme, sharing, members=2, **{**extra, "recipe": {"shards": 1}})
    other = schemes.train(whole, lambda jobs: train.train_many(jobs, images))
    assert differences(alone.state, other.state), "batch norm sees other images"
    for count in (1, 2, 4):
        cluster.params = RayParams(actors=count)
        spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
        assert differences(alone.state, spread.state) == []
        if scheme != "voting":
            assert [e.get("actors", 1) for h in spread.histories.values() for e in h] == [count] * 2


@pytest.mark.slow
def test_blocks_that_are_no_power_of_two_agree_within_rounding(cluster):
    p, images = plan(members=6, epochs=1)
    alone = schemes.train(p, lambda jobs: train.train_many(jobs, images))
    cluster.params = RayParams(actors=2)
    spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    losses = [r.histories["e"][0]["train_loss"] for r in (alone, spread)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_exchange_stays_within_its_bytes(cluster):
    p, images = plan("tentaclenet", "tentaclenet", members=4, epochs=1)
    shared = sum(
        v.numel() for n, v in Ensemble(p.spec).parameters_by_name() if n.startswith("shared.")
    )
    cluster.params = RayParams(actors=4)
    spread = schemes.train(p, lambda jobs: cluster.train_many(jobs, images))
    (epoch,) = spread.histories["e"]
    assert epoch["actors"] == 4
    padding = 4 * 3  # each tensor is cut in four equal parts
    logits = 64 * 10 * 4
    assert epoch["sent_per_step"] <= 2 * (logits + 4 * shared + 4 * padding)
    assert 0 < epoch["exchange_share"] < 1


def test_says_what_is_missing(cluster):
    with (
        pytest.raises(actors.ClusterError, match=r"64 CPU each.*has 4 CPU"),
        actors.Cluster(RayParams(cpus_per_actor=64, wait_s=0)),
    ):
        pass
    with (
        pytest.raises(actors.ClusterError, match=r"0.5 GPU"),
        actors.Cluster(RayParams(gpus_per_actor=0.5, wait_s=0)),
    ):
        pass


@pytest.mark.timeout(60)  # Ray's own attempts take ten minutes
def test_an_unreachable_cluster_is_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(actors.ClusterError, match=r"127.0.0.1:9"):
        actors.connect(RayParams(address="127.0.0.1:9"))


def test_a_cluster_that_was_slow_to_start_is_started_again(monkeypatch, caplog):
    """What Ray says of a node that took more than its 30 s; too slow a machine cannot be had."""
    asked = []

    def init(address, **options):
        asked.append(address)
        if len(asked) == 1:
            raise Exception("The current node timed out during startup. This could happen ..")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    actors.connect(RayParams())
    assert asked == ["local", "local"]
    assert "trying once more" in caplog.text
    asked.clear()
    with pytest.raises(Exception, match="timed out"):
        actors.connect(RayParams(address="auto"))
    assert asked == ["auto"]


@pytest.mark.parametrize("members", range(1, 12))
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_blocks(members, count):
    parts = actors.blocks(tuple(range(members)), count)
    assert sum(parts, ()) == tuple(range(members))
    assert len(parts) <= count
    sizes = {len(part) for part in parts[:-1]}
    assert len(sizes) <= 1


def test_a_tree_of_aligned_blocks_is_the_tree_of_all():
    torch.manual_seed(0)
    values = list(torch.randn(11, 50) * 10.0 ** torch.randint(-4, 5, (11, 1)))
    for n in range(1, 12):
        tree = TreeSum()
        for value in values[:n]:
            tree.add(value)
        assert torch.equal(tree.value(), tree_sum(values[:n]))
        for size in (2, 4, 8):
            blocks = [tree_sum(values[k : min(k + size, n)]) for k in range(0, n, size)]
            assert torch.equal(tree_sum(blocks), tree_sum(values[:n]))


class _Threads:
    """An exchange between trainers in threads of this process."""

    def __init__(self, size: int):
        self.slots: list = [None] * size
        self.barrier = threading.Barrier(size)

    def rank(self, rank: int):
        shared = self

        class Rank(train.Alone):
            size = len(shared.slots)

            def sum(self, value):
                shared.slots[rank] = value.clone()
                shared.barrier.wait()
                total = tree_sum(shared.slots)
                shared.barrier.wait()
                return total

        exchange = Rank()
        exchange.rank = rank
        return exchange


def _gradients(job, images, blocks, dtype, **options):
    """Name -> gradient of one step, with the members spread over trainers."""
    exchange = _Threads(len(blocks))
    found: dict[str, torch.Tensor] = {}

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        alone = len(blocks) == 1
        trainer = train.Trainer(
            job, images, blocks[rank], None if alone else exchange.rank(rank), "cpu", **options
        )
        trainer.ensemble.to(dtype)
        trainer.ensemble.train()
        trainer._seed_dropout(0)
        at = torch.arange(48)
        x = trainer._normalized(trainer.images[at]).to(dtype)
        trainer.step(x, trainer.labels[at], {})
        found.update({n: p.grad.clone() for n, p in trainer.trained.items()})

    threads = [threading.Thread(target=one, args=(k,)) for k in range(len(blocks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


STEPS = [*GRID[:-1], ("fusion", "shared_conv", {"recipe": {"prefixes": True}})]


@pytest.mark.parametrize(
    ("scheme", "sharing", "extra"), STEPS, ids=[str(k) for k in range(len(STEPS))]
)
def test_gradients_of_a_split_step(scheme, sharing, extra):
    p, images = plan(scheme, sharing, members=4, **extra)
    job = p.job(tuple(range(4)), "e")
    alone = _gradients(job, images, [(0, 1, 2, 3)], torch.float32)
    split = _gradients(job, images, [(0, 1), (2, 3)], torch.float32)
    quarters = _gradients(job, images, [(0,), (1,), (2,), (3,)], torch.float32)
    replayed = _gradients(job, images, [(0, 1, 2, 3)], torch.float32, replay=True)
    assert differences(alone, split) == []
    assert differences(alone, quarters) == []
    assert differences(alone, replayed) == []


@pytest.mark.parametrize(
    ("scheme", "sharing", "extra"), STEPS[:-1], ids=[str(k) for k in range(len(STEPS) - 1)]
)
def test_gradients_in_float64_are_those_of_the_plain_loop(scheme, sharing, extra):
    p, images = plan(scheme, sharing, members=4, **extra)
    job = p.job(tuple(range(4)), "e")
    split = _gradients(job, images, [(0, 1, 2), (3,)], torch.float64)
    plain = Ensemble(job.spec)
    plain.load(job.start)
    plain.double().train()
    trainer = train.Trainer(job, images, device="cpu")
    x = trainer._normalized(trainer.images[:48]).double()
    F.cross_entropy(plain(x), trainer.labels[:48]).backward()
    for name, parameter in plain.parameters_by_name():
        if parameter.requires_grad:
            reference = parameter.grad
            error = (split[name] - reference).abs().max()
            assert error <= 1e-9 * reference.abs().max(), name


def test_the_members_share_one_copy_of_the_data(cluster):
    _, images = plan()

    @ray.remote(num_cpus=0)  # the actors of other tests hold the CPUs
    def shares(found) -> bool:
        return not found.train.images.flags.writeable and not found.train.images.flags.owndata

    assert ray.get(shares.remote(ray.put(images)))


def test_order_of_results_is_the_order_of_jobs(cluster):
    p, images = plan("voting", "all_frozen", members=5, epochs=1)
    jobs = [p.job((i,), f"e.{i}") for i in range(5)]
    seen = []
    results = cluster.train_many(jobs, images, on_epoch=lambda job, _: seen.append(job.name))
    assert [t.job.name for t in results] == [j.name for j in jobs]
    assert sorted(seen) == [j.name for j in jobs]
    assert all(np.isfinite(t.outputs).all() for t in results)
