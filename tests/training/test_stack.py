"""Members in stacks compute what they compute one by one: in float64 the same gradients, the same
step of Adam, the same statistics; over actors the same bits."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import pytest
import torch

from bnncore.cluster.group import actors_of_use, blocks
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.parts import Backbone
from bnncore.training import layers, loop, schemes, stack
from bnncore.training.loop import Trainer
from tests.small import GRID, differences, plan
from tests.training.test_step import HALVES, MEMBERS, Group, trained

HALF = {"weight": "tests.networks.test_binarize:half"}
REACT = {"shift": True, "act": "rprelu", "weight": "learned", "stem": "binary"}
OWN = "examples.own_cnn:small_cnn"
# (scheme, sharing, what else): every row of the grid, every kind of layer, every way of a step.
ROWS = [
    *GRID[:-1],
    ("fusion", "shared_conv", {"recipe": {"prefixes": True}, "dropout": 0.3}),
    ("fusion", "no_shared", {"recipe": {"distill": 0.5}, "teacher": "ensemble"}),
    ("fusion", "c1", {"recipe": {"shards": 2}}),
    ("tentaclenet", "tentaclenet", {"recipe": {"shards": 2}}),
    ("fusion", "no_shared", {"binarizer": REACT}),
    ("fusion", "no_shared", {"binarizer": HALF}),
    ("fusion", "c3", {"backbone": "nin"}),
    ("fusion", "no_shared", {"backbone": "leanresnet8"}),
    ("tentaclenet", "tentaclenet", {"backbone": "leanplain"}),
    ("fusion", "no_shared", {"backbone": OWN, "width": None, "dropout": 0.2}),
    ("voting", "shared_conv", {"dropout": 0.3}),
    ("voting", "no_shared", {"recipe": {"augment": "crop", "distill": 0.5}}),
    ("bagging", "no_shared", {}),
    ("bagging", "all_frozen", {"sampling": "bootstrap", "backbone": "nin"}),
]


def jobs_of(p, images) -> list:
    """The jobs of a scheme whose members are trained at once."""
    found: list = []

    def train_many(jobs):
        found.extend(jobs)
        raise StopIteration

    with pytest.raises(StopIteration):
        schemes.train(p, train_many)
    return found


def stepped(p, images, size, replay=False) -> tuple[dict, dict]:
    """Gradients of a step, and weights, moments and statistics after it, of all members."""
    p = replace(p, recipe=replace(p.recipe, stack=size))
    gradients, state = {}, {}
    for job in jobs_of(p, images):
        trainer = Trainer(job, images, replay=replay)
        assert len(trainer.step.units[0].ids) == min(size, len(job.ids))
        (batch,) = itertools.islice(trainer.feed.epoch(0, trainer.feed.order(0)), 1)
        extra = {name: rows.double() for name, rows in batch.extra.items()}
        trainer.step(batch.x.double(), batch.y, extra)
        gradients |= {name: value.clone() for name, value in trainer.step.gradients().items()}
        trainer.optimizer.step()
        trainer.step.end()
        state |= trainer.state()
    return gradients, state


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(len(ROWS)))
def test_stacked_is_looped_in_float64(turn, float64):
    scheme, sharing, extra = ROWS[turn]
    p, images = plan(scheme, sharing, members=3, subset=0.1, **extra)
    looped = stepped(p, images, 1)
    ways = ((3, False), (2, True))  # all at once; a stack of two, and one alone, replayed
    for size, replay in ways[: 1 + (turn % 3 == 0)]:  # the second has few cases of its own
        for found, expected in zip(stepped(p, images, size, replay), looped, strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                apart = (found[name].double() - value.double()).abs().max()
                # What only shifts the input of a norm has a gradient of 0, but for rounding, which
                # Adam divides by an epsilon.
                noise = 1e-14 if expected is looped[0] else 1e-10
                assert apart <= 1e-9 * value.double().abs().max() + noise, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "sharing", "extra"),
    [
        ("tentaclenet", "tentaclenet", {"dropout": 0.2}),
        ("fusion", "c1", {"recipe": {"shards": 2, "stack": 2}}),
        ("fusion", "all_frozen", {}),
    ],
)
def test_same_bits_however_stacks_are_spread(scheme, sharing, extra):
    recipe = {"stack": 2, **extra.get("recipe", {})}
    p, images = plan(
        scheme, sharing, members=4, epochs=1, subset=0.1, **{**extra, "recipe": recipe}
    )
    job = p.job(MEMBERS, "e")
    alone = trained(job, images, Trainer(job, images))
    resumed = Trainer(job, images)
    resumed.load(alone[0])
    assert differences(resumed.state(), alone[0]) == []
    depth = job.recipe.shards
    for replay in (False, True):
        state, losses = trained(job, images, Group(job, images, HALVES, depth, replay=replay))
        assert differences(alone[0], state) == []
        assert losses == alone[1]


@pytest.mark.slow
def test_members_that_are_trained_apart_are_replayed_one_by_one_where_memory_is_short(float64):
    p, images = plan("voting", "shared_conv", members=3, subset=0.1, recipe={"stack": 3})
    (job,) = jobs_of(p, images)
    found = []
    for options in ({}, {"replay": None, "memory_share": 1e-9}):
        trainer = Trainer(job, images, **options)
        (batch,) = itertools.islice(trainer.feed.epoch(0, trainer.feed.order(0)), 1)
        trainer.step(batch.x.double(), batch.y, {})
        found.append(trainer.step.gradients())
    assert [len(unit.ids) for unit in trainer.step.units] == [1, 1, 1]
    for name, value in found[0].items():
        assert (found[1][name] - value).abs().max() <= 1e-9 * value.abs().max() + 1e-14, name
    # What is kept grows with the images of all members.
    for many in (64, 128):
        kept = trainer.saved_bytes(many)
        assert kept == pytest.approx(many / 64 * trainer.saved_bytes(64), rel=0.1)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 3 * 64), ({"replay": None, "memory_share": 1e-9}, 64)]
)
def test_a_step_is_compiled_for_the_images_that_a_unit_sees(options, expected, monkeypatch):
    p, images = plan("voting", "no_shared", members=3, subset=0.1, recipe={"stack": 3})
    (job,) = jobs_of(p, images)
    made_for, seen = [], []

    def compiled(network, count, what):
        def run(unit, h):
            seen.append(len(h))
            return Backbone.forward(unit, h)

        made_for.append(count)
        return run

    monkeypatch.setattr(layers, "worth_compiling", lambda *_: True)
    monkeypatch.setattr(layers, "compiled", compiled)
    trainer = Trainer(job, images, **options)
    seen.clear()  # what measured the memory
    (batch,) = itertools.islice(trainer.feed.epoch(0, trainer.feed.order(0)), 1)
    trainer.step(batch.x, batch.y, batch.extra)
    assert set(seen) == {made_for[-1]} == {expected}


def test_a_compiled_step_is_compiled_in_both_passes_of_a_replay():
    p, images = plan("fusion", "no_shared", members=2, subset=0.1)
    trainer = Trainer(p.job((0, 1), "e"), images, replay=True)
    called = []

    def compiled(network, x):
        called.append(torch.is_grad_enabled())
        return Backbone.forward(network, x)

    trainer.step.run = compiled
    (batch,) = itertools.islice(trainer.feed.epoch(0, trainer.feed.order(0)), 1)
    trainer.step(batch.x, batch.y, batch.extra)
    assert called == [False, False, True, True]


def test_members_that_are_trained_apart_see_and_make_what_they_do_alone():
    """A whole training: own order, own augmentation, own masks; one history for the stack."""
    recipe = {"augment": "crop_flip", "stack": 3, "lr": 1e-4}
    p, images = plan("voting", "no_shared", members=4, dropout=0.2, recipe=recipe, subset=0.1)
    together, last = jobs_of(p, images)
    assert (together.ids, last.ids, together.name, last.name) == ((0, 1, 2), (3,), "e.0", "e.3")
    (found,) = loop.train_many([together], images)
    alone = loop.train_many(list(together.each), images)
    assert len(found.history) == 2
    for i, one in enumerate(alone):
        # Rounding flips signs, and Adam makes of it what it likes: a few steps of a small rate.
        for name, value in one.state.items():
            if not name.startswith("shared.") and "norm" not in name and "num" not in name:
                assert torch.allclose(found.state[name], value, atol=2e-2), name
        assert abs(found.outputs[i] - one.outputs[0]).mean() < 0.2
    losses = [
        sum(one.history[0]["train_loss"] for one in alone) / 3,
        found.history[0]["train_loss"],
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize(
    ("scheme", "extra", "reason"),
    [
        ("bagging", {"sampling": "batch"}, "batches of several sizes"),
        ("bagging", {"sampling": "partition"}, "parts of several sizes"),
        ("voting", {"recipe": {"schedule": "plateau"}}, "a learning rate for each"),
        ("voting", {"recipe": {"shards": 2}}, "shards"),
        ("boosting", {}, "each member learns from those before it"),
        ("snapshot", {}, "one network is trained"),
    ],
)
def test_what_cannot_be_stacked_is_looped_and_says_why(scheme, extra, reason, caplog):
    recipe = {"stack": 8, **extra.get("recipe", {})}
    p, images = plan(scheme, "no_shared", members=3, subset=0.1, **{**extra, "recipe": recipe})
    with caplog.at_level(logging.INFO, "bnncore"):
        jobs = jobs_of(p, images)
    assert all(len(job.ids) == 1 and not job.each for job in jobs)
    assert reason in caplog.text


def test_signs_that_are_drawn_at_each_step_are_looped():
    p, images = plan(members=2, binarizer={"stochastic": True}, recipe={"stack": 2})
    trainer = Trainer(p.job((0, 1), "e"), images)
    assert [unit.ids for unit in trainer.step.units] == [(0,), (1,)]
    assert any(m.stochastic for m in trainer.ensemble.modules() if isinstance(m, BinaryConv2d))


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [("auto", "cpu", 1), ("auto", "cuda", 16), (1, "cuda", 1), (6, "cpu", 6)],
)
def test_how_many_make_a_stack(wanted, device, expected):
    p, _ = plan(members=2, subset=0.05, recipe={"stack": wanted})
    assert stack.size(p.recipe, p.spec.model, device) == expected


@pytest.mark.parametrize(
    ("recipe", "device", "actors", "expected"),
    [
        ({}, "cuda", 1, [10]),
        ({}, "cuda", 2, [5, 5]),
        ({}, "cuda", 4, [3, 3, 3, 1]),
        ({}, "cuda", 20, [1] * 10),
        ({"deterministic": True}, "cuda", 4, [10]),
        ({"stack": 6}, "cuda", 4, [6, 4]),
        ({}, "cpu", 4, [3, 3, 3, 1]),
        ({}, "cpu", 1, [10]),
        ({"deterministic": True}, "cpu", 4, [1] * 10),
        ({"large": True}, "cpu", 4, [1] * 10),
        ({"large": True}, "cuda", 4, [3, 3, 3, 1]),
    ],
)
@pytest.mark.parametrize("scheme", ["fusion", "voting"])
def test_each_actor_has_a_stack(scheme, recipe, device, actors, expected):
    recipe = dict(recipe)
    large = recipe.pop("large", False)
    p, images = plan(scheme, "no_shared", members=10, subset=0.05, recipe=recipe)
    if large:
        model = replace(p.spec.model, image=(17, 16, 1))
        p = replace(p, spec=replace(p.spec, model=model))
    jobs = jobs_of(replace(p, device=device).over(actors), images)
    if scheme == "fusion":
        (job,) = jobs
        size = stack.size(job.recipe, job.spec.model, device)
        found = [len(unit) for unit in blocks(job.ids, len(job.ids), size)]
        assert actors_of_use(job, actors, device) == min(actors, len(expected))
    else:
        found = [len(job.ids) for job in jobs]
    assert found == expected
