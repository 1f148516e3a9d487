"""Users' own networks: traced, split, binarized, trained, packed; or refused by name."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnncore import check
from bnncore.lowering.lower import lower
from bnncore.networks.backbones import build
from bnncore.networks.binarize import BinaryActivation, BinaryConv2d
from bnncore.networks.ensemble import Ensemble, EnsembleSpec, single_state
from bnncore.networks.parts import Dropout, ModelSpec
from bnncore.networks.sharing import SHARING, layer_groups
from bnncore.networks.template import TemplateError, binarized
from bnncore.packed import execute
from bnncore.params import Binarizer, ParamsError
from bnncore.training import plans, schemes
from bnncore.training.loop import train_many
from tests import tiny

RGB = tiny.dataset((32, 32, 3), 5, train=12)
GRAY = tiny.dataset((12, 12, 1), 4)


class Plain(nn.Module):
    """Functional pooling and activations, a size read off a tensor, an inner dense layer."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.one = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.three = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.inner = nn.Linear(16 * 3 * 3, 12)
        self.last = nn.Linear(12, classes)

    def forward(self, x):
        x = F.relu(self.norm(self.one(x)), inplace=True)
        h = F.max_pool2d(x, 2)
        y = self.two(h).relu_()
        y += self.side(h)
        y = torch.relu(self.three(y))
        y = F.dropout(y, 0.25, self.training)
        y = F.avg_pool2d(y, 1)
        y = y.view(y.size(0), -1)
        return self.last(F.relu(self.inner(y)))


def plain(channels, classes):
    return Plain(channels, classes)


def in_groups(channels, classes):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip


def gelu(channels, classes):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip


def all_convolutions(channels, classes):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.Conv2d(8, classes, 1), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
    )  # fmt: skip


def spec(name: str, data=GRAY, binarizer: Binarizer | None = Binarizer(), **changes):  # noqa: B008
    return ModelSpec(
        f"tests.networks.test_template:{name}",
        data.image,
        len(data.classes),
        binarizer=binarizer,
        **changes,
    )


def test_first_and_last_layer_stay_and_inner_convolutions_become_binary():
    net = build(spec("plain"))
    kinds = {n: type(m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert kinds == {
        "stem.conv": nn.Conv2d,
        "body.two": BinaryConv2d,
        "body.side": BinaryConv2d,
        "body.three": BinaryConv2d,
        "body.inner": nn.Linear,
        "head.dense": nn.Linear,
    }
    assert [type(m) for m in net.stem] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    signs = [n for n, m in net.named_modules() if isinstance(m, BinaryActivation)]
    assert signs == ["body.two_sign", "body.side_sign", "body.three_sign"]
    assert sum(isinstance(m, Dropout) for m in net.modules()) == 1
    groups = layer_groups(net)
    assert groups["body.two"] == {"binary_conv"}
    assert groups["body.three"] == {"binary_conv", "last_conv"}


@pytest.mark.parametrize("name", ["plain", "all_convolutions"])
def test_the_fp32_twin_computes_what_the_users_network_does(name):
    x = torch.randn(3, 1, 12, 12)
    torch.manual_seed(0)
    expected = globals()[name](1, 4).eval()(x)
    torch.manual_seed(0)
    twin = build(spec(name, binarizer=None)).eval()
    assert torch.equal(twin(x), expected)


def test_what_a_binary_layer_computes():
    """Batch norm, sign, binary convolution in the place of the plain one, all else kept."""
    torch.manual_seed(0)
    net = build(spec("all_convolutions")).eval()
    tiny.scramble(net)
    x = torch.randn(2, 1, 12, 12)
    h = F.relu(net.stem.norm(net.stem.conv(x)))
    norm, layer = net.body.get_submodule("3_norm"), net.body.get_submodule("3")
    bits = torch.where(norm(h) >= 0, 1.0, -1.0)
    alpha = layer.weight.abs().mean((1, 2, 3))[:, None, None]
    signs = torch.where(layer.weight >= 0, 1.0, -1.0)
    h = F.relu(F.conv2d(bits, signs, padding=1) * alpha + layer.bias[:, None, None])
    expected = net.head.conv(h).mean((2, 3))
    assert torch.allclose(net(x), expected, atol=1e-6)


def test_weights_transfer_by_name():
    fp32 = Ensemble(EnsembleSpec(spec("plain", binarizer=None), 1, SHARING["no_shared"]), seed=1)
    bnn = Ensemble(EnsembleSpec(spec("plain"), 1, SHARING["no_shared"]), seed=2)
    missing = bnn.start_from(single_state(fp32.state()))
    assert {n.split(".")[1] for n in missing} == {"two_norm", "side_norm", "three_norm"}
    ours, theirs = bnn.state(), fp32.state()
    assert all(torch.equal(ours[n], v) for n, v in theirs.items())


def packed_equals_torch(ensemble: Ensemble, data) -> None:
    tiny.scramble(ensemble, seed=4)
    ensemble.eval()
    program = lower(ensemble, data.mean, data.std, data.classes)
    outputs = execute.Model(program, ops="numpy").outputs(data.val.images)
    with torch.no_grad():
        expected = torch.stack(ensemble.outputs(tiny.normalized(data, data.val.images))).numpy()
    apart = np.abs(outputs - expected).max((0, 2)) > 1e-4 * np.abs(expected).max()
    assert apart.sum() <= 1


@pytest.mark.parametrize("sharing", ["no_shared", "shared_conv", "tentaclenet", "c3"])
@pytest.mark.parametrize("name", ["plain", "all_convolutions"])
def test_packed_equals_torch(name, sharing):
    combine, classifier = "mean", None
    if sharing == "tentaclenet":
        combine, classifier = "sum", "features" if name == "plain" else "logits"
    row = EnsembleSpec(spec(name), 2, SHARING[sharing], combine, classifier)
    packed_equals_torch(Ensemble(row, seed=0), GRAY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "binarizer",
    [
        Binarizer("sign"),
        Binarizer("learned", "bireal"),
        Binarizer("xnor", "float"),
        Binarizer("xnor", shift=True, act="rprelu", stem="binary"),
        Binarizer("learned", "float", shift=True, act="prelu"),
    ],
)
def test_packed_equals_torch_for_every_binarizer(binarizer):
    row = EnsembleSpec(spec("plain", binarizer=binarizer), 2, SHARING["no_shared"])
    packed_equals_torch(Ensemble(row, seed=0), GRAY)


TORCHVISION = "examples.own_cnn:torchvision_resnet18"


@pytest.mark.slow
def test_torchvisions_resnet18_unmodified():
    pytest.importorskip("PIL")
    model = ModelSpec(TORCHVISION, RGB.image, 5, binarizer=Binarizer())
    with torch.device("meta"):
        member = build(model)
    groups = layer_groups(member)
    assert {n for n, g in groups.items() if g == {"shortcut"}} == {
        f"body.layer{k}.0.downsample.0" for k in (2, 3, 4)
    }
    assert sum(isinstance(m, BinaryConv2d) for m in member.modules()) == 19
    packed_equals_torch(Ensemble(EnsembleSpec(model, 2, SHARING["shared_conv"]), seed=0), RGB)


@pytest.mark.parametrize("sharing", ["tentaclenet", "shared_conv"])
def test_from_fp32_to_an_ensemble(sharing):
    scheme = "tentaclenet" if sharing == "tentaclenet" else "fusion"
    p = tiny.parse(
        model={"backbone": "examples.own_cnn:small_cnn"},
        ensembles={
            "train": [{"name": "e", "scheme": scheme, "sharing": sharing, "members": 2}],
            "recipe": {"epochs": 1, "batch_size": 16},
        },
    )
    check.check(p, GRAY.image, 4)
    (fp32,) = train_many([plans.first_job(p, GRAY, None)], GRAY)
    (bnn,) = train_many([plans.first_job(p, GRAY, fp32.state)], GRAY)
    plan = plans.plan(p, p.ensembles.train[0], GRAY, fp32.state, bnn.state)
    result = schemes.train(plan, lambda jobs: train_many(jobs, GRAY))
    z = result.ensemble().eval().outputs(tiny.normalized(GRAY, GRAY.val.images))
    assert not torch.allclose(z[0], z[1])
    packed_equals_torch(result.ensemble(), GRAY)


def test_dropout_of_parameters_goes_in_front_of_the_last_layer():
    net = build(spec("plain", dropout=0.5))
    assert isinstance(net.head.dropout, Dropout)
    assert net.head.dropout.p == 0.5
    assert not torch.equal(net(torch.ones(2, 1, 12, 12))[0], net(torch.ones(2, 1, 12, 12))[1])


class Named(nn.Module):
    """Layers of the user's that have the very names that the template would give its own."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.one = nn.Conv2d(channels, 4, 3, padding=1)
        self.block = nn.Sequential()
        self.block.add_module("conv_norm", nn.BatchNorm2d(4))
        self.block.add_module("conv_sign", nn.PReLU(4))
        self.block.add_module("conv", nn.Conv2d(4, 4, 3, padding=1))
        self.dropout = nn.Dropout(0.5)
        self.dropout_packed = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, classes)

    def forward(self, x):
        x = self.block(F.relu(self.one(x)))
        x = self.dropout_packed(self.dropout(x))
        return self.last(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def named(channels, classes):
    return Named(channels, classes)


def test_layers_that_are_put_in_replace_none_of_the_users():
    torch.manual_seed(0)
    theirs = Named(1, 4)
    with torch.no_grad():
        for index, p in enumerate(theirs.parameters()):
            p.fill_(index + 1)
    kept = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    for binarizer in (None, Binarizer()):
        ours = binarized(copy.deepcopy(theirs), spec("named", binarizer=binarizer))
        left = [p.detach() for p in ours.parameters()]
        for name, value in kept.items():
            assert any(p.shape == value.shape and torch.equal(p, value) for p in left), name
        assert torch.equal(ours.body.block.conv_norm.weight, kept["block.conv_norm.weight"])
        assert isinstance(ours.body.block.conv_sign, nn.PReLU)
        assert isinstance(ours.body.dropout_packed, nn.BatchNorm2d)
        assert sum(type(m) is nn.BatchNorm2d for m in ours.modules()) == 2 + (binarizer is not None)


class Called(nn.Module):
    """Layers called by keyword, behind and inside of names that the template gives."""

    def __init__(self, name: str, inside: bool):
        super().__init__()
        self.first, self.inner = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        last = nn.Linear(4, 4) if name == "dense" else nn.Conv2d(4, 4, 1)
        if inside:  # the last layer stands in a container of that name
            setattr(self, name, nn.Sequential(nn.ReLU(), last))
        else:
            self.last = last
            setattr(self, name, nn.PReLU(4))
        self.name, self.inside = name, inside

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.inner(input=self.first(input=x)), 1)
        x = torch.flatten(x, 1) if self.name == "dense" else x
        named = getattr(self, self.name)
        x = named(x) if self.inside else named(self.last(input=x))
        return x if self.name == "dense" else torch.flatten(x, 1)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["dense", "conv"])
def test_names_that_the_template_gives_and_calls_by_keyword(name, inside, dropout):
    torch.manual_seed(0)
    theirs = Called(name, inside).eval()
    x = torch.randn(3, 1, 8, 8)
    for binarizer in (None, Binarizer()):
        built = spec("called", binarizer=binarizer, dropout=dropout)
        ours = binarized(copy.deepcopy(theirs), built).eval()
        assert isinstance(ours.head.get_submodule(name), nn.Linear | nn.Conv2d)
        if binarizer is None:
            assert torch.allclose(ours(x), theirs(x), atol=1e-6)
        else:
            assert ours(x).shape == (3, 4)


# Heads as people write them, behind a body that gives (B, 8, 6, 6).
HEADS = {
    "linear": lambda k: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, k)],
    "relu flatten linear": lambda k: [
        nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(8, k)],
    "conv flatten": lambda k: [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, k, 1), nn.Flatten()],
    "conv relu conv": lambda k: [
        nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, k, 1),
        nn.Flatten()],
    "norm linear": lambda k: [
        nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.ReLU6(), nn.Linear(8, k)],
    "flatten relu": lambda k: [
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.PReLU(8), nn.Dropout(0.1), nn.Linear(8, k)],
    "conv pool": lambda k: [nn.Conv2d(8, k, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "conv squeeze": lambda k: [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, k, 1), Squeeze()],
    "whole window": lambda k: [nn.AvgPool2d(6), nn.Conv2d(8, k, 1), nn.Flatten()],
    "twice": lambda k: [
        nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Flatten(),
        nn.Linear(8, k)],
}  # fmt: skip


class Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze(-1).squeeze(2)


def headed(channels, classes, head):
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding="same"), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding="valid"), nn.MaxPool2d(2, padding=1), *HEADS[head](classes),
    )  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_heads_as_people_write_them(head, monkeypatch):
    monkeypatch.setitem(globals(), "plain", lambda c, k: headed(c, k, head))
    torch.manual_seed(0)
    expected = headed(1, 4, head).eval()
    torch.manual_seed(0)
    twin = build(spec("plain", binarizer=None)).eval()
    x = torch.randn(3, 1, 12, 12)
    assert torch.allclose(twin(x), expected(x), atol=1e-6)
    for sharing in ("no_shared", "shared_conv"):
        row = EnsembleSpec(spec("plain"), 2, SHARING[sharing])
        packed_equals_torch(Ensemble(row, seed=0), GRAY)


# -- refusals ------------------------------------------------------------------------------------


class Looking(Plain):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Twice(Plain):
    def forward(self, x):
        x = self.norm(self.one(x))
        return self.last(self.two(self.two(x)).mean((2, 3))[:, :1].expand(-1, 12))


class Around(Plain):
    def forward(self, x):
        h = F.relu(self.one(x))
        return self.last(F.pad(self.two(h).mean((2, 3)), (0, 4))) + x.mean((1, 2, 3))[:, None]


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(144, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x.flatten(1)))


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        h = F.relu(self.one(x))
        return self.last(self.two(h).mean((2, 3))) + h.mean((2, 3))


class Calls(nn.Module):
    """Whatever `call` makes of the map behind the first layer, in front of the last."""

    def __init__(self, call, layer: nn.Module | None = None):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.layer = layer
        self.last = nn.LazyLinear(4)
        self.call = call

    def forward(self, x):
        h = self.two(F.relu(self.one(x)))
        h = self.layer(h) if self.layer is not None else self.call(h)
        return self.last(h.flatten(1))


def test_what_leads_nowhere_is_left_out():
    net = Calls(lambda h: h)
    net.aside = nn.Conv2d(4, 4, 3)
    net.call = lambda h: (net.aside(h).sigmoid(), h)[1]
    net(torch.zeros(1, 1, 12, 12))
    names = [n for n, _ in binarized(net, spec("plain")).named_modules()]
    assert "body.two" in names
    assert "body.aside" not in names


def _changed_in_place(h):
    before = h
    h += h.relu()
    return before.add(h)


def _hooked():
    layer = nn.ReLU()
    layer.register_forward_hook(lambda m, a, y: y * 2)
    return layer


class Doubling(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


Doubling.__module__ = "torch.nn.modules.activation"  # a leaf to torch.fx


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: torch.add(h, h.relu(), alpha=3), r"operation 'add': alpha: expected 1, got 3"),
        (lambda h: h.add(h.relu(), alpha=-2), r"operation 'add': alpha: expected 1, got -2"),
        (lambda h: h + 1, r"operation 'add': expected a value of the network as input, got 1"),
        (lambda h: h.chunk(2, 1)[0], r"operation 'chunk': chunk cannot be packed"),
        (lambda h: torch.cat([h, h], 2), r"operation 'cat': dim: expected 1, got 2"),
        (lambda h: torch.cat([h, h], dim=-1), r"operation 'cat': dim: expected 1, got -1"),
        (lambda h: F.max_pool2d(h, (2, 3)), r"'max_pool2d': kernel_size: expected the same int"),
        (lambda h: F.max_pool2d(h, 2, return_indices=True)[0], r"max_pool2d"),
        (lambda h: F.avg_pool2d(h, 2, divisor_override=3), r"divisor_override: expected None"),
        (lambda h: h.mean((2, 3), dtype=torch.float32), r"'mean': dtype: expected None"),
        (lambda h: h.mean(1), r"'mean': dim: expected \(2, 3\), got 1"),
        (lambda h: F.dropout(h, 0.5), r"'dropout': training: expected False, got True"),
        (lambda h: h.relu_() + h, r"reads 'conv2d|two', which .*'relu_' has written over"),
        (lambda h: h.view(-1, 36, 16), r"'view': expected to flatten all"),
        (lambda h: h.permute(0, 2, 3, 1), r"operation 'permute': permute cannot be packed"),
        (lambda h: (h.relu_(), h)[1], r"computes what its trace says"),
        (_changed_in_place, r"computes what its trace says"),
        (_hooked(), r"layer 'layer': hooks cannot be packed"),
        (Doubling(), r"layer 'layer': Doubling cannot be packed"),
        (nn.AvgPool2d(2, divisor_override=3), r"layer 'layer': divisor_override: expected None"),
        (nn.MaxPool2d((2, 3)), r"layer 'layer': kernel_size: expected the same integer"),
        (nn.BatchNorm2d(4, track_running_stats=False), r"track_running_stats: expected True"),
        (nn.BatchNorm2d(4, device="cpu").requires_grad_(False).eval(), None),
        (nn.Hardtanh(-1, float("inf")), r"layer 'layer': expected finite min_val <= max_val"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"layer 'layer': dilation: expected 1, got 2"),
        (nn.Conv2d(4, 4, 2, padding="same"), r"layer 'layer': kernel_size: expected odd sizes"),
        (nn.Unflatten(1, (2, 2)), r"layer 'layer': Unflatten cannot be packed"),
    ],
)  # fmt: skip
def test_what_torch_does_and_a_packed_network_cannot_is_named(call, message):
    net = Calls(None, call) if isinstance(call, nn.Module) else Calls(call)
    net(torch.zeros(1, 1, 12, 12))
    if message is None:
        binarized(net, spec("plain"))
        return
    with pytest.raises(TemplateError, match=message):
        binarized(net, spec("plain"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Looking(1, 4), r"Looking cannot be traced"),
        (lambda: Twice(1, 4), r"layer 'two': expected to be used once"),
        (lambda: Around(1, 4), r"'mean' reads the images; expected only .*'one'"),
        (Dense, r"layer 'fc1': expected a convolution first"),
        (Skipping, r"head: expected all paths to pass through"),
        (lambda: Plain(1, 7), r"expected logits of shape \(B, 4\), got \(2, 7\)"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 12), nn.Flatten()), r"at least two .* got 0"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 15), nn.Linear(1, 1)),
            r"'0' cannot run on images of 12 x 12 x 1",
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 4)
            ),
            r"'1': adaptive pooling from 10 x 10 to 4 x 4 cannot be packed",
        ),
        (lambda: "a network", r"expected a torch module, got str"),
    ],
)
def test_what_does_not_fit_the_template_is_named(make, message):
    with pytest.raises(TemplateError, match=message):
        binarized(make(), spec("plain"))


def test_width_is_the_users_own():
    with pytest.raises(TemplateError, match=r"model\.width: expected none"):
        build(replace(spec("plain"), width=16))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in_groups", r"layer '2': groups: expected 1, got 4"),
        ("gelu", r"layer '3': GELU cannot be packed"),
        ("nothing", r"cannot import 'tests\.networks\.test_template:nothing'"),
    ],
)
def test_what_cannot_be_packed_is_named_before_anything_trains(name, message):
    model = {"backbone": f"tests.networks.test_template:{name}"}
    p = tiny.parse(
        model={**model, "width": None}, ensembles={"train": [{"name": "e", "members": 2}]}
    )
    with pytest.raises(ParamsError, match=message):
        check.check(p, GRAY.image, 4)
