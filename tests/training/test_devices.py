"""Where training computes, and what becomes of a device whose memory is short."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from bnncore.params import RayParams
from bnncore.training import devices, memory
from bnncore.training.devices import Place
from bnncore.training.loop import Trainer
from tests.small import differences, plan


@pytest.mark.parametrize(
    ("gpus", "there", "expected"),
    [(None, True, "cuda"), (1.0, True, "cuda"), (0.0, True, "cpu"), (None, False, "cpu")],
)
def test_a_process_by_itself_takes_the_gpu_unless_none_is_to_be_used(
    gpus, there, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    params = RayParams(cpus_per_actor=3, gpus_per_actor=gpus)
    assert devices.of_process(params) == Place(3, expected)


@pytest.fixture
def switches():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    yield lambda: (cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)


def test_a_gpus_switches_are_set_explicitly_and_a_cpus_left(switches):
    for deterministic in (True, False):
        devices.prepare(torch.device("cuda"), deterministic)
        assert switches() == (False, False, not deterministic, deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    found = switches()
    devices.prepare(torch.device("cpu"), True)
    assert switches() == found
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_the_allocator_holds_unused_is_free(monkeypatch):
    for name, value in (
        ("mem_get_info", (3, 100)), ("memory_reserved", 50), ("memory_allocated", 20)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert memory.available(torch.device("cuda")) == 33


def raising(trainer: Trainer, at: int) -> list[int]:
    """Let the device run out of memory in the `at`-th call of a member's last layer, once."""
    calls: list[int] = []

    def hook(*_):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    for unit in trainer.step.units:
        unit.network.head.register_forward_hook(hook)
    return calls


WARM = {"epochs": 2, "warmup": 1}  # begins with a rate of 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "recipe"),
    [
        ("fusion", {"stack": 1}),
        ("fusion", {"stack": 2}),
        ("fusion", {"stack": 2, **WARM}),
        ("fusion", {"stack": 1, "two_step": True}),
        ("voting", {"stack": 4, **WARM}),
    ],
)
def test_a_first_step_that_does_not_fit_is_taken_again_with_replay(
    scheme, recipe, monkeypatch, caplog
):
    recipe = dict(recipe)
    two = recipe.pop("two_step", False)  # which parameters allow a single BNN alone
    p, images = plan(scheme, "c1", members=4, subset=0.1, dropout=0.3, recipe=recipe)
    job = p.job((0, 1, 2, 3), "e")
    job = replace(job, recipe=replace(job.recipe, two_step=two))
    if scheme == "voting":
        job = replace(job, each=tuple(p.member(i) for i in range(4)))
    monkeypatch.setattr(Trainer, "_must_replay", lambda *_: False)
    alone = replace(job, recipe=replace(job.recipe, stack=1))
    expected = Trainer(alone, images, replay=True)
    found = Trainer(job, images, replay=None)
    raising(found, 1 if len(found.step.units) == 1 else 2)
    with caplog.at_level(logging.WARNING, "bnncore"):
        for trainer in (expected, found):
            trainer.epoch([])
    assert found.step.replay
    assert caplog.messages == [
        "e: CUDA out of memory. Tried to allocate 2 GiB: members are replayed one by one"
    ]
    assert differences(found.state(), expected.state()) == []


@pytest.mark.parametrize(("replay", "at"), [(False, 2), (True, 2), (None, 6)])
def test_it_is_an_error_where_replay_was_not_left_open_or_later(replay, at, monkeypatch):
    p, images = plan("fusion", "c1", members=4, subset=0.1)
    monkeypatch.setattr(Trainer, "_must_replay", lambda *_: False)
    trainer = Trainer(p.job((0, 1, 2, 3), "e"), images, replay=replay)
    raising(trainer, at)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.epoch([])


def test_it_is_an_error_where_others_have_summed_already(monkeypatch):
    p, images = plan("fusion", "c1", members=4, subset=0.1)
    monkeypatch.setattr(Trainer, "_must_replay", lambda *_: False)
    trainer = Trainer(p.job((0, 1, 2, 3), "e"), images, replay=None)
    sent = iter(range(100))
    monkeypatch.setattr(trainer.step, "exchanged", lambda: (next(sent), 0.0))
    raising(trainer, 2)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.epoch([])
