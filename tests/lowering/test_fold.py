"""Folding: a threshold gives the bits of torch's own chain, at every input that can occur."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnncore.lowering.lower import LowerError, lower
from bnncore.networks.binarize import BinaryActivation, BinaryConv2d, Shift
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import Backbone
from bnncore.networks.sharing import SHARING
from bnncore.packed import execute
from bnncore.packed.program import unpack_bits
from tests import tiny

DATA = tiny.dataset((12, 12, 3), 5, train=20)
C, KERNEL = 8, 3
K = C * KERNEL**2


class Chain(nn.Module):
    """A map (B, C, H, W) through per-channel functions to bits, and one binary layer behind.

    With `conv` the functions follow the sums of a binary convolution, else they see floats.
    """

    def __init__(self, links: list[nn.Module], conv: BinaryConv2d | None):
        super().__init__()
        self.first = BinaryActivation() if conv is not None else nn.Identity()
        self.conv = conv or nn.Identity()
        self.links = nn.Sequential(*links)
        self.last = BinaryActivation()
        self.end = BinaryConv2d(C, C, 1, bias=False, binarizer="sign")

    def forward(self, x):
        return self.end(self.last(self.links(self.conv(self.first(x)))))

    def per_channel(self, x):
        """What the links make of sums or floats (1, C, N, 1)."""
        if isinstance(self.conv, BinaryConv2d):
            x = x * self.conv.binary()[1][:, None, None]
            x = x if self.conv.bias is None else x + self.conv.bias[:, None, None]
        return self.links(x)


def ensemble_of(links: list[nn.Module], integer: bool = True, bias: bool = True) -> Ensemble:
    """One such chain as the body of a one-member ensemble."""
    torch.manual_seed(0)
    conv = BinaryConv2d(C, C, KERNEL, padding=1, bias=bias) if integer else None
    stem, body, head = nn.Sequential(), nn.Sequential(), nn.Sequential()
    stem.add_module("conv", nn.Conv2d(3, C, 1))
    body.add_module("chain", Chain(links, conv))
    head.add_module("pool", nn.AdaptiveAvgPool2d(1))
    head.add_module("flat", nn.Flatten(1))
    head.add_module("dense", nn.Linear(C, 5))
    spec = EnsembleSpec(tiny.model("nin", C, DATA), 1, SHARING["no_shared"])
    ensemble = Ensemble(spec)
    ensemble.shared = []
    ensemble.members[0] = member = Backbone(stem, body, head)
    for p in member.parameters():
        nn.init.normal_(p, std=0.5)
    tiny.scramble(member, seed=11)
    return ensemble.eval()


def folded(ensemble: Ensemble):
    """The Program, its one threshold or interval node, and its tensors as arrays (C, 1)."""
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    (node,) = (n for n in program.nodes if n.op in ("threshold", "interval"))
    assert not any(n.op in ("affine", "sign", "prelu") and "last" in n.name for n in program.nodes)
    arrays = {}
    for slot, name in node.tensors.items():
        tensor = program.tensors[name]
        data = unpack_bits(tensor) if tensor.kind == "binary" else tensor.data
        arrays[slot] = data.reshape(C, 1)
    return program, node, arrays


def bits(node, arrays, x):
    """What the packed node gives for x (C, N), by its definition."""
    if node.op == "threshold":
        up = arrays.get("direction", np.ones((C, 1), bool))
        return np.where(up, x >= arrays["threshold"], x <= arrays["threshold"])
    between = (arrays["low"] <= x) & (x <= arrays["high"])
    return between == arrays.get("inside", np.ones((C, 1), bool))


def torchs(chain: Chain, x: np.ndarray) -> np.ndarray:
    """torch's values (C, N) for x (C, N)."""
    with torch.no_grad():
        maps = torch.from_numpy(x.astype(np.float32)).view(1, C, -1, 1).expand(-1, -1, -1, 4)
        return chain.per_channel(maps.contiguous())[0, :, :, 0].numpy()


def inputs(node, arrays, integer: bool) -> np.ndarray:
    """Every sum that can occur; or floats of all sizes, those around the thresholds among them."""
    if integer:
        return np.broadcast_to(np.arange(-K, K + 1), (C, 2 * K + 1))
    sizes = np.concatenate([[0, 1e-45, 1e-40], np.logspace(-38, 7, 91)]).astype(np.float32)
    x = np.broadcast_to(np.concatenate([-sizes, sizes]), (C, 2 * len(sizes)))
    if node.op != "threshold":
        return x
    level = arrays["threshold"].astype(np.float32)
    level = np.where(np.abs(level) < 1e7, level, 0)  # beyond: always or never
    near = [np.nextafter(level, np.float32(end)) for end in (-np.inf, np.inf)]
    return np.concatenate([x, level, *near], 1)


# Chains, with the op they fold to behind sums where slopes are negative.
CHAINS = {
    "norm": (lambda: [nn.BatchNorm2d(C)], "threshold"),
    "prelu norm": (lambda: [nn.PReLU(C), nn.BatchNorm2d(C)], "interval"),
    "norm prelu": (lambda: [nn.BatchNorm2d(C), nn.PReLU()], "threshold"),
    "rprelu": (lambda: [Shift(C), nn.PReLU(C), Shift(C)], "interval"),
    "relu norm": (lambda: [nn.ReLU(), nn.BatchNorm2d(C)], "threshold"),
    "relu6 norm": (lambda: [nn.ReLU6(), nn.BatchNorm2d(C), Shift(C)], "threshold"),
    "norm norm": (lambda: [nn.BatchNorm2d(C), nn.BatchNorm2d(C)], "threshold"),
    "norm prelu norm": (
        lambda: [nn.BatchNorm2d(C), nn.PReLU(C), nn.BatchNorm2d(C)],
        "interval",
    ),
    "nothing": (list, "threshold"),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("bias", [True, False])
def test_thresholds_over_popcounts_are_exact(chain, bias):
    links, op = CHAINS[chain]
    ensemble = ensemble_of(links(), bias=bias)
    program, node, arrays = folded(ensemble)
    assert node.op == op
    assert not any(n.op == "affine" for n in program.nodes)
    x = inputs(node, arrays, True)
    expected = torchs(ensemble.members[0].body.chain, x) >= 0
    assert np.array_equal(bits(node, arrays, x), expected)


# What training and pruning leave behind, beside what they usually do.
VALUES = (0.0, -0.0, 1e-40, -1e-40, 1e12, -1e12, 0.7, -0.7)


def _set(chain: Chain, roll: int, positive_slopes: bool) -> None:
    """Every channel of every scale and slope one of `VALUES`, each link in another order, so that
    with `roll` from 0 to 7 all pairs meet."""
    values = torch.tensor(VALUES)
    rng = torch.Generator().manual_seed(roll)
    for index, link in enumerate(chain.links):
        mine = values.roll(roll * index)
        if isinstance(link, nn.PReLU):
            mine = torch.where(mine < 0, -mine, mine) if positive_slopes else mine
            link.weight.data.copy_(mine[: link.num_parameters])
        elif isinstance(link, nn.BatchNorm2d):
            link.weight.data.copy_(mine)
            link.bias.data.copy_(torch.randn(C, generator=rng))
    if isinstance(chain.conv, BinaryConv2d):  # pruned filters: a scale of 0
        chain.conv.weight.data[roll] = 0


@pytest.mark.slow
@pytest.mark.parametrize("integer", [True, False], ids=["sums", "floats"])
@pytest.mark.parametrize("chain", [c for c in CHAINS if c != "nothing"])
def test_values_that_training_and_pruning_leave(chain, integer):
    """Scales and slopes of 0, denormal and huge ones: the bits of torch's chain."""
    for roll in range(len(VALUES)):
        ensemble = ensemble_of(CHAINS[chain][0](), integer)
        member = ensemble.members[0].body.chain
        _set(member, roll, positive_slopes=not integer)
        _, node, arrays = folded(ensemble)
        x = inputs(node, arrays, integer)
        expected = torchs(member, x)
        assert not np.isnan(expected).any()
        wrong = bits(node, arrays, x) != (expected >= 0)
        assert not wrong.any(), (roll, np.argwhere(wrong)[:3], x[wrong][:3])


def test_a_value_that_overflows_into_nan_is_refused_by_name():
    links = [nn.BatchNorm2d(C), nn.BatchNorm2d(C), nn.BatchNorm2d(C)]
    for link, scale in zip(links, (1e30, 1e30, 0.0), strict=True):
        link.weight.data.fill_(scale)
    for integer in (True, False):
        ensemble = ensemble_of(links, integer)
        for link, scale in zip(links, (1e30, 1e30, 0.0), strict=True):
            link.weight.data.fill_(scale)
        with pytest.raises(LowerError, match=r"'body\.chain\.links\.2' of member 0: .* got NaN"):
            lower(ensemble, DATA.mean, DATA.std, DATA.classes)


def test_negative_scales_flip_directions_and_positive_ones_need_none():
    ensemble = ensemble_of([nn.BatchNorm2d(C)])
    norm = ensemble.members[0].body.chain.links[0]
    _, node, arrays = folded(ensemble)
    assert np.array_equal(arrays["direction"][:, 0], (norm.weight > 0).numpy())
    norm.weight.data.abs_()
    _, node, arrays = folded(ensemble)
    assert set(node.tensors) == {"threshold"}


@pytest.mark.parametrize("links", [[nn.ReLU()], [nn.PReLU()], [nn.ReLU6(), nn.PReLU()]], ids=str)
def test_chains_that_do_not_tell_their_channels(links):
    """Nothing but one slope for all channels, behind a float: stays as it is, and is right."""
    ensemble = ensemble_of(links, integer=False)
    program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
    with torch.no_grad():
        z = ensemble(tiny.normalized(DATA, DATA.val.images)).numpy()
    ours = execute.Model(program, ops="numpy")(DATA.val.images)
    assert np.allclose(ours, z, atol=1e-4 * np.abs(z).max())


# -- whole networks --------------------------------------------------------------------------------

NETWORKS = ("nin", "fernet", "resnet8", "birealnet18", "reactnet10")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", NETWORKS)
@pytest.mark.parametrize("where", ["scales", "slopes"])
def test_networks_with_such_values_give_torchs_labels(backbone, where):
    """Half of the channels pruned, or with denormal or huge scales; slopes of the same values."""
    kind = nn.BatchNorm2d if where == "scales" else nn.PReLU
    for value in (0.0, -0.0, 1e-40, -1e-40, 1e4, -1e4):
        spec = EnsembleSpec(tiny.model(backbone, C, DATA), 1, SHARING["no_shared"])
        ensemble = Ensemble(spec, seed=1)
        tiny.scramble(ensemble, seed=5)
        for module in ensemble.members[0].body.modules():
            if isinstance(module, kind):
                module.weight.data[::2] = value
        images = np.concatenate([DATA.train.images, DATA.val.images])
        with torch.no_grad():
            z = ensemble.eval()(tiny.normalized(DATA, images)).numpy()
        assert np.isfinite(z).all()
        program = lower(ensemble, DATA.mean, DATA.std, DATA.classes)
        for ops in ("numpy", "compiled") if value in (0, 1e4) else ("numpy",):
            ours = execute.Model(program, ops=ops)(images)
            apart = np.abs(ours - z).max(1) > 1e-4 * np.abs(z).max()
            assert apart.sum() <= 1, (value, ops, int(apart.sum()))
            assert (ours.argmax(1) != z.argmax(1)).sum() <= apart.sum(), (value, ops)
