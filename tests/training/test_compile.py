"""One graph a step: for all members, all jobs of a kind, and no other lengths of a batch."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config

from bnncore.networks.binarize import BinaryActivation
from bnncore.training import layers
from bnncore.training.loop import Trainer
from tests.small import GRID, plan
from tests.training.test_stack import jobs_of

needs_compiler = pytest.mark.skipif(
    not layers.can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler"
)
COMPILED = {"compile": "always", "batch_size": 48}


@pytest.fixture
def graphs():
    """How many graphs torch has made, and how many times it made one anew."""
    torch._dynamo.reset()
    layers._made_for.clear()
    torch._dynamo.utils.counters.clear()
    counters = torch._dynamo.utils.counters
    with torch._inductor.config.patch(compile_threads=1):
        yield lambda: (counters["stats"]["unique_graphs"], len(counters["graph_break"]))


def gradients(trainer, at: int) -> dict:
    """Those of a step on the 48 images from `at` on."""
    feed = trainer.feed
    x = feed.normalized(feed.images[at : at + 48])
    y = feed.labels[at : at + 48]
    if trainer.job.each:
        m = len(trainer.job.ids)
        x, y = x.repeat_interleave(m, 0), y[:, None].expand(-1, m)
    trainer.step(x, y, {})
    return {name: value.clone() for name, value in trainer.step.gradients().items()}


def looped(trainers: list[Trainer]) -> tuple[int, dict]:
    """Images, and gradients on them, for which no sign is left to rounding.

    A norm of sums of +-1 has outputs of 0 now and then: sums that are their mean. In whatever order
    that is computed, a sign behind it is one of chance, and so are all gradients in front of it.
    """
    nearest: list[float] = []

    def look(module, inputs):
        x = inputs[0].detach().abs()  # signs jump at 0, their gradients at +-1
        nearest.append(min(float(x.min()), float((x - 1).abs().min())))

    for trainer in trainers:
        for module in trainer.ensemble.modules():
            if isinstance(module, BinaryActivation):
                module.register_forward_pre_hook(look)
    for at in range(len(trainers[0].feed.images) - 48):
        nearest.clear()
        found = {k: v for trainer in trainers for k, v in gradients(trainer, at).items()}
        if min(nearest) > 1e-9:
            return at, found
    raise AssertionError("expected images without a tie")


def cases():
    """Some by the compiler; in soak every scheme whose members are trained at once and every
    sharing, stacked, by the graph that a compiler gets, in its simple operations."""
    for scheme, sharing, stack in [
        ("fusion", "c1", 3),
        ("fusion", "c1", 1),
        ("tentaclenet", "tentaclenet", 3),
        ("voting", "no_shared", 3),
    ]:
        name = f"{scheme}-{sharing}-{'compiled-stacked' if stack > 1 else 'compiled-looped'}"
        plain = {"backbone": "leanplain"}
        yield pytest.param("inductor", scheme, sharing, plain, stack, id=name)
    apart = [("voting", "no_shared", {}), ("bagging", "no_shared", {})]
    for scheme, sharing, extra in [*GRID, *apart]:
        of = sharing if isinstance(sharing, str) else "own-list"
        name = "-".join([scheme, of, *extra.values(), "graph-stacked"])
        yield pytest.param("aot_eager_decomp_partition", scheme, sharing, extra, 3, id=name,
                           marks=pytest.mark.soak)  # fmt: skip


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(3600)  # a compiler suffers beside other work
@pytest.mark.parametrize(("backend", "scheme", "sharing", "extra", "stack"), list(cases()))
def test_compiled_is_looped_in_float64_and_one_graph_serves_all(
    backend, scheme, sharing, extra, stack, graphs, monkeypatch
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.set_default_dtype(torch.float64)
    try:
        recipe = {**COMPILED, "stack": stack}
        p, images = plan(scheme, sharing, members=3, subset=0.08, recipe=recipe, **extra)
        (job, *_) = jobs_of(p, images)
        alone = replace(p, recipe=replace(p.recipe, stack=1, compile="never"))
        at, expected = looped([Trainer(one, images) for one in jobs_of(alone, images)])
        for _ in range(2):  # a second job of the kind, in the same process
            trainer = Trainer(job, images)
            assert len(trainer.step.units[0].ids) == min(stack, len(job.ids))
            found = gradients(trainer, at)
            mine = {"shared", *map(str, job.ids)}
            assert found.keys() == {n for n in expected if n.partition(".")[0] in mine}
            for name, value in found.items():
                apart = (value - expected[name]).abs().max()
                assert apart <= 1e-9 * expected[name].abs().max() + 1e-14, name
            assert len(trainer.feed.order(0)[-1]) < 48 or job.each
            trainer.epoch([])
    finally:
        torch.set_default_dtype(torch.float32)
    assert graphs() == (1, 0)


@pytest.mark.parametrize(
    ("scheme", "extra", "compilers", "reason"),
    [
        ("fusion", {}, [], "no compiler was found"),
        ("bagging", {"sampling": "batch"}, ["g++"], "every batch has a length of its own"),
    ],
)
def test_what_is_not_compiled_is_said_and_goes_on(
    scheme, extra, compilers, reason, graphs, monkeypatch, caplog
):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in compilers else None)
    p, images = plan(scheme, "no_shared", members=2, subset=0.1, recipe=COMPILED, **extra)
    with caplog.at_level(logging.WARNING, "bnncore"):
        trainer = Trainer(jobs_of(p, images)[0], images)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        f"nothing is compiled: {reason}"
    ]
    trainer.epoch([])
    assert graphs() == (0, 0)
