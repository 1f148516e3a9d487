"""The training loop's numbers: steps against plain autograd and a public library, schedules,
augmentation, resuming bit for bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bnncore import params as P
from bnncore.networks.backbones import BACKBONES
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import Backbone
from bnncore.networks.sharing import SHARING
from bnncore.params import Recipe
from bnncore.training import memory
from bnncore.training.checkpoint import Checkpoint
from bnncore.training.feed import augmented
from bnncore.training.jobs import Job
from bnncore.training.loop import Trainer, drive, train_many
from bnncore.training.schedule import learning_rate
from tests import tiny

DATA = tiny.dataset()
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.01, schedule="constant")


def job(members=2, sharing="shared_conv", combine="mean", jitter=0.1, model=None, **changes) -> Job:
    model = model or tiny.model(data=DATA)
    classifier = "features" if sharing == "tentaclenet" else None
    spec = EnsembleSpec(model, members, SHARING[sharing], combine, classifier)
    ensemble = Ensemble(spec, seed=0)
    if jitter is not None:
        source = Ensemble(EnsembleSpec(model, 1, SHARING["no_shared"]), seed=0)
        ensemble.start_from({n[2:]: v for n, v in source.state().items()})
        ensemble.diversify(0, jitter, fresh_classifier=bool(jitter))
    values = {"recipe": RECIPE, "seed": 1, "start": ensemble.state(), **changes}
    return Job(name="job", spec=spec, ids=tuple(range(members)), **values)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# -- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharing", "combine"),
    [("shared_conv", "mean"), ("no_shared", "mean"), ("tentaclenet", "sum")],
)
@pytest.mark.parametrize("prefixes", [False, True])
def test_a_joint_step_is_plain_autograd_of_the_combined_loss(sharing, combine, prefixes):
    recipe = replace(RECIPE, prefixes=prefixes)
    trainer = Trainer(job(3, sharing, combine, recipe=recipe), DATA, device="cpu")
    twin = copy.deepcopy(trainer.ensemble)
    x = tiny.normalized(DATA, DATA.train.images[:16])
    y = torch.from_numpy(DATA.train.labels[:16])
    trainer.ensemble.train()
    loss, logits = trainer.step(x, y, {})

    z = twin.train().outputs(x)
    sums = [sum(z[: m + 1]) / (m + 1 if combine == "mean" else 1) for m in range(3)]
    sums = [s if twin.bias is None else s + twin.bias for s in sums]
    losses = [F.cross_entropy(s, y) for s in (sums if prefixes else sums[-1:])]
    expected = sum(losses) / len(losses)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(logits, sums[-1], atol=1e-5)
    theirs = dict(twin.parameters_by_name())
    for name, p in trainer.ensemble.parameters_by_name():
        if p.requires_grad:
            assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-3, atol=1e-5), name
        else:
            assert p.grad is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "stochastic"), [*((b, False) for b in BACKBONES), ("nin", True), ("resnet8", True)]
)
def test_replay_gives_the_same_bits_and_draws_no_second_number(backbone, stochastic):
    """The first stage is computed three times then, with its masks and random signs."""
    binarizer = P.Binarizer(stochastic=stochastic)
    model = tiny.model(backbone, data=DATA, dropout=0.5, binarizer=binarizer)
    start = job(2, "no_shared", model=model)
    states, counts = [], []
    for replay in (False, True):
        trainer = Trainer(start, DATA, device="cpu", replay=replay)
        calls: list[int] = []
        stage = next(trainer.step.units[0].network.body.children())
        block = stage[0] if isinstance(stage, torch.nn.Sequential) else stage
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.epoch([])
        states.append(trainer.state())
        counts.append(len(calls))
    assert counts[1] == counts[0] + 2 * 3, "three steps"
    assert same(*states)


def test_replay_keeps_less_of_the_largest_maps():
    trainer = Trainer(
        job(1, "no_shared", model=tiny.model("resnet18", data=DATA)), DATA, device="cpu"
    )
    (unit,) = trainer.step.units
    x = trainer.feed.normalized(trainer.feed.images[:16])
    for module in trainer.ensemble.prefix():
        x = module(x)
    x = x.detach().requires_grad_()
    plain, less = (
        memory.saved_bytes(unit, partial(unit, run=run), x, 256)
        for run in (Backbone.forward, memory.frugal)
    )
    assert less < 0.75 * plain


def test_loss_of_weights_targets_and_offsets_by_hand():
    rng = np.random.default_rng(0)
    n, c = len(DATA.train), len(DATA.classes)
    arrays = {
        "weights": rng.random(n).astype(np.float32),
        "offsets": rng.normal(size=(n, c)).astype(np.float32),
        "targets": rng.normal(size=(n, c)).astype(np.float32),
    }
    z = torch.from_numpy(rng.normal(size=(5, c)).astype(np.float32))
    y = torch.from_numpy(DATA.train.labels[:5])
    extra = {k: torch.from_numpy(v[:5]) for k, v in arrays.items()}
    trainer = Trainer(job(), DATA, device="cpu")

    shifted = (z + extra["offsets"]).double()
    logsoft = shifted - shifted.exp().sum(1, keepdim=True).log()
    by_hand = [-logsoft[i, y[i]] for i in range(5)]
    loss = trainer.step._loss(z, y, {k: extra[k] for k in ("offsets", "weights")})
    expected = sum(w * v for w, v in zip(extra["weights"], by_hand, strict=True)) / 5
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)

    squares = ((z - extra["targets"]) ** 2).sum(1).mean()
    assert trainer.step._loss(z, y, {"targets": extra["targets"]}).item() == pytest.approx(
        squares.item(), rel=1e-6
    )


def test_losses_of_teachers_by_hand():
    rng = np.random.default_rng(0)
    n, c = len(DATA.train), len(DATA.classes)
    z, teacher = (torch.from_numpy(rng.normal(size=(n, c)).astype(np.float32)) for _ in range(2))
    y = torch.from_numpy(DATA.train.labels)
    recipe = replace(RECIPE, distill=0.3, temperature=4.0, label_smoothing=0.1)
    trainer = Trainer(job(recipe=recipe, teacher=teacher.numpy()), DATA, device="cpu")
    (batch,) = trainer.feed.epoch(0, [torch.arange(n)])
    assert torch.equal(batch.extra["teacher"], teacher)

    def logs(values):
        return values.double() - values.double().exp().sum(1, keepdim=True).log()

    target = 0.9 * torch.eye(c)[y] + 0.1 / c
    p, q = logs(teacher / 4), logs(z / 4)
    expected = 0.7 * -(target * logs(z)).sum(1) + 0.3 * 16 * (p.exp() * (p - q)).sum(1)
    found = trainer.step._loss(z, y, batch.extra)
    assert found.item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("prefixes", [False, True])
def test_members_learn_from_the_ensemble_that_they_form(prefixes):
    recipe = replace(RECIPE, distill=0.3, temperature=4.0, prefixes=prefixes)
    plain = Trainer(job(3, recipe=replace(recipe, distill=0.0)), DATA, device="cpu")
    taught = Trainer(job(3, recipe=recipe), DATA, device="cpu")
    x = tiny.normalized(DATA, DATA.train.images[:16])
    y = torch.from_numpy(DATA.train.labels[:16])
    twin = copy.deepcopy(taught.ensemble).train()
    z = twin.outputs(x)
    whole = (sum(z) / 3).detach()
    parts = [
        F.kl_div((m / 4).log_softmax(1), (whole / 4).softmax(1), reduction="batchmean") * 16
        for m in z
    ]
    extra = 0.3 * sum(parts) / 3
    extra.backward()
    theirs = dict(twin.parameters_by_name())
    found = []
    for trainer in (plain, taught):
        trainer.ensemble.train()
        loss, _ = trainer.step(x, y, {})
        found.append((loss.item(), trainer.step.gradients()))
    (before, base), (after, grads) = found
    assert after - before == pytest.approx(extra.item(), rel=1e-3)
    for name, grad in grads.items():
        expected = base[name] + theirs[name].grad
        assert torch.allclose(grad, expected, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_optimizers_and_their_settings_are_torchs(kind):
    recipe = replace(
        RECIPE, optimizer=kind, betas=(0.8, 0.95), weight_decay=0.01, lr=0.02, epochs=1
    )
    trainer = Trainer(job(1, "no_shared", recipe=recipe), DATA, device="cpu")
    twin = copy.deepcopy(trainer.ensemble).train()
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    optimizer = make(twin.parameters(), 0.02, (0.8, 0.95), weight_decay=0.01)
    batches = trainer.feed.order(0)
    trainer.epoch([])
    for at in batches:
        optimizer.zero_grad()
        x = tiny.normalized(DATA, DATA.train.images[at])
        F.cross_entropy(twin(x), torch.from_numpy(DATA.train.labels[at])).backward()
        optimizer.step()
    theirs = twin.state()
    for name, value in trainer.ensemble.state().items():
        assert torch.allclose(value, theirs[name], atol=1e-3), name


# -- the public library --------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fusion", "voting"])
def test_losses_agree_with_torchensemble(scheme, monkeypatch, tmp_path):
    """Same data, order and initial weights: the losses of the first steps are the library's."""
    torchensemble = pytest.importorskip("torchensemble")
    monkeypatch.chdir(tmp_path)  # it writes logs
    base = {"fusion": torchensemble.FusionClassifier, "voting": torchensemble.VotingClassifier}
    members = 3
    start = job(members, "shared_conv")
    ours: list[float] = []
    trainers = [Trainer(start, DATA, device="cpu")]
    if scheme == "voting":
        trainers = [Trainer(replace(start, ids=(i,)), DATA, device="cpu") for i in range(members)]
    networks = [m for t in trainers for m in t.ensemble.members]
    for module in (m for net in networks for m in net.modules()):
        if hasattr(module, "generator"):
            module.generator = None  # not drawn from without dropout, and not copyable
    estimators = [copy.deepcopy(net) for net in networks]
    batches = trainers[0].feed.order(0)
    for trainer in trainers:
        trainer.ensemble.train()
        for at in batches:
            x = tiny.normalized(DATA, DATA.train.images[at])
            loss, _ = trainer.step(x, torch.from_numpy(DATA.train.labels[at]), {})
            trainer.optimizer.step()
            ours.append(loss.item())

    theirs: list[float] = []

    class Recording(torch.nn.CrossEntropyLoss):
        def forward(self, z, y):
            loss = super().forward(z, y)
            theirs.append(loss.item())
            return loss

    class Library(base[scheme]):
        def _make_estimator(self):
            return estimators.pop(0)

    order = torch.cat(batches)
    images = tiny.normalized(DATA, DATA.train.images[order])
    labels = torch.from_numpy(DATA.train.labels)[order]
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), batch_size=RECIPE.batch_size
    )
    library = Library(estimator=torch.nn.Identity(), n_estimators=members, cuda=False)
    library.set_optimizer("Adam", lr=RECIPE.lr, betas=RECIPE.betas, weight_decay=0)
    library.set_criterion(Recording())
    library.fit(loader, epochs=1, save_model=False)
    assert len(ours) == len(batches) * (1 if scheme == "fusion" else members)
    assert ours == pytest.approx(theirs, rel=1e-3)


# -- schedules and augmentation ------------------------------------------------------------------


def test_poly_is_the_papers_formula_once_an_epoch():
    recipe = Recipe(epochs=4, lr=0.1, schedule="poly")
    rates = [learning_rate(recipe, [], step / 12) for step in range(12)]  # 3 steps an epoch
    assert rates == pytest.approx([0.1] * 3 + [0.075] * 3 + [0.05] * 3 + [0.025] * 3)
    for epochs in (7, 30, 200, 400):  # no rounding of step / steps may end an epoch early
        recipe = Recipe(epochs=epochs, lr=1.0)
        for epoch in range(epochs):
            for step in (0, 1, 2, 194, 195):
                done = (epoch + step / 196) / epochs
                assert learning_rate(recipe, [], done) == pytest.approx(1 - epoch / epochs)


def test_linear_and_cosine_by_the_step():
    linear = Recipe(epochs=2, lr=0.1, schedule="linear")
    assert [learning_rate(linear, [], d) for d in (0, 0.25, 1)] == pytest.approx([0.1, 0.075, 0])
    cosine = replace(linear, schedule="cosine")
    expected = [0.1, 0.05 * (1 + math.cos(math.pi / 4)), 0.05, 0]
    assert [learning_rate(cosine, [], d) for d in (0, 0.25, 0.5, 1)] == pytest.approx(expected)


def test_warm_up_rises_to_the_schedule_and_two_steps_have_one_each():
    warm = Recipe(epochs=4, lr=1.0, schedule="linear", warmup=2)
    rates = [learning_rate(warm, [], epoch / 4) for epoch in (0, 0.5, 1, 2, 3)]
    assert rates == pytest.approx([0, 0.25 * 0.875, 0.5 * 0.75, 0.5, 0.25])
    halves = Recipe(epochs=5, lr=1.0, two_step=True)
    rates = [learning_rate(halves, [], epoch / 5) for epoch in (0, 0.9, 1, 2, 2.9, 3, 4)]
    assert rates == pytest.approx([1, 1, 1 / 2, 1, 1, 2 / 3, 1 / 3])


def test_the_first_of_two_steps_has_real_weights_and_the_second_binary_ones():
    recipe = replace(RECIPE, epochs=2, two_step=True)
    trainer = Trainer(job(1, "no_shared", recipe=recipe), DATA, device="cpu")
    layers = [m for m in trainer.ensemble.modules() if isinstance(m, BinaryConv2d)]
    sums, _ = trainer.epoch([])
    assert all(layer.binary()[0] is layer.weight for layer in layers)
    trainer.epoch([{"val_loss": 1.0}])
    assert sums["steps"] == 3
    for layer in layers:
        signs, scale = layer.binary()
        assert torch.equal(signs.abs(), torch.ones_like(signs))
        assert torch.allclose(scale, layer.weight.abs().mean((1, 2, 3)))


def test_plateau_waits_for_patience_epochs_without_a_lower_loss():
    recipe = Recipe(epochs=20, lr=1.0, schedule="plateau", patience=2)
    losses = [3.0, 2.0, 2.0, 2.5, 1.0, 1.5, 1.0, 0.9, 0.9, 0.9]
    history = [{"val_loss": v} for v in losses]
    rates = [learning_rate(recipe, history[:n], 0.0) for n in range(len(losses) + 1)]
    # after [3 2 2 2.5] two epochs without a lower loss, again after [1 1.5 1] and [.9 .9 .9]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])


@pytest.mark.parametrize("how", ["crop", "crop_flip"])
def test_augmentation_is_a_shifted_and_maybe_flipped_copy(how):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (200, 2, 5, 6), dtype=torch.uint8, generator=rng)
    recipe = Recipe(augment=how, pad=2)
    out = augmented(images, recipe, torch.Generator().manual_seed(1))
    assert torch.equal(out, augmented(images, recipe, torch.Generator().manual_seed(1)))
    padded = F.pad(images, (2, 2, 2, 2))
    seen = set()
    for image, result in zip(padded, out, strict=True):
        crops = {
            (top, left, flip): image[:, top : top + 5, left : left + 6].flip(2 if flip else [])
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
        }
        (found,) = (key for key, crop in crops.items() if torch.equal(crop, result))
        seen.add(found)
    flips = {flip for _, _, flip in seen}
    assert flips == ({False, True} if how == "crop_flip" else {False})
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))


def test_normalisation_is_the_data_sets():
    trainer = Trainer(job(), DATA, device="cpu")
    assert torch.allclose(
        trainer.feed.normalized(trainer.feed.images),
        tiny.normalized(DATA, DATA.train.images),
        atol=1e-6,
    )


# -- the order of the data -----------------------------------------------------------------------


def test_every_epoch_is_another_permutation():
    trainer = Trainer(job(), DATA, device="cpu")
    first, second = (torch.cat(trainer.feed.order(e)).tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(48))
    assert first != second
    assert torch.cat(trainer.feed.order(0)).tolist() == first


def test_indices_may_repeat_images():
    chosen = np.array([3, 3, 3, 7, 9], np.int64)
    trainer = Trainer(job(indices=chosen), DATA, device="cpu")
    assert sorted(torch.cat(trainer.feed.order(4)).tolist()) == chosen.tolist()


def test_batches_drawn_with_replacement_stay_within_their_batch():
    plain = Trainer(job(), DATA, device="cpu")
    drawn = [
        Trainer(replace(plain.job, ids=(i,), resample=True), DATA, device="cpu") for i in (0, 1)
    ]
    for whole, a, b in zip(*(t.feed.order(2) for t in (plain, *drawn)), strict=True):
        assert set(a.tolist()) < set(whole.tolist())
        assert len(set(a.tolist())) == len(a)
        assert a.tolist() != b.tolist()


def test_a_last_batch_of_one_image_joins_the_one_before():
    trainer = Trainer(job(indices=np.arange(33, dtype=np.int64)), DATA, device="cpu")
    assert [len(b) for b in trainer.feed.order(0)] == [16, 17]


# -- diversity, freezing, resuming ---------------------------------------------------------------


def trained_outputs(jitter):
    (result,) = train_many([job(2, "shared_conv", jitter=jitter)], DATA)
    return result


def test_members_of_one_bnn_differ_after_training():
    result = trained_outputs(0.1)
    assert not np.allclose(result.outputs[0], result.outputs[1])


def test_without_jitter_they_stay_identical_for_ever():
    result = trained_outputs(0.0)
    assert np.array_equal(result.outputs[0], result.outputs[1])


def test_frozen_layers_keep_their_values_and_the_rest_moves():
    start = job(2, "shared_conv")
    (result,) = train_many([start], DATA)
    for name, value in start.start.items():
        layer, _, kind = name.rpartition(".")
        frozen = name.startswith("shared.")
        assert torch.equal(result.state[name], value) == frozen, name
        assert kind in ("weight", "bias", "weights") or "running" in kind or "num_" in kind, layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharing", "changes"),
    [
        ("shared_conv", {"schedule": "plateau", "augment": "crop_flip", "pad": 1}),
        ("tentaclenet", {"schedule": "plateau", "augment": "crop_flip", "pad": 1}),
        ("no_shared", {"optimizer": "adamw", "warmup": 3, "distill": 0.5}),
        ("no_shared", {"label_smoothing": 0.1, "two_step": True}),
    ],
)
def test_resumed_training_ends_with_the_same_bits(tmp_path, sharing, changes):
    recipe = Recipe(epochs=4, batch_size=16, lr=0.01, **changes)
    combine = "sum" if sharing == "tentaclenet" else "mean"
    model = tiny.model(data=DATA, dropout=0.3)
    start = job(2, sharing, combine, model=model, recipe=recipe)
    whole = drive(start, DATA, Trainer(start, DATA, device="cpu"))

    class Killed(Exception):
        pass

    def kill(_, epoch):
        if epoch["epoch"] == (1 if recipe.two_step else 2):
            raise Killed

    checkpoint = Checkpoint(tmp_path, "job")
    with pytest.raises(Killed):
        drive(start, DATA, Trainer(start, DATA, device="cpu"), checkpoint, kill)
    checkpoint.close()
    checkpoint = Checkpoint(tmp_path, "job")
    resumed = drive(start, DATA, Trainer(start, DATA, device="cpu"), checkpoint)
    checkpoint.close()
    assert len(resumed.history) == 4
    assert same(whole.state, resumed.state)
    assert np.array_equal(whole.outputs, resumed.outputs)
    timed = ("seconds", "images_per_s", "time")
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }
    checkpoint = Checkpoint(tmp_path, "job")
    again = drive(start, DATA, Trainer(start, DATA, device="cpu"), checkpoint)  # nothing left to do
    checkpoint.close()
    assert same(again.state, whole.state)


def test_a_finished_job_keeps_its_moments_only_if_asked():
    (plain,) = train_many([job()], DATA)
    (kept,) = train_many([job(keep_optimizer=True)], DATA)
    assert plain.optimizer == {}
    assert same(plain.state, kept.state)
    assert any(name.startswith("adam.exp_avg:0.") for name in kept.optimizer)


def test_going_on_from_moments_is_going_on():
    """Two epochs, and one epoch twice with the moments handed on, take the same steps."""
    start = job(1, "no_shared", keep_optimizer=True, recipe=replace(RECIPE, epochs=1))
    (first,) = train_many([start], DATA)
    (second,) = train_many([replace(start, start=first.state | first.optimizer)], DATA)
    # the same order of the data in both, which one run of two epochs would not have
    trainer = Trainer(start, DATA, device="cpu")
    trainer.epoch([])
    trainer.epoch([])
    assert same(second.state | second.optimizer, trainer.state())


def test_digest_changes_with_everything_the_result_depends_on():
    start = job()
    digests = {
        start.digest(DATA),
        start.digest(tiny.dataset(seed=1)),
        replace(start, seed=2).digest(DATA),
        replace(start, recipe=replace(RECIPE, lr=0.02)).digest(DATA),
        replace(start, resample=True).digest(DATA),
        replace(start, weights=np.ones(48, np.float32)).digest(DATA),
        replace(start, targets=np.ones((48, 4), np.float32)).digest(DATA),
        replace(start, start={**start.start, "shared.weights": torch.zeros(2)}).digest(DATA),
        job(jitter=0.2).digest(DATA),
    }
    assert len(digests) == 9
    assert job().digest(DATA) == start.digest(DATA)


def test_sharing_survives_training_and_resuming(tmp_path):
    start = job(3, "shared_conv")
    trainer = Trainer(start, DATA, device="cpu")
    trainer.epoch([])
    checkpoint = Checkpoint(tmp_path, "job")
    checkpoint.save(trainer.state(), [])
    state, _ = checkpoint.load()
    checkpoint.close()
    resumed = Trainer(start, DATA, device="cpu")
    resumed.load(state)
    for ensemble in (trainer.ensemble, resumed.ensemble):
        first, *others = ensemble.members
        for other in others:
            for name in ensemble.shared:
                assert other.get_submodule(name) is first.get_submodule(name)
            assert other.head.dense is not first.head.dense
            assert other.stem.norm is not first.stem.norm
        assert {n for n in ensemble.state() if ".conv1." in n} == {
            f"shared.body.layer{k}.block1.conv1.weight" for k in (1, 2, 3)
        }


def test_training_changes_nothing_of_its_job():
    """Moments that a start holds are copied: a job that is trained again gives the same bits."""
    first = job(1, "no_shared", keep_optimizer=True, recipe=replace(RECIPE, epochs=1))
    (before,) = train_many([first], DATA)
    second = replace(first, start=before.state | before.optimizer)
    kept = {n: v.clone() for n, v in second.start.items()}
    results = [train_many([second], DATA)[0] for _ in range(2)]
    assert same(second.start, kept)
    assert same(results[0].state, results[1].state)
    assert same(results[0].optimizer, results[1].optimizer)
