"""Lowering: the packed program computes what torch computes, signs and thresholds exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnncore.lowering.lower import LowerError, lower
from bnncore.networks.binarize import BinaryActivation, BinaryConv2d, Shift
from bnncore.networks.ensemble import SHARING, Ensemble, EnsembleSpec
from bnncore.networks.parts import Backbone
from bnncore.packed import execute
from bnncore.packed.program import unpack_bits
from bnncore.packed.rules import validate
from bnncore.params import Binarizer
from tests import tiny

DATA = tiny.dataset((12, 12, 3), 5, train=20)


def scrambled(backbone, sharing="shared_conv", members=2, combine="mean", **changes) -> Ensemble:
    model = tiny.model(backbone, 8, DATA, **changes)
    classifier = None
    if sharing == "tentaclenet":
        combine, classifier = "sum", "logits" if backbone == "nin" else "features"
    ensemble = Ensemble(EnsembleSpec(model, members, SHARING[sharing], combine, classifier), seed=2)
    tiny.scramble(ensemble, seed=7)
    if ensemble.bias is not None:
        nn.init.normal_(ensemble.bias)
    return ensemble.eval()


def compare(ensemble: Ensemble):
    """Outputs of torch and of the packed program on the same images."""
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    validate(program)
    images = np.concatenate([DATA.train.images, DATA.val.images])
    packed = execute.Model(program, ops="numpy")
    with torch.no_grad():
        expected = torch.stack(ensemble.outputs(tiny.normalized(DATA, images))).numpy()
    outputs = packed.outputs(images)
    # A float that differs in its last bit may cross a threshold: that changes an image's outputs
    # visibly. Anything systematic changes all images.
    scale = np.abs(expected).max()
    apart = np.abs(outputs - expected).max(axis=(0, 2)) > 1e-4 * scale
    assert apart.sum() <= 1, f"{apart.sum()} of {len(images)} images differ"
    return program, packed


def by_op(program):
    return {op: [n for n in program.nodes if n.op == op] for op in {n.op for n in program.nodes}}


@pytest.mark.parametrize("sharing", ["shared_conv", "tentaclenet", "no_shared", "c2"])
@pytest.mark.parametrize(
    "backbone", ["nin", "resnet9", "fernet", "resnet8", "resnet18", "birealnet18", "reactnet10"]
)
def test_packed_equals_torch(backbone, sharing):
    if sharing == "c2" and backbone in ("nin", "fernet"):
        pytest.skip("no shortcuts")
    ensemble = scrambled(backbone, sharing)
    program, packed = compare(ensemble)
    # combined scores, not only members' outputs
    x = tiny.normalized(DATA, DATA.val.images)
    with torch.no_grad():
        expected = ensemble(x).numpy()
    scores = packed(DATA.val.images)
    close = np.isclose(scores, expected, atol=1e-4 * np.abs(expected).max()).all(1)
    assert (~close).sum() <= 1
    own = {name.rpartition(".")[2] for name, t in program.tensors.items() if t.own}
    assert own  # norms are always a member's own


@pytest.mark.parametrize(
    "binarizer",
    [
        Binarizer("xnor", "bireal"),
        Binarizer("sign", "clipped"),
        Binarizer("learned", "clipped"),
        Binarizer("tests.lowering.test_lower:thirds", "clipped"),
        Binarizer("xnor", "float"),
        Binarizer("sign", "float"),
        Binarizer("xnor", "clipped", stochastic=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("backbone", ["nin", "resnet8", "reactnet10"])
def test_packed_equals_torch_for_every_binarizer(backbone, binarizer):
    ensemble = scrambled(backbone, "no_shared", binarizer=binarizer)
    for layer in ensemble.modules():
        if isinstance(layer, BinaryConv2d) and layer.scale is not None:
            nn.init.normal_(layer.scale)  # learned scales may be negative
    program, _ = compare(ensemble)
    found = by_op(program)
    binary = [t for t in program.tensors.values() if t.role == "weight" and t.kind == "binary"]
    assert binary
    if binarizer.activation == "float":  # BinaryConnect: binary weights over float activations
        assert "bconv" not in found
        assert not {"sign", "threshold", "interval"} & set(found)
    else:
        assert "bconv" in found
    if binarizer.weight == "sign" and backbone == "resnet8":
        assert not any(t.role == "scale" and "conv1" in n for n, t in program.tensors.items())


def thirds(weight, scale):
    """A user's own binarizer: a third of XNOR's scale."""
    from bnncore.networks.binarize import clipped_sign

    return clipped_sign(weight), weight.abs().mean(dim=(1, 2, 3)) / 3


def test_weights_are_packed_as_their_signs():
    ensemble = scrambled("resnet8", "c2", members=2)
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    (node,) = [n for n in program.nodes if n.name == "body.layer1.block1.conv2" and n.op == "bconv"]
    tensor = program.tensors[node.tensors["weight"]]
    assert not tensor.own
    signs = ensemble.members[0].body.layer1.block1.conv2.weight >= 0
    assert np.array_equal(unpack_bits(tensor), signs.permute(0, 2, 3, 1).numpy())
    assert tensor.data.nbytes == 8 * 8 * 9 / 8


# -- folding -----------------------------------------------------------------------------------


class Chain(nn.Module):
    """Bits (B, C, H, W) through a binary convolution and per-channel functions to bits."""

    def __init__(self, channels: int, kernel: int, links: list[nn.Module], bias: bool):
        super().__init__()
        self.first = BinaryActivation()
        self.conv = BinaryConv2d(channels, channels, kernel, padding=kernel // 2, bias=bias)
        for k, link in enumerate(links):
            self.add_module(f"link{k}", link)
        self.count = len(links)
        self.last = BinaryActivation()

    def forward(self, x):
        x = self.conv(self.first(x))
        for k in range(self.count):
            x = getattr(self, f"link{k}")(x)
        return self.last(x)


def chain_ensemble(links, channels=8, kernel=3, bias=True) -> Ensemble:
    """One such chain as the body of a one-member ensemble; the head gives out the bits."""
    ensemble = tiny.ensemble(1, spec=EnsembleSpec(tiny.model("nin"), 1, SHARING["no_shared"]))
    stem = nn.Sequential()
    stem.add_module("conv", nn.Conv2d(3, channels, 1))
    body = nn.Sequential()
    body.add_module("chain", Chain(channels, kernel, links, bias))
    head = nn.Sequential()
    head.add_module("pool", nn.AdaptiveAvgPool2d(1))
    head.add_module("flat", nn.Flatten(1))
    head.add_module("dense", nn.Linear(channels, 5))
    member = Backbone(stem, body, head)
    spec = EnsembleSpec(tiny.model("nin", 8, DATA), 1, SHARING["no_shared"])
    ensemble.spec, ensemble.shared, ensemble.bias = spec, [], None
    ensemble.members[0] = member
    torch.manual_seed(0)
    for p in member.parameters():
        nn.init.normal_(p, std=0.5)
    tiny.scramble(member, seed=11)
    return ensemble.eval()


@pytest.mark.parametrize(
    ("links", "op"),
    [
        (lambda: [nn.BatchNorm2d(8)], "threshold"),
        (lambda: [nn.PReLU(8), nn.BatchNorm2d(8)], "interval"),
        (lambda: [nn.BatchNorm2d(8), nn.PReLU()], "threshold"),
        (lambda: [Shift(8), nn.PReLU(8), Shift(8)], "interval"),
        (lambda: [nn.ReLU(), nn.BatchNorm2d(8)], "threshold"),
        (lambda: [nn.ReLU6(), nn.BatchNorm2d(8), Shift(8)], "threshold"),
        (list, "threshold"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_thresholds_over_popcounts_are_exact(links, op, bias):
    """Bits behind the fold equal torch's at every integer that can occur, for every channel."""
    ensemble = chain_ensemble(links(), bias=bias)
    chain = ensemble.members[0].body.chain
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    nodes = [n for n in program.nodes if n.op in ("threshold", "interval")]
    assert [n.op for n in nodes] == [op]
    assert not by_op(program).get("affine")
    tensors = {slot: program.tensors[name] for slot, name in nodes[0].tensors.items()}
    k = 8 * 9
    sums = np.arange(-k, k + 1)
    alpha = chain.conv.binary()[1]
    with torch.no_grad():
        y = torch.arange(-k, k + 1.0).view(1, 1, -1, 1).expand(1, 8, -1, 1) * alpha[:, None, None]
        y = y if chain.conv.bias is None else y + chain.conv.bias[:, None, None]
        for index in range(chain.count):
            y = getattr(chain, f"link{index}")(y)
    expected = (y[0, :, :, 0] >= 0).numpy()

    def per_channel(slot):
        tensor = tensors[slot]
        data = unpack_bits(tensor) if tensor.kind == "binary" else tensor.data
        return data.reshape(8, 1)

    if op == "threshold":
        limit = per_channel("threshold").astype(np.int64)
        bits = sums >= limit
        if "direction" in tensors:
            bits = np.where(per_channel("direction"), bits, sums <= limit)
    else:
        low, high = (per_channel(s).astype(np.int64) for s in ("low", "high"))
        bits = (low <= sums) & (sums <= high)
        if "inside" in tensors:
            bits = bits ^ ~per_channel("inside")
    assert np.array_equal(bits, expected)


def test_negative_scales_flip_directions_and_positive_ones_need_none():
    ensemble = chain_ensemble([nn.BatchNorm2d(8)])
    norm = ensemble.members[0].body.chain.link0
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    (node,) = by_op(program)["threshold"]
    direction = unpack_bits(program.tensors[node.tensors["direction"]])
    assert np.array_equal(direction, (norm.weight > 0).numpy())
    norm.weight.data.abs_()
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    (node,) = by_op(program)["threshold"]
    assert set(node.tensors) == {"threshold"}


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_over_floats_are_the_very_float(seed):
    """Norm and sign behind a float: torch changes sign at the threshold and not one ulp before."""
    ensemble = scrambled("resnet8", "no_shared", members=1)
    tiny.scramble(ensemble, seed=seed)
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    node = next(
        n
        for n in by_op(program)["threshold"]
        if "float" in program.tensors[n.tensors["threshold"]].kind
    )
    limit = program.tensors[node.tensors["threshold"]].data.reshape(-1)
    rising = np.ones(len(limit), bool)
    if "direction" in node.tensors:
        rising = unpack_bits(program.tensors[node.tensors["direction"]]).reshape(-1)
    block = ensemble.members[0].body.layer1.block1

    def bits(values):
        x = torch.from_numpy(values.astype(np.float32)).view(1, -1, 1, 1).expand(1, -1, 8, 8)
        with torch.no_grad():
            return (block.norm1(x.contiguous())[0, :, 0, 0] >= 0).numpy()

    inner = np.abs(limit) < 1e30  # the others never change
    assert inner.any()
    toward = np.where(rising, -np.inf, np.inf).astype(np.float32)
    assert bits(limit)[inner].all()
    assert not bits(np.nextafter(limit, toward))[inner].any()


# -- refusals ------------------------------------------------------------------------------------


def broken(change) -> Ensemble:
    ensemble = scrambled("resnet8", "no_shared", members=1)
    change(ensemble.members[0])
    return ensemble


def test_statistics_that_are_not_finite_are_named():
    ensemble = scrambled("resnet8", "no_shared", members=2)
    ensemble.members[1].body.layer2.block1.norm1.running_mean[3] = torch.nan
    with pytest.raises(ValueError, match=r"1\.body\.layer2\.block1\.norm1\.running_mean: .*finite"):
        lower(ensemble, DATA.mean, DATA.std, DATA.classes)


@pytest.mark.parametrize(
    ("layer", "module", "message"),
    [
        ("act", nn.Sigmoid(), r"'body\.layer1\.block1\.act': Sigmoid cannot be packed"),
        (
            "conv2",
            BinaryConv2d(8, 8, 3, padding=1, groups=2),
            r"'body\.layer1\.block1\.conv2': expected .*got groups 2",
        ),
        (
            "shortcut",
            nn.Conv2d(8, 8, 3, padding=(1, 1), padding_mode="reflect"),
            r"'body\.layer1\.block1\.shortcut': .*'reflect'",
        ),
        (
            "shortcut",
            nn.Conv2d(8, 8, (3, 1), padding=(1, 0)),
            r"'body\.layer1\.block1\.shortcut': expected equal .* padding \(1, 0\)",
        ),
    ],
)
def test_what_cannot_be_packed_names_the_layer(layer, module, message):
    ensemble = broken(lambda m: setattr(m.body.layer1.block1, layer, module))
    with pytest.raises(LowerError, match=message):
        lower(ensemble.eval(), DATA.mean, DATA.std, DATA.classes)
