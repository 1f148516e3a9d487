"""One graph a step: for all members, all jobs of a kind, and no other lengths of a batch."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config

from bnncore.training import layers
from bnncore.training.loop import Trainer
from tests.small import plan
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


def gradients(trainer) -> dict:
    feed = trainer.feed
    x = feed.normalized(feed.images[:48])
    y = feed.labels[:48]
    if trainer.job.each:
        m = len(trainer.job.ids)
        x, y = x.repeat_interleave(m, 0), y[:, None].expand(-1, m)
    trainer.step(x, y, {})
    return {name: value.clone() for name, value in trainer.step.gradients().items()}


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(3600)  # a compiler suffers beside other work
@pytest.mark.parametrize(
    ("scheme", "sharing", "stack"),
    [("fusion", "c1", 3), ("fusion", "c1", 1), ("tentaclenet", "tentaclenet", 3), ("voting", "no_shared", 3)],
)  # fmt: skip
def test_compiled_is_looped_in_float64_and_one_graph_serves_all(scheme, sharing, stack, graphs):
    small = {"members": 3, "subset": 0.08, "backbone": "leanplain", "width": 8}
    torch.set_default_dtype(torch.float64)
    try:
        p, images = plan(scheme, sharing, **small, recipe={**COMPILED, "stack": stack})
        (job, *_) = jobs_of(p, images)
        alone = replace(p, recipe=replace(p.recipe, stack=1, compile="never"))
        expected: dict = {}
        for one in jobs_of(alone, images):
            expected |= gradients(Trainer(one, images))
        for _ in range(2):  # a second job of the kind, in the same process
            trainer = Trainer(job, images)
            found = gradients(trainer)
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
