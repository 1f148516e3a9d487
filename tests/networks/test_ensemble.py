"""Who owns what: sharing by object identity, canonical states, starts, votes."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from bnncore.lowering import lower
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.combine import combine, tree_sum, winners
from bnncore.networks.ensemble import Ensemble, EnsembleSpec, single_state
from bnncore.networks.sharing import SHARING, Sharing, layer_groups, own_layers, weight_layers
from bnncore.packed import votes
from tests import tiny


def shared_layers(ensemble: Ensemble) -> set[str]:
    """Layers that are one object in all members, found by identity."""
    per_member = [weight_layers(m) for m in ensemble.members]
    return {n for n in per_member[0] if len({id(layers[n]) for layers in per_member}) == 1}


STEM, HEAD = {"stem.conv"}, {"head.dense"}
CONVS = {f"body.layer{s}.block1.conv{c}" for s in (1, 2, 3) for c in (1, 2)}
SHORTCUTS = {f"body.layer{s}.block1.shortcut.conv" for s in (2, 3)}


@pytest.mark.parametrize(
    ("sharing", "own"),
    [
        ("no_shared", STEM | CONVS | SHORTCUTS | HEAD),
        ("shared_conv", HEAD),
        ("all_frozen", set()),
        ("c1", STEM),
        ("c2", SHORTCUTS | HEAD),
        ("c3", {"body.layer3.block1.conv2"} | HEAD),
        ("c3_blocks", {f"body.layer{s}.block1.conv2" for s in (1, 2, 3)} | HEAD),
        # one of the two convolutions of each block shared, the other own (Kim et al. 2022, Fig. 3)
        (Sharing("half", ("body.*.conv1",), True), {n for n in CONVS if n.endswith("1")}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),
)
def test_sharing_is_identity_and_survives_state_and_load(sharing, own):
    ensemble = tiny.ensemble(3, sharing)
    everything = STEM | CONVS | SHORTCUTS | HEAD
    assert shared_layers(ensemble) == everything - own
    state = ensemble.state()
    names = {n.rpartition(".")[0] for n in state if n.endswith(".weight") and "norm" not in n}
    for layer in everything:
        assert (f"shared.{layer}" in names) == (layer not in own)
        assert all((f"{i}.{layer}" in names) == (layer in own) for i in range(3))
    other = Ensemble(ensemble.spec, seed=99)
    other.load(state)
    assert shared_layers(other) == everything - own
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(other.eval()(x), ensemble.eval()(x))


def test_norms_and_activations_are_always_own():
    ensemble = tiny.ensemble(2, "all_frozen")
    names = [n for n, _ in ensemble.parameters_by_name() if n.startswith("shared.")]
    assert not any("norm" in n or "act" in n for n in names)


def test_tentaclenet_shares_the_stem_as_a_block_and_sums_a_dense_layer():
    ensemble = tiny.ensemble(3, "tentaclenet", "sum", classifier="features")
    first = ensemble.members[0]
    assert all(m.stem is first.stem for m in ensemble.members)
    assert ensemble.bias.shape == (4,)
    x = torch.randn(5, 1, 8, 8)
    ensemble.eval()
    features = [m.head.pool(m.body(m.stem(x))).flatten(1) for m in ensemble.members]
    weight = torch.cat([m.head.dense.weight for m in ensemble.members], 1)  # C x (N K), Fig. 2b
    expected = torch.nn.functional.linear(torch.cat(features, 1), weight, ensemble.bias)
    assert torch.allclose(ensemble(x), expected, atol=1e-6)


def test_tentaclenet_without_a_dense_layer_concatenates_logits():
    spec = EnsembleSpec(tiny.model("nin", 6), 2, SHARING["tentaclenet"], "sum", "logits")
    ensemble = Ensemble(spec, seed=1).eval()
    assert ensemble.members[0].head.conv is ensemble.members[1].head.conv
    x = torch.randn(3, 1, 8, 8)
    z = torch.cat([m.head(m.body(m.stem(x))) for m in ensemble.members], 1)
    weight = torch.cat([m.mix.weight for m in ensemble.members], 1)  # C x (N C), Fig. 2a
    expected = torch.nn.functional.linear(z, weight, ensemble.bias)
    assert torch.allclose(ensemble(x), expected, atol=1e-6)


@pytest.mark.parametrize(("backbone", "classifier"), [("resnet8", "features"), ("nin", "logits")])
def test_a_tentacles_rows_start_as_those_of_one_dense_layer_over_all(backbone, classifier):
    for members in (1, 4):
        spec = EnsembleSpec(
            tiny.model(backbone, 8), members, SHARING["tentaclenet"], "sum", classifier
        )
        (member, *_) = Ensemble(spec, seed=1).members
        rows = member.head.dense.weight if classifier == "features" else member.mix.weight
        most = 1 / (members * rows.shape[1]) ** 0.5  # torch's bound for so many inputs
        assert 0.7 * most < rows.abs().max() <= most


def test_reactnet_never_shares_its_downsampling():
    member = tiny.ensemble(1, spec=EnsembleSpec(tiny.model("reactnet10"), 1, SHARING["c1"]))
    downs = {n for n in weight_layers(member.members[0]) if ".shortcut." in n}
    assert len(downs) == 3
    assert member.own == downs | STEM


def test_last_convolutions_of_blocks_of_single_convolutions():
    (member,) = tiny.ensemble(
        1, spec=EnsembleSpec(tiny.model("birealnet18"), 1, SHARING["c3_blocks"])
    ).members
    groups = layer_groups(member)
    last = {n for n, g in groups.items() if "block_last_conv" in g}
    # two layers make a basic block; there are four layers a stage
    assert last == {f"body.layer{s}.block{b}.conv" for s in (1, 2, 3, 4) for b in (2, 4)}


@pytest.mark.parametrize(
    ("backbone", "sharing", "missing"),
    [
        ("nin", SHARING["c2"], "shortcut"),
        ("fernet", SHARING["c3_blocks"], "block_last_conv"),
        ("resnet8", Sharing("own", ("body.layer9.*",), True), "body.layer9.*"),
    ],
)
def test_sharing_that_matches_nothing_says_so(backbone, sharing, missing):
    with torch.device("meta"):
        (member,) = tiny.ensemble(1, "no_shared", backbone=backbone).members
    with pytest.raises(ValueError, match=r"matches no layer") as caught:
        own_layers(member, sharing)
    assert repr(missing) in str(caught.value)
    assert "stem.conv" in str(caught.value)  # what there is


def test_a_part_of_the_members_equals_that_part_of_the_whole():
    whole = tiny.ensemble(4)
    part = Ensemble(whole.spec, ids=(2, 3), seed=3)
    x = torch.randn(2, 1, 8, 8)
    for z, expected in zip(part.eval().outputs(x), whole.eval().outputs(x)[2:], strict=True):
        assert torch.equal(z, expected)  # fresh weights depend on seed and member only
    other = Ensemble(whole.spec, ids=(1,), seed=7)
    other.load(whole.state())
    assert torch.equal(other.eval().outputs(x)[0], whole.outputs(x)[1])


def test_load_names_what_is_wrong():
    ensemble = tiny.ensemble(2)
    state = ensemble.state()
    missing = {n: v for n, v in state.items() if n != "1.head.dense.bias"}
    with pytest.raises(ValueError, match=r"expected an entry '1\.head\.dense\.bias'"):
        ensemble.load(missing)
    state["0.head.dense.weight"] = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"'0\.head\.dense\.weight'.*\(4, 32\), got \(4, 3\)"):
        ensemble.load(state)


def test_members_start_from_one_network_and_differ_by_jitter_only():
    source = tiny.ensemble(1, "no_shared")
    tiny.scramble(source)
    state = single_state(source.state())
    ensemble = tiny.ensemble(3, "shared_conv")
    assert ensemble.start_from(state) == []
    x = torch.randn(4, 1, 8, 8)
    expected = source.eval()(x)
    assert all(torch.equal(z, expected) for z in ensemble.eval().outputs(x))
    ensemble.diversify(seed=5, jitter=0.0, fresh_classifier=False)
    assert all(torch.equal(z, expected) for z in ensemble.outputs(x))
    ensemble.diversify(seed=5, jitter=0.1, fresh_classifier=False)
    first, second, third = ensemble.outputs(x)
    assert torch.equal(first, expected)
    assert not torch.equal(second, first)
    assert not torch.equal(third, second)
    assert shared_layers(ensemble) == STEM | CONVS | SHORTCUTS


def test_fresh_classifiers_differ_where_they_are_own():
    ensemble = tiny.ensemble(2, "shared_conv")
    one = ensemble.members[0].head.dense.weight.clone()
    ensemble.start_from(single_state(tiny.ensemble(1, "no_shared").state()))
    ensemble.diversify(seed=3, jitter=0.0, fresh_classifier=True)
    a, b = (m.head.dense.weight for m in ensemble.members)
    assert torch.equal(a, one)
    assert not torch.equal(a, b)
    frozen = tiny.ensemble(2, "all_frozen")
    before = frozen.members[0].head.dense.weight.clone()
    frozen.diversify(seed=9, jitter=0.0, fresh_classifier=True)
    assert torch.equal(frozen.members[1].head.dense.weight, before)


def test_rows_of_a_common_layer_start_fresh_or_as_the_networks_logits():
    source = tiny.ensemble(1, "no_shared")
    tiny.scramble(source)
    x = torch.randn(4, 1, 8, 8)
    expected = source.eval()(x)
    made = partial(tiny.ensemble, 3, "tentaclenet", combine="sum", classifier="features")
    ensemble, fresh = made(), made()
    for one in (ensemble, fresh):
        one.start_from(single_state(source.state()))
    ensemble.diversify(seed=3, jitter=0.0, fresh_classifier=False)
    torch.testing.assert_close(ensemble.eval()(x), expected)
    fresh.diversify(seed=3, jitter=0.0, fresh_classifier=True)
    a, b, _ = (m.head.dense.weight for m in fresh.members)
    assert not torch.equal(a, b)
    assert not fresh.bias.any()


def test_norms_without_parameters_are_not_jittered():
    ensemble = tiny.ensemble(2, "no_shared")
    for member in ensemble.members:
        for module in member.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.affine, module.weight, module.bias = False, None, None
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    ensemble.diversify(seed=5, jitter=0.1, fresh_classifier=False)
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())


def test_learned_scale_follows_the_weights_of_an_fp32_start():
    fp32 = tiny.ensemble(1, "no_shared", binarizer=None)
    changes = {"binarizer": tiny.P.Binarizer(weight="learned")}
    bnn = tiny.ensemble(1, "no_shared", **changes)
    bnn.start_from(single_state(fp32.state()))
    layers = [m for m in bnn.modules() if isinstance(m, BinaryConv2d)]
    assert layers
    for layer in layers:
        expected = layer.weight.detach().abs().mean(dim=(1, 2, 3))
        assert torch.equal(layer.scale.detach(), expected)


def test_learned_scales_survive_a_start_from_a_trained_bnn():
    changes = {"binarizer": tiny.P.Binarizer(weight="learned")}
    source = tiny.ensemble(1, "no_shared", **changes)
    for layer in source.modules():
        if isinstance(layer, BinaryConv2d):
            layer.scale.data.fill_(0.7)
    target = tiny.ensemble(2, "shared_conv", **changes)
    target.start_from(single_state(source.state()))
    layers = [m for m in target.modules() if isinstance(m, BinaryConv2d)]
    assert layers
    for layer in layers:
        assert layer.scale.unique().tolist() == [pytest.approx(0.7)]


def test_hadamard_starts_differ_between_members():
    ensemble = tiny.ensemble(2, "no_shared")
    ensemble.hadamard(seed=1)
    a, b = (m.body.layer1.block1.conv1.weight for m in ensemble.members)
    assert a.abs().unique().numel() == 1
    assert not torch.equal(a.sign(), b.sign())


@pytest.mark.parametrize("count", range(1, 9))
def test_tree_sum_of_aligned_blocks_is_bitwise_the_whole(count):
    rng = torch.Generator().manual_seed(count)
    values = [torch.randn(100, generator=rng) * 10**k for k in range(count)]
    assert torch.allclose(tree_sum(values), torch.stack(values).sum(0))
    for block in (1, 2, 4):
        parts = [tree_sum(values[i : i + block]) for i in range(0, count, block)]
        assert torch.equal(tree_sum(parts), tree_sum(values))


def votes_by_counting(outputs: np.ndarray, weights: list[float]) -> list[int]:
    """Hard vote in plain Python: most weight, then larger summed probability, then lower class."""
    predicted = []
    for image in range(outputs.shape[1]):
        classes = outputs.shape[2]
        votes, doubt = [0.0] * classes, [0.0] * classes
        for member, weight in enumerate(weights):
            z = outputs[member, image].tolist()
            votes[z.index(max(z))] += weight
            total = math.fsum(math.exp(v) for v in z)
            doubt = [d + math.exp(v) / total for d, v in zip(doubt, z, strict=True)]
        predicted.append(max(range(classes), key=lambda c: (votes[c], doubt[c], -c)))
    return predicted


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.5, 2.0, 1.0, 0.5]])
def test_hard_votes_by_counting(weights):
    rng = np.random.default_rng(0)
    outputs = rng.integers(-3, 4, (4, 300, 3)).astype(np.float32) / 2  # many ties
    z = list(torch.from_numpy(outputs))
    scores = combine("hard_vote", z, torch.tensor(weights), None)
    predicted = winners("hard_vote", z, scores).tolist()
    assert predicted == votes_by_counting(outputs, weights)
    assert predicted != scores.argmax(1).tolist()  # ties do occur, and the rule matters


def test_soft_votes_can_differ_from_hard_ones():
    # the second paper's example: (0.7, 0.3) and (0.2, 0.8) give the second class
    z = [torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.2, 0.8]]).log()]
    scores = combine("soft_vote", z, torch.ones(2), None)
    assert scores.tolist() == [[pytest.approx(0.45), pytest.approx(0.55)]]
    weighted = combine("soft_vote", z, torch.tensor([3.0, 1.0]), None)
    assert weighted.tolist() == [[pytest.approx(2.3 / 4), pytest.approx(1.7 / 4)]]


@pytest.mark.parametrize("how", ["mean", "sum", "soft_vote", "hard_vote"])
def test_torch_and_the_packed_evaluator_combine_alike(how):
    ensemble = tiny.ensemble(3, "shared_conv", how)
    if how != "mean":
        ensemble.weights.copy_(torch.tensor([0.25, 1.5, 1.0]))
    data = tiny.dataset()
    program = lower.lower(ensemble, data.mean, data.std, data.classes)
    rng = torch.Generator().manual_seed(0)
    z = torch.randint(-4, 5, (3, 200, 4), generator=rng) / 2
    weights = ensemble.weights if how != "mean" else torch.ones(3)
    scores = combine(how, list(z), weights, None)
    expected, predicted = votes.combine(program, z.numpy())
    assert np.allclose(scores.numpy(), expected, atol=1e-6)
    assert winners(how, list(z), scores).tolist() == predicted.tolist()
