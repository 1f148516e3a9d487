"""What is kept or returned is finite, or an error names it: each kind of entry, at each moment."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.sharing import SHARING
from bnncore.params import Recipe
from bnncore.training import plans, schemes
from bnncore.training.checkpoint import Checkpoint
from bnncore.training.ensembled import Ensembled, ModelError
from bnncore.training.jobs import Job, Trained, TrainingError
from bnncore.training.loop import Trainer, drive, train_many
from tests import tiny

DATA = tiny.dataset()
NAN, INF = math.nan, math.inf
GAMMA = "1.body.layer1.block1.norm1.weight"  # before a sign, which makes -1 of NaN
KINDS = {
    GAMMA: NAN,
    "1.body.layer1.block1.norm1.bias": NAN,
    "1.body.layer2.block1.conv1.weight": NAN,
    "0.body.layer1.block1.act1.weight": INF,
    "shared.stem.conv.weight": NAN,
    "shared.stem.norm.running_mean": NAN,
    "1.body.layer3.block1.norm2.running_var": INF,
    "shared.bias": INF,  # of the classifier block
    "shared.weights": NAN,  # votes
    f"adam.exp_avg:{GAMMA}": NAN,
    f"adam.exp_avg_sq:{GAMMA}": INF,  # the square of a large gradient: updates of 0 from there on
}
MOMENTS = ("start", "resume", "first step", "last step", "validation")


@cache
def job() -> Job:
    """A TentacleNet of two; its start has moments, as a cycle of a snapshot ensemble."""
    spec = EnsembleSpec(tiny.model(data=DATA), 2, SHARING["tentaclenet"], "sum", "features")
    recipe = Recipe(epochs=3, batch_size=16, lr=0.01)
    first = Job("job", spec, (0, 1), replace(recipe, epochs=1), 1, Ensemble(spec, seed=0).state())
    trainer = Trainer(first, DATA, device="cpu")
    trainer.epoch([])
    return replace(first, recipe=recipe, start=trainer.state())


def spoiled(state: dict, name: str, value: float) -> dict:
    state = {n: v.clone() for n, v in state.items()}
    state[name].view(-1)[0] = value
    return state


def poison(trainer: Trainer, moment: str, name: str, value: float) -> None:
    """Spoil an entry at a moment of epoch 2."""

    def now() -> None:
        with torch.no_grad():
            trainer._entries()[name].view(-1)[0] = value

    steps = len(trainer.feed.order(0))
    target = {"first step": steps + 1, "last step": 2 * steps}.get(moment, -1)
    taken = 0

    def after_step(*_) -> None:
        nonlocal taken
        taken += 1
        if taken == target:
            now()

    def in_pass(module, _) -> None:
        if not module.training and taken == 2 * steps:
            now()

    trainer.optimizer.register_step_post_hook(after_step)
    if moment == "validation":
        trainer.ensemble.members[1].head.register_forward_pre_hook(in_pass)


QUICK = (GAMMA, "shared.stem.conv.weight", "shared.weights")


def cases():
    """Some kinds at every moment, each other one at one, and in soak at the rest."""
    for turn, name in enumerate(KINDS):
        for k, moment in enumerate(MOMENTS):
            late = pytest.mark.slow if k == turn % len(MOMENTS) else pytest.mark.soak
            yield pytest.param(name, moment, marks=() if name in QUICK else late)


@pytest.mark.parametrize(("name", "moment"), list(cases()))
def test_nothing_that_is_not_finite_is_kept_or_returned(tmp_path, name, moment):
    spoilt, value, start = name, KINDS[name], job()
    checkpoint = Checkpoint(tmp_path, "e")
    if moment == "start":
        start = replace(start, start=spoiled(start.start, spoilt, value))
    if moment == "resume":
        save_file(spoiled(start.start, spoilt, value), checkpoint.path, {"history": "[]"})
        before = checkpoint.path.read_bytes()

    def train() -> None:
        trainer = Trainer(start, DATA, device="cpu")
        poison(trainer, moment, spoilt, value)
        drive(start, DATA, trainer, checkpoint)

    with pytest.raises(TrainingError) as caught:
        train()
    message = str(caught.value)
    owner, _, parameter = name.rpartition(":")[2].partition(".")
    said = f"{'shared' if owner == 'shared' else f'member {owner}'}: {parameter}"
    if moment == "resume":
        assert str(checkpoint.path) in message
        assert checkpoint.path.read_bytes() == before
    else:
        assert message.startswith("job: epoch 2: " if moment == "last step" else "job: ")
    if moment == "first step":  # what follows from it is not finite either
        assert "member" in message or "shared: " in message
    else:
        assert said in message
    if moment == "start":
        assert not checkpoint.path.exists()
    elif moment != "resume":
        state, history = checkpoint.load()  # looks at every entry itself
        assert [epoch["epoch"] for epoch in history] == [1]
        assert all(v.isfinite().all() for v in state.values())
    checkpoint.close()


def test_the_step_and_the_members_are_named_where_the_loss_is_lost():
    start = job()
    trainer = Trainer(start, DATA, device="cpu")
    poison(trainer, "first step", "1.head.dense.weight", NAN)
    trainer.epoch([])
    with pytest.raises(
        TrainingError, match=r"^job: the loss of epoch 2 is nan.* after step 1, of "
    ):
        trainer.epoch([{}])


def test_a_loss_that_is_not_finite_of_outputs_that_are():
    """Outputs of 3e38 each: their sum overflows, and with it the loss of the validation part."""
    spec = replace(job().spec, sharing=SHARING["no_shared"], classifier=None)
    state = Ensemble(spec, seed=0).state()
    for i in (0, 1):
        state[f"{i}.head.dense.weight"].zero_()
        state[f"{i}.head.dense.bias"].copy_(torch.tensor([3e38, -3e38, 0, 0]))
    overflowing = Job("job", spec, (0, 1), Recipe(epochs=1, batch_size=16, lr=1e-9), 1, state)
    with pytest.raises(TrainingError, match=r"^job: the loss of epoch 1 is (nan|inf)"):
        train_many([overflowing], DATA)


# -- what schemes make of it ---------------------------------------------------------------------


def planned(scheme: str, **section):
    p = tiny.parse(
        ensembles={"train": [{"name": "e", "scheme": scheme, "sharing": "no_shared", **section}]}
    )
    fp32 = plans.first_job(p, DATA, None).start
    bnn = plans.first_job(p, DATA, fp32).start
    return plans.plan(p, p.ensembles.train[0], DATA, fp32, bnn)


def test_outputs_on_which_the_next_member_would_be_trained():
    trainer = Trainer(planned("boosting", members=2).member(0, then="outputs"), DATA)
    with torch.no_grad():  # finite, but its sums are not
        trainer.ensemble.members[0].head.dense.weight.fill_(3e38)
    with pytest.raises(TrainingError, match=r"^e\.0: on the training images: .*member\(s\) 0"):
        trainer.after()


def test_norms_that_are_estimated_anew():
    """Activations of 1e25 are finite, their variance is not."""
    plan = planned("stochastic_rounding", members=2, recipe={"epochs": 0})
    plan.start["0.stem.conv.weight"].mul_(1e25)
    with pytest.raises(TrainingError, match=r"^e\.0: .*member \d: stem\.norm\.running_var"):
        schemes.train(plan, lambda jobs: train_many(jobs, DATA))


def test_votes(monkeypatch):
    plan = planned("voting", members=2)

    def scheme(plan, _):
        results = [Trained(plan.member(i), plan.start, [], np.zeros(0)) for i in (0, 1)]
        return schemes.gathered(plan, results, np.array([1, NAN]))

    monkeypatch.setitem(schemes.SCHEMES, "voting", replace(schemes.SCHEMES["voting"], run=scheme))
    with pytest.raises(TrainingError, match=r"^e: the trained ensemble: .*shared: weights"):
        schemes.train(plan, lambda jobs: [])


def test_models_on_disk(tmp_path):
    spec = job().spec
    good = Ensembled(spec, Ensemble(spec).state(), {"job": []})
    bad = Ensembled(spec, spoiled(good.state, GAMMA, NAN), {"job": []})
    folder = tmp_path / "model"
    good.save(folder)
    named = r"member 1: body\.layer1\.block1\.norm1\.weight"
    with pytest.raises(TrainingError, match=named):
        bad.save(folder)
    assert torch.equal(Ensembled.read(folder).state[GAMMA], good.state[GAMMA])
    save_file(bad.state, folder / "weights.safetensors")
    with pytest.raises(ModelError, match=rf"{folder}: .*{named}"):
        Ensembled.read(folder)
