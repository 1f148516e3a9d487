"""The joint step spread over processes, here threads: the bits of one process, in whole trainings,
and in float64 the gradients of the plain loop."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bnncore.networks.combine import TreeSum, tree_sum
from bnncore.networks.ensemble import Ensemble
from bnncore.training.jobs import TrainingError
from bnncore.training.loop import Trainer, drive
from bnncore.training.step import Alone
from tests.small import GRID, SHARDED, differences, plan

JOINT = [row for row in GRID if row[0] != "voting"]
RECIPES = [
    {"recipe": {"prefixes": True}},
    {
        "recipe": {
            "distill": 0.5,
            "optimizer": "adamw",
            "epochs": 2,
            "warmup": 1,
            "label_smoothing": 0.1,
        }
    },
    {"recipe": {"distill": 0.5}, "teacher": "ensemble"},
    {"recipe": {"distill": 0.5, "prefixes": True}, "teacher": "ensemble"},
]
STEPS = [*JOINT, *(("fusion", "shared_conv", recipe) for recipe in RECIPES)]
MEMBERS = (0, 1, 2, 3)
HALVES, QUARTERS, UNEQUAL = [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 1, 2), (3,)]


class Rank(Alone):
    """The exchange of one of several threads: sums in the order of ranks, as between actors."""

    def __init__(self, rank: int, slots: list, barrier: threading.Barrier):
        self.rank, self.size, self.slots, self.barrier = rank, len(slots), slots, barrier

    def sum(self, value):
        self.slots[self.rank] = value.clone()
        self.barrier.wait()
        total = tree_sum(list(self.slots))
        self.barrier.wait()
        return total


class Group:
    """A trainer a thread, behind the face of one; `depth` of them share each block's batches."""

    def __init__(self, job, images, blocks, depth=1, **options):
        self.depth, self.size = depth, len(blocks) * depth
        self.barriers: list[threading.Barrier] = []
        world = self.exchanges(self.size)
        pairs = [rank for _ in blocks for rank in self.exchanges(depth)]
        each = job.recipe.shards // depth

        def make(rank):
            shards = tuple(range(rank % depth * each, (rank % depth + 1) * each))
            own = {"exchange": world[rank], "within": pairs[rank], "shards": shards}
            return Trainer(job, images, blocks[rank // depth], device="cpu", **own, **options)

        self.trainers = [make(rank) for rank in range(self.size)]

    def exchanges(self, size):
        slots, barrier = [None] * size, threading.Barrier(size, timeout=60)
        self.barriers.append(barrier)
        return [Rank(rank, slots, barrier) for rank in range(size)]

    def each(self, call):
        """Results of all threads; what one raises breaks the barriers of the others, and is raised
        here."""

        def one(trainer):
            try:
                return call(trainer)
            except BaseException:
                for barrier in self.barriers:
                    barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(one, trainer) for trainer in self.trainers]
        errors = [error for future in futures if (error := future.exception())]
        real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        for error in real or errors:
            raise error
        return [future.result() for future in futures]

    def epoch(self, history):
        results = self.each(lambda trainer: trainer.epoch(history))
        return results[0][0], np.concatenate([z for _, z in results[:: self.depth]])

    def validation_outputs(self):
        return np.concatenate([t.validation_outputs() for t in self.trainers[:: self.depth]])

    def bias(self):
        return self.trainers[0].bias()

    def state(self):
        return {n: v for trainer in self.trainers for n, v in trainer.state().items()}

    def load(self, state):
        for trainer in self.trainers:
            trainer.load(state)


def trained(job, images, trainer):
    """Weights and moments after a whole training, and its losses."""
    done = drive(job, images, trainer)
    keys = ("train_loss", "val_loss", "val_top1")
    return trainer.state(), [tuple(epoch[k] for k in keys) for epoch in done.history]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "sharing", "extra"), STEPS, ids=map(str, range(len(STEPS))))
def test_same_bits_over_1_2_and_4_processes_with_and_without_replay(scheme, sharing, extra):
    p, images = plan(scheme, sharing, members=4, epochs=1, subset=0.1, dropout=0.2, **extra)
    job = p.job(MEMBERS, "e")
    alone = trained(job, images, Trainer(job, images, device="cpu"))
    assert differences({n: alone[0][n] for n in job.start}, job.start)  # it has learned something
    for blocks, replay in ((HALVES, True), (QUARTERS, False)):
        state, losses = trained(job, images, Group(job, images, blocks, replay=replay))
        assert differences(alone[0], state) == []
        assert losses == alone[1]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "sharing", "extra"), SHARDED)
def test_same_bits_over_members_times_shards(scheme, sharing, extra):
    recipe = {"shards": 2, **extra.get("recipe", {})}
    short = {"members": 2, "epochs": 1, "subset": 0.1, "dropout": 0.2}
    p, images = plan(scheme, sharing, **short, **{**extra, "recipe": recipe})
    ids = (0,) if scheme == "voting" else (0, 1)
    job = p.job(ids, "e")
    alone = trained(job, images, Trainer(job, images, device="cpu"))
    unsharded = plan(scheme, sharing, **short, **extra)[0].job(ids, "e")
    other = trained(unsharded, images, Trainer(unsharded, images, device="cpu"))
    assert differences(alone[0], other[0]), "batch norm sees other images"
    blocks = [(i,) for i in ids]
    for depth in (1, 2):
        state, losses = trained(job, images, Group(job, images, blocks, depth))
        assert differences(alone[0], state) == []
        assert losses == alone[1]


@pytest.mark.parametrize(("scheme", "sharing", "extra"), JOINT, ids=map(str, range(len(JOINT))))
def test_gradients_in_float64_are_those_of_the_plain_loop(scheme, sharing, extra):
    p, images = plan(scheme, sharing, members=4, **extra)
    job = p.job(MEMBERS, "e")
    group = Group(job, images, UNEQUAL)

    def gradients(trainer):
        trainer.ensemble.to(torch.float64).train()
        feed = trainer.feed
        trainer.step(feed.normalized(feed.images[:48]).double(), feed.labels[:48], {})
        return trainer.step.gradients()

    split = {n: g for found in group.each(gradients) for n, g in found.items()}
    plain = Ensemble(job.spec)
    plain.load(job.start)
    plain.double().train()
    feed = group.trainers[0].feed
    F.cross_entropy(plain(feed.normalized(feed.images[:48]).double()), feed.labels[:48]).backward()
    theirs = {n: q.grad for n, q in plain.parameters_by_name() if q.requires_grad}
    assert split.keys() == theirs.keys()
    for name, reference in theirs.items():
        error = (split[name] - reference).abs().max()
        assert error <= 1e-9 * reference.abs().max(), name


def test_a_member_that_diverges_in_one_process_is_named_by_all():
    p, images = plan(sharing="no_shared", members=4, subset=0.1)
    job = p.job(MEMBERS, "e")
    group = Group(job, images, HALVES)
    with torch.no_grad():  # finite, but its sums are not
        group.trainers[1].ensemble.members[1].stem.conv.weight.fill_(3e38)
    expected = r"e: the loss of epoch 1 .*step 0, of member\(s\) 3\."
    with pytest.raises(TrainingError, match=expected):
        group.epoch([])


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
