"""The cheap layers are torch's layers: values, gradients and statistics, within rounding."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
from torch import nn

from benchmarks import training
from bnncore.networks.backbones import build
from bnncore.networks.binarize import BinaryActivation, BinaryConv2d, sign
from bnncore.networks.parts import Backbone
from bnncore.training import layers, memory
from bnncore.training.loop import Trainer
from tests import tiny


def _pair(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    other = copy.deepcopy(layer)
    layers.make_cheap(other)
    return layer, other


def _run(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(5, 3, 7, 4), (64, 16, 8, 8), (2, 9, 1, 1)])
def test_batch_norm(shape, offset, training):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(shape[1]).double().train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape[1]))
        layer.bias.copy_(torch.randn(shape[1]))
    x = torch.randn(shape).double() * 3 + offset
    upstream = torch.randn(shape).double()
    for a, b in zip(*(_run(one, x, upstream) for one in _pair(layer)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + offset))


def test_batch_norm_in_float32_is_as_exact_as_torchs():
    torch.manual_seed(0)
    x = torch.randn(64, 16, 16, 16) + 30
    layer, quick = _pair(nn.BatchNorm2d(16))
    exact = copy.deepcopy(layer).double()(x.double())
    errors = [(one(x) - exact).abs().max().item() for one in (layer, quick)]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5, 2.0])
def test_prelu(slope):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5).double()
    x[0, 0, 0] = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.0])
    upstream = torch.randn(x.shape).double()
    layer = nn.PReLU(init=slope).double()
    for a, b in zip(*(_run(one, x, upstream) for one in _pair(layer)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_one_value_a_channel_is_refused_as_by_torch():
    layer = nn.BatchNorm2d(3)
    layers.make_cheap(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.zeros(1, 3, 1, 1))


# -- layers of a binarized network ---------------------------------------------------------------


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_binary_layer_has_the_bits_of_the_plain_one(frozen, bias):
    torch.manual_seed(0)
    plain = nn.Sequential(BinaryActivation(), BinaryConv2d(6, 9, 3, 2, 1, bias=bias))
    plain[1].weight.requires_grad_(not frozen)
    quick = copy.deepcopy(plain)
    layers.make_cheap(quick)
    x = 1.5 * torch.randn(4, 6, 7, 5)
    x[0, 0, 0] = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0])
    upstream = torch.randn(4, 9, 4, 3)
    for a, b in zip(*(_run(one, x, upstream) for one in (plain, quick)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_less_is_kept_for_the_backward_pass():
    """A binary layer with frozen filters: its input, its output, and a byte a sign."""
    torch.manual_seed(0)
    layer = nn.Sequential(
        nn.BatchNorm2d(8), BinaryActivation(), BinaryConv2d(8, 8, 3, padding=1), nn.PReLU()
    )
    layer[2].requires_grad_(False)
    layers.make_cheap(layer)
    x = torch.randn(16, 8, 32, 32, requires_grad=True)
    layer(x)  # filters are binarized and kept
    with memory.Saved(layer) as saved:
        layer(x)
    floats = 4 * x.numel()
    small = 4 * 8 * 8 * 9 + 1000  # filters, statistics
    assert 2.25 * floats <= saved.bytes <= 2.25 * floats + small


# -- compilation ---------------------------------------------------------------------------------


def _gradients(network: Backbone, x: torch.Tensor, y: torch.Tensor, run) -> dict:
    h = network.stem(x).detach().requires_grad_()
    behind = Backbone(nn.Sequential(), network.body, network.head)
    nn.functional.cross_entropy(run(behind, h), y).backward()
    named = network.named_parameters()
    return {"h": h.grad, **{name: p.grad for name, p in named if p.grad is not None}}


def _margin(network: Backbone, x: torch.Tensor) -> float:
    """How far all inputs of functions with a jump or a kink are from it."""
    margins = []

    def look(module, inputs):
        (value,) = inputs
        points = (0.0, 1.0, -1.0) if isinstance(module, BinaryActivation) else (0.0,)
        for point in points:
            away = (value - point).abs()
            # Sums of products of +-1 that are 0 are 0 in any order, and with any precision.
            margins.append(away[away > 0].min().item())

    kinds = (BinaryActivation, nn.PReLU)
    hooks = [m.register_forward_pre_hook(look) for m in network.modules() if isinstance(m, kinds)]
    network(x)
    for hook in hooks:
        hook.remove()
    return min(margins)


@pytest.mark.timeout(3600)  # a compiler suffers beside other work
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param("float32", 2e-3, marks=pytest.mark.slow),
        pytest.param("float64", 1e-9, marks=pytest.mark.soak),  # test_compile has whole networks
    ],
)
def test_compiled_gradients_are_those_of_plain_autograd_in_float64(dtype, tolerance):
    """Where no value is so near to a jump that rounding decides, as it else may.

    The tolerance is that of a slope's gradient: a sum over all values, most of which cancels.
    """
    torch.manual_seed(1)
    network = build(tiny.model())
    # One block with every kind of layer; compiling more of them takes minutes.
    network.body, network.head.dense = network.body.layer2, nn.Linear(16, 4)
    tiny.scramble(network)
    network.body.block1.conv1.requires_grad_(False)
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    exact = copy.deepcopy(network).double().train()
    assert _margin(copy.deepcopy(exact), x.double()) > 2e-5
    expected = _gradients(exact, x.double(), y, Backbone.forward)
    number = getattr(torch, dtype)
    network = network.to(number).train()
    # Another member, with the same frozen filters: one compilation serves both.
    other = copy.deepcopy(network)
    tiny.scramble(other, seed=1)
    other.body.block1.conv1 = network.body.block1.conv1
    theirs = copy.deepcopy(other).double()
    both = ((network, expected), (other, _gradients(theirs, x.double(), y, Backbone.forward)))
    assert _margin(copy.deepcopy(theirs), x.double()) > 2e-5
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = layers.compiled(network, len(x), network)
    with torch._inductor.config.patch(compile_threads=1):
        for member, wanted in both:
            got = _gradients(member, x.to(number), y, run)
            assert got.keys() == wanted.keys()
            for name, gradient in got.items():
                apart = (gradient - wanted[name]).norm() / wanted[name].norm()
                assert apart < tolerance, f"{name}: {apart:.2g}"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_loaded_frozen_filters_reach_a_compiled_graph():
    """A graph reads the binarized filters, which must follow the weights that are loaded."""
    work = training.job("resnet8", 1, width=8)
    trainer = Trainer(work, training.dataset(4), device="cpu")
    negative = {name: -value for name, value in work.start.items()}
    trainer.load(negative)
    layer = trainer.ensemble.members[0].body.layer1.block1.conv1
    assert layer._frozen is not None
    signs, _ = layer._frozen[1]
    assert torch.equal(signs, sign(negative["shared.body.layer1.block1.conv1.weight"]))


# -- exact sums ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(1, 10))
def test_sums_of_signs_are_integers(width):
    """In convolutions of 1 to 9 filters over batches of 1 to 33 images, and in their gradients:
    where the sum is 0, the sign behind must not be left to chance."""
    rng = torch.Generator().manual_seed(width)

    def signs(*shape: int) -> torch.Tensor:
        return sign(torch.randn(shape, generator=rng))

    for kernel, stride in ((3, 1), (3, 2), (1, 1), (5, 1)):
        conv = nn.Conv2d(width, width, kernel, stride, kernel // 2, bias=False)
        conv.weight.data = signs(*conv.weight.shape)
        exact = copy.deepcopy(conv).double()
        for batch in range(1, 34):
            x = signs(batch, width, 8, 8)
            upstream = signs(*exact(x.double()).shape)
            conv.zero_grad()
            exact.zero_grad()
            with layers.exact_convolutions(conv):
                ours = _run(conv, x, upstream)
            theirs = _run(exact, x.double(), upstream.double())
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a.double(), b), f"kernel {kernel}, stride {stride}, {batch}"


@pytest.mark.parametrize("width", [4, 8])
def test_gradients_at_ties_are_exact(width):
    """A binary layer behind a binary layer: whether a sum is 0 decides about its sign."""
    torch.manual_seed(0)
    shape = (width, width, 3, 1, 1)
    convs = [BinaryConv2d(*shape, bias=False, binarizer="sign") for _ in range(2)]
    network = nn.Sequential(BinaryActivation(), convs[0], BinaryActivation(), convs[1])
    exact = copy.deepcopy(network).double()
    x, upstream = torch.randn(33, width, 8, 8), torch.randint(-3, 4, (33, width, 8, 8))
    sums = exact[:2](x.double())
    assert (sums == 0).double().mean() > 0.05
    with layers.exact_convolutions(network):
        ours = _run(network, x, upstream.float())
    for a, b in zip(ours, _run(exact, x.double(), upstream.double()), strict=True):
        assert torch.equal(a.double(), b)


@pytest.mark.parametrize(("width", "onednn"), [(7, False), (8, True)])
def test_the_switches_are_back_where_they_were(width, onednn):
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, width, 3))
    nnpack = torch._C._get_nnpack_enabled()
    with pytest.raises(KeyError), layers.exact_convolutions(network):  # noqa: PT012
        assert torch.backends.mkldnn.enabled == onednn
        assert not torch._C._get_nnpack_enabled()
        raise KeyError
    assert torch.backends.mkldnn.enabled
    assert torch._C._get_nnpack_enabled() == nnpack
