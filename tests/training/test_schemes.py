"""Schemes against independent references of a few lines, and what they refuse."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from bnncore import check
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.sharing import SHARING
from bnncore.params import ParamsError
from bnncore.training import feed, inference, plans, schemes
from bnncore.training.ensembled import Ensembled
from bnncore.training.feed import Feed
from bnncore.training.jobs import Trained, TrainingError
from bnncore.training.loop import train_many
from bnncore.training.schedule import learning_rate
from bnncore.training.schemes import SCHEMES, samme_vote
from tests import tiny

DATA = tiny.dataset(classes=3, train=60)
IMAGE, CLASSES = DATA.image, len(DATA.classes)


def params(**ensemble):
    return tiny.parse(ensembles={"train": [{"name": "e", **ensemble}]})


@cache
def pretrained():
    plain = tiny.parse()
    (fp32,) = train_many([plans.first_job(plain, DATA, None)], DATA)
    (bnn,) = train_many([plans.first_job(plain, DATA, fp32.state)], DATA)
    return fp32.state, bnn.state


class Watched:
    """`train_many` that remembers its jobs and results."""

    def __init__(self):
        self.results: list[Trained] = []
        self.calls = 0

    def __call__(self, jobs):
        self.calls += 1
        results = train_many(jobs, DATA)
        self.results += results
        return results

    @property
    def jobs(self):
        return [r.job for r in self.results]


def run(**ensemble):
    p = params(**ensemble)
    check.check(p, IMAGE, CLASSES)
    plan = plans.plan(p, p.ensembles.train[0], DATA, *pretrained())
    watched = Watched()
    return schemes.train(plan, watched), watched, plan


def outputs(result, split) -> np.ndarray:
    """(M, N, C) by the torch ensemble, normalised by an independent formula."""
    network = result.ensemble().eval()
    with torch.no_grad():
        return torch.stack(network.outputs(tiny.normalized(DATA, split.images))).numpy()


# -- every scheme ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_members_that_differ_and_can_be_read_back(scheme, tmp_path):
    sharing = {"tentaclenet": "tentaclenet", "stochastic_rounding": "no_shared"}
    options = {"sharing": sharing.get(scheme, "shared_conv"), "members": 2}
    result, watched, _plan = run(scheme=scheme, **options)
    z = outputs(result, DATA.val)
    assert z.shape == (2, 16, CLASSES)
    assert np.isfinite(z).all()
    assert not np.allclose(z[0], z[1])
    result.save(tmp_path)
    again = Ensembled.read(tmp_path)
    assert again.spec == result.spec
    assert np.array_equal(outputs(again, DATA.val), z)
    repeated, _, _ = run(scheme=scheme, **options)
    assert all(torch.equal(v, repeated.state[n]) for n, v in result.state.items())
    # A draw of stochastic rounding is a job without epochs: it has no history.
    assert set(result.histories) == {job.name for job in watched.jobs if job.recipe.epochs}


@pytest.mark.parametrize("scheme", [s for s, row in SCHEMES.items() if not row.joint])
def test_what_members_trained_apart_share_stays_shared(scheme):
    result, _, plan = run(scheme=scheme, sharing="shared_conv", members=2)
    for name, value in plan.start.items():
        if name.startswith("shared.") and name != "shared.weights":
            assert torch.equal(result.state[name], value), name


# -- teachers --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fusion", "voting", "tentaclenet", "gradient_boosting"])
def test_a_student_learns_from_what_an_earlier_ensemble_says(scheme):
    taught = {"distill": 0.5}
    sharing = "tentaclenet" if scheme == "tentaclenet" else "no_shared"
    student = {"scheme": "fusion", "sharing": "no_shared", "members": 1, "recipe": taught}
    p = tiny.parse(
        ensembles={
            "train": [
                {"name": "many", "scheme": scheme, "sharing": sharing, "members": 2},
                {"name": "one", **student, "teacher": "many"},
                {"name": "of-fp32", **student},
            ]
        }
    )
    check.check(p, IMAGE, CLASSES)
    watched = Watched()
    trained: dict[str, Ensembled] = {}
    for section in p.ensembles.train:
        plan = plans.plan(p, section, DATA, *pretrained(), trained)
        trained[section.name] = schemes.train(plan, watched)
    *_, one, of_fp32 = watched.jobs
    network = trained["many"].ensemble().eval()
    with torch.no_grad():
        scores = network(tiny.normalized(DATA, DATA.train.images)).numpy()
    said, by_fp32 = (inference.teacher_logits(job.teacher, DATA, "cpu") for job in (one, of_fp32))
    if scheme == "voting":
        said = np.exp(said) * 2  # the votes, which are not divided there
        scores = scores * 2 / scores.sum(1, keepdims=True)
    assert np.allclose(said, scores, atol=1e-4)
    assert by_fp32.shape == said.shape
    assert not np.allclose(by_fp32, said)
    assert all(job.teacher is None for job in watched.jobs[:-2])


def test_the_bnn_learns_from_the_fp32_network():
    taught = tiny.parse(binarize={"epochs": 2, "batch_size": 16, "lr": 0.01, "distill": 0.5})
    fp32, bnn = pretrained()
    job = plans.first_job(taught, DATA, fp32)
    (found,) = train_many([job], DATA)
    said = inference.teacher_logits(job.teacher, DATA, "cpu")
    assert said.argmax(1).tolist() != DATA.train.labels.tolist()[::-1]
    assert any(not torch.equal(value, bnn[name]) for name, value in found.state.items())


# -- bagging ---------------------------------------------------------------------------------------


def test_bootstrap_draws_as_many_with_replacement():
    _, watched, _ = run(scheme="bagging", members=3)
    parts = [job.indices for job in watched.jobs]
    assert watched.calls == 1  # members do not wait for each other
    for part in parts:
        assert len(part) == 60
        assert set(part) < set(range(60))
        assert 25 < len(set(part)) < 50  # 38 are expected: 60 * (1 - 1/e)
    assert len({tuple(p) for p in parts}) == 3


def test_partition_is_disjoint_and_whole():
    _, watched, _ = run(scheme="bagging", sampling="partition", members=4)
    parts = [job.indices for job in watched.jobs]
    assert sorted(np.concatenate(parts)) == list(range(60))
    assert [len(p) for p in parts] == [15] * 4


def test_bagging_by_batch_resamples():
    _, watched, _ = run(scheme="bagging", sampling="batch", members=2)
    assert [(j.resample, j.indices) for j in watched.jobs] == [(True, None)] * 2


def test_a_draw_has_the_two_images_that_batch_norm_needs():
    draws = [feed._drawn(2, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert {tuple(found.tolist()) for found in draws} == {(0, 1)}
    assert len(feed._drawn(1, torch.Generator())) == 1


# -- boosting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "vote"),
    [
        (0.25, math.log(3) + math.log(9)),
        (0.5, math.log(9)),
        (0.9, 0.0),  # chance among ten classes
        (0.95, 0.0),
        (0.0, math.log(199) + math.log(9)),  # as if half of 100 images were wrong
    ],
)
def test_samme_votes_by_hand(error, vote):
    assert samme_vote(error, 10, 100) == pytest.approx(vote)


def test_vote_is_positive_just_below_chance():
    assert 0 < samme_vote(1 - 1 / 10 - 1e-6, 10, 1000) < 1e-4


@pytest.mark.parametrize("boost", ["reweight", "resample"])
@pytest.mark.parametrize("chain", [True, False])
def test_boosting_follows_samme(boost, chain):
    """The rounds again, in plain Python, from the predictions of the trained members."""
    result, watched, plan = run(scheme="boosting", boost=boost, chain=chain, members=3)
    assert watched.calls == 3  # one after another
    z = outputs(result, DATA.train)
    w = [1 / 60] * 60
    for i, job in enumerate(watched.jobs):
        if boost == "reweight":
            assert job.weights == pytest.approx([60 * v for v in w], rel=1e-4)
            assert job.indices is None
        else:
            assert job.weights is None
            assert len(job.indices) == 60
        wrong = [p != y for p, y in zip(z[i].argmax(1), DATA.train.labels, strict=True)]
        error = sum(v for v, bad in zip(w, wrong, strict=True) if bad)
        error = max(error, 1 / 120)
        vote = math.log((1 - error) / error) + math.log(2)
        assert result.state["shared.weights"][i].item() == pytest.approx(vote, rel=1e-4)
        w = [v * math.exp(vote) if bad else v for v, bad in zip(w, wrong, strict=True)]
        w = [v / sum(w) for v in w]
    started = watched.jobs[1].start["1.head.dense.weight"]
    before = watched.results[0].state["0.head.dense.weight"]
    assert torch.equal(started, before if chain else plan.start["1.head.dense.weight"])


def test_resampling_prefers_heavy_images():
    """Members that are wrong on one class only: the next draws it far more often."""
    p = params(scheme="boosting", boost="resample", members=2, recipe={"epochs": 0})
    plan = plans.plan(p, p.ensembles.train[0], DATA, *pretrained())
    watched = Scripted(lambda labels: np.where(labels == 0, 1, labels))
    schemes.train(plan, watched)
    labels = DATA.train.labels[watched.jobs[1].indices]
    # w of a wrong image is (1 - eps) / eps * (C - 1) = 4 times that of a right one; eps = 1/3
    share = 4 * 20 / (4 * 20 + 40)
    assert abs((labels == 0).mean() - share) < 5 * (share * (1 - share) / 60) ** 0.5


class Scripted(Watched):
    """Members that predict ``predictions[i](labels)`` on the training images."""

    def __init__(self, *predictions):
        super().__init__()
        self.predictions = predictions

    def __call__(self, jobs):
        predict = self.predictions[min(self.calls, len(self.predictions) - 1)]
        said = np.eye(CLASSES, dtype=np.float32)[predict(DATA.train.labels)]
        return [replace(one, training=said[None]) for one in super().__call__(jobs)]


def boosted(*predictions):
    p = params(scheme="boosting", members=len(predictions), recipe={"epochs": 0})
    plan = plans.plan(p, p.ensembles.train[0], DATA, *pretrained())
    watched = Scripted(*predictions)
    return schemes.train(plan, watched), watched.jobs


def right(labels):
    return labels


def wrong(labels):
    return (labels + 1) % CLASSES


def half_wrong(labels):
    return np.where(np.arange(len(labels)) % 2 == 0, labels, (labels + 1) % CLASSES)


def test_a_member_without_errors_has_a_large_finite_vote_and_changes_no_weight():
    result, jobs = boosted(right, half_wrong)
    votes = result.state["shared.weights"].tolist()
    assert votes[0] == pytest.approx(math.log(119) + math.log(2))
    assert jobs[1].weights == pytest.approx(np.ones(60))


def test_a_member_no_better_than_chance_gets_no_vote_and_weights_start_anew():
    result, jobs = boosted(half_wrong, wrong, half_wrong)
    votes = result.state["shared.weights"].tolist()
    assert votes == pytest.approx([math.log(2), 0.0, math.log(2)])
    assert len(set(jobs[1].weights.tolist())) == 2  # half_wrong's errors weigh more
    assert jobs[2].weights == pytest.approx(np.ones(60))


def test_a_first_member_no_better_than_chance_is_an_error_with_names():
    with pytest.raises(
        TrainingError, match=r"e: expected a first member better than chance.*0\.667.*1\.000"
    ):
        boosted(wrong, right)


# -- gradient boosting -----------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["squared", "logits"])
def test_gradient_boosting_follows_the_sum(residual):
    result, watched, _ = run(
        scheme="gradient_boosting", residual=residual, shrinkage=0.5, members=3
    )
    assert result.spec.combine == "sum"
    assert result.state["shared.weights"].tolist() == [0.5] * 3
    z = outputs(result, DATA.train).astype(np.float64)
    total = np.zeros_like(z[0])
    for i, job in enumerate(watched.jobs):
        if residual == "squared":
            exp = np.exp(total)
            expected = np.eye(CLASSES)[DATA.train.labels] - exp / exp.sum(1, keepdims=True)
            assert np.allclose(job.targets, expected, atol=1e-4)
        else:
            assert np.allclose(job.offsets, total, atol=1e-4)
        total = total + 0.5 * z[i]
    scores = result.ensemble().eval()(tiny.normalized(DATA, DATA.train.images))
    assert np.allclose(scores.detach().numpy(), total, atol=1e-4)


def test_gradient_boosting_matches_torchensembles_targets():
    operator = pytest.importorskip("torchensemble.utils.operator")
    _, watched, _ = run(scheme="gradient_boosting", members=2)
    z = torch.from_numpy(watched.results[0].training[0])
    y = torch.from_numpy(DATA.train.labels)
    total = operator.sum_with_multiplicative([z], 1.0)
    expected = operator.pseudo_residual_classification(y, total, CLASSES)
    assert np.allclose(watched.jobs[1].targets, expected.numpy(), atol=1e-6)


def test_boosted_sums_fit_better_than_their_first_member():
    result, _, _ = run(
        scheme="gradient_boosting", residual="logits", members=3, recipe={"epochs": 6}
    )
    z = torch.from_numpy(outputs(result, DATA.train))
    y = torch.from_numpy(DATA.train.labels)
    losses = [nn.functional.cross_entropy(z[:m].sum(0), y).item() for m in (1, 2, 3)]
    assert losses[2] < losses[0]


# -- snapshot --------------------------------------------------------------------------------------


def test_snapshot_is_one_run_with_a_cyclic_cosine():
    result, watched, _plan = run(
        scheme="snapshot", members=2, recipe={"epochs": 4, "lr": 0.02, "schedule": "cosine"}
    )
    assert [j.recipe.epochs for j in watched.jobs] == [2, 2]
    assert [j.recipe.schedule for j in watched.jobs] == ["cosine"] * 2
    # Huang et al. 2017, Eq. 2, at the epochs' starts: T = 4 epochs, M = 2
    expected = [0.01 * (math.cos(math.pi * (t % 2) / 2) + 1) for t in range(4)]
    rates = [e["lr"] for h in result.histories.values() for e in h]
    assert rates == pytest.approx(expected)
    first, second = watched.results
    for name, value in first.state.items():
        if name.startswith("0."):
            assert torch.equal(second.job.start["1." + name[2:]], value)
    for name, value in first.optimizer.items():
        assert torch.equal(second.job.start[name.replace(":0.", ":1.")], value)
    steps = [v.item() for n, v in second.optimizer.items() if n.startswith("adam.step:1.")]
    assert set(steps) == {4 * 4}  # 60 images in batches of 16: four steps an epoch, never reset


def test_snapshots_learning_rate_is_torchensembles():
    snapshot = pytest.importorskip("torchensemble.snapshot_ensemble")
    members, epochs, steps = 3, 6, 5
    library = snapshot.SnapshotEnsembleClassifier(
        estimator=nn.Identity(), n_estimators=members, cuda=False
    )
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = library._set_scheduler(optimizer, epochs * steps)
    theirs = []
    for _ in range(epochs * steps):
        theirs.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    cycle = tiny.P.Recipe(lr=1.0, epochs=epochs // members, schedule="cosine")
    ours = [
        learning_rate(cycle, [], (epoch + step / steps) / cycle.epochs)
        for _ in range(members)
        for epoch in range(cycle.epochs)
        for step in range(steps)
    ]
    assert ours == pytest.approx(theirs, abs=1e-6)


# -- stochastic rounding ---------------------------------------------------------------------------


def test_stochastic_rounding_draws_from_one_network():
    result, watched, _plan = run(
        scheme="stochastic_rounding", sharing="no_shared", members=3, recipe={"epochs": 1}
    )
    first, *draws = watched.jobs  # each draw has its norms estimated where it is sent
    assert [(job.then, job.recipe.epochs) for job in draws] == [("norms", 0)] * 3
    assert first.spec.model.binarizer.stochastic
    assert not result.spec.model.binarizer.stochastic  # members' signs are fixed
    source = watched.results[0].state
    members = result.ensemble().members
    binary = {n for n, m in members[0].named_modules() if isinstance(m, BinaryConv2d)}
    assert binary
    plus, chance = 0.0, 0.0
    for name, value in source.items():
        member, _, entry = name.partition(".")
        layer, _, kind = entry.rpartition(".")
        copies = [result.state.get(f"{i}.{entry}") for i in range(3)]
        if member != "0" or "running" in kind or "num" in kind:
            continue
        if layer in binary:
            # magnitudes, and so alpha, are the network's; signs are drawn
            assert all(torch.allclose(c.abs(), value.abs(), atol=1e-30) for c in copies)
            assert len({tuple((c >= 0).flatten().tolist()) for c in copies}) == 3
            plus += sum((c >= 0).double().sum().item() for c in copies)
            chance += 3 * ((value.clamp(-1, 1).double() + 1) / 2).sum().item()
        else:
            assert all(torch.equal(c, value) for c in copies)
    total = 3 * sum(members[0].get_submodule(n).weight.numel() for n in binary)
    assert abs(plus - chance) < 5 * (0.25 * total) ** 0.5


def test_batch_norm_statistics_of_a_draw_by_hand():
    """The first norm behind a drawn layer: means over batches of batch statistics."""
    result, _, plan = run(
        scheme="stochastic_rounding", sharing="no_shared", members=2, recipe={"epochs": 0}
    )
    feed = Feed(plan.member(1), DATA, torch.device("cpu"))
    batches = [tiny.normalized(DATA, DATA.train.images[at]) for at in feed.order(0)]
    member = result.ensemble().members[1].eval()
    block = member.body.layer1.block1
    means, variances = [], []
    with torch.no_grad():
        for x in batches:
            # in training mode each norm uses the batch's statistics
            for norm in (member.stem.norm, block.norm1):
                norm.train()
                norm.momentum = 0.0
            h = block.act1(block.conv1(block.sign1(block.norm1(member.stem(x)))))
            means.append(h.mean((0, 2, 3)))
            variances.append(h.var((0, 2, 3)))
    state = result.state
    expected = torch.stack(means).mean(0), torch.stack(variances).mean(0)
    prefix = "1.body.layer1.block1.norm2.running_"
    assert torch.allclose(state[prefix + "mean"], expected[0], atol=1e-4)
    assert torch.allclose(state[prefix + "var"], expected[1], atol=1e-4)


def test_a_draw_for_a_weight_of_zero_can_be_either_sign():
    weight = torch.zeros(1000)
    schemes.rounded_(weight, torch.Generator().manual_seed(0))
    counts = Counter((weight >= 0).tolist())
    assert set(counts) == {True, False}
    assert weight.abs().max() < 1e-30


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"scheme": "stacking"}, r"scheme: expected one of tentaclenet, fusion, .*got 'stacking'"),
        ({"sharing": "c4"}, r"sharing: expected one of tentaclenet, .*got 'c4'"),
        (
            {"sampling": "batch"},
            r"sampling: expected only with scheme bagging, got it with 'fusion'",
        ),
        ({"scheme": "bagging", "boost": "resample"}, r"boost: expected only with scheme boosting"),
        ({"vote": "hard"}, r"vote: expected only with scheme voting or bagging or boosting"),
        ({"scheme": "voting", "shrinkage": 0.1}, r"shrinkage: .*gradient_boosting"),
        ({"classifier": "logits"}, r"classifier: expected only with scheme tentaclenet"),
        (
            {"scheme": "snapshot", "members": 3, "recipe": {"epochs": 10}},
            r"recipe\.epochs: expected a multiple of members \(3\), a cycle each, got 10",
        ),
        (
            {"scheme": "snapshot", "members": 2, "recipe": {"schedule": "poly"}},
            r"recipe\.schedule: .*expected cosine or none, got 'poly'",
        ),
        (
            {"scheme": "stochastic_rounding", "sharing": "shared_conv"},
            r"sharing: 'shared_conv' shares all binary convolutions",
        ),
        (
            {"scheme": "voting", "sharing": "tentaclenet"},
            r"sharing: 'tentaclenet' shares layers that are trained",
        ),
        ({"scheme": "fusion", "sharing": "tentaclenet"}, r"'mixing'"),
        ({"scheme": "tentaclenet", "sharing": "shared_conv"}, r"'mixing'"),
        ({"sharing": {"own": ["body.layer7.*"]}}, r"'body\.layer7\.\*' matches no layer"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_training(section, message):
    with pytest.raises(ParamsError, match=message) as caught:
        check.check(params(**section), IMAGE, CLASSES)
    assert "ensembles.train.e" in str(caught.value)


def test_no_shortcut_to_share_but_for_tentaclenet():
    nin = {"backbone": "nin", "width": 6}
    for scheme, sharing, good in (
        ("tentaclenet", "tentaclenet", True),
        ("fusion", "shared_conv", True),
        ("fusion", "c2", False),
        ("fusion", "c3_blocks", False),
    ):
        p = tiny.parse(
            model=nin, ensembles={"train": [{"name": "e", "scheme": scheme, "sharing": sharing}]}
        )
        if good:
            check.check(p, IMAGE, CLASSES)
        else:
            with pytest.raises(ParamsError, match="matches no layer of this backbone"):
                check.check(p, IMAGE, CLASSES)


def test_options_out_of_range_are_refused_with_what_is_allowed():
    for field, value in (("shrinkage", 0.0), ("shrinkage", 1.5), ("sampling", "some")):
        with pytest.raises(ParamsError, match=field):
            params(scheme="bagging", **{field: value})


def test_half_of_the_blocks_convolutions_can_be_shared_alone():
    result, _, _ = run(sharing={"own": ["body.*.conv2", "classifier"]}, members=2)
    names = {n.partition(".")[0] for n in result.state if ".conv1.weight" in n}
    assert names == {"shared"}
    assert {n.partition(".")[0] for n in result.state if ".conv2.weight" in n} == {"0", "1"}


def test_benn_shares_nothing():
    for scheme in ("bagging", "boosting"):
        result, _, _ = run(scheme=scheme, sharing="no_shared", members=2)
        assert [n for n in result.state if n.startswith("shared.")] == ["shared.weights"]


def test_spec_of_one_member_is_an_ensemble_too():
    spec = EnsembleSpec(tiny.model(data=DATA), 1, SHARING["shared_conv"])
    assert len(Ensemble(spec).members) == 1
    result, _, _ = run(scheme="fusion", members=1)
    assert outputs(result, DATA.val).shape == (1, 16, CLASSES)
