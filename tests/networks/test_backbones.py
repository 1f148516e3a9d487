"""Backbones: the layers that the papers' sizes call for, twins, and other widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bnncore.networks.backbones import BACKBONES, build
from bnncore.networks.binarize import BinaryConv2d
from bnncore.networks.parts import Dropout, ModelSpec, NetworkError
from bnncore.networks.sharing import weight_layers
from bnncore.params import Binarizer
from tests import tiny


def network(backbone, image=(32, 32, 3), classes=10, width=None, binarizer=Binarizer()):  # noqa: B008
    with torch.device("meta"):
        return build(ModelSpec(backbone, image, classes, width, binarizer=binarizer))


def shapes(net, kind=None):
    """(input channels, output channels, kernel) of the convolutions, in order."""
    found = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    if kind is not None:
        found = [m for m in found if isinstance(m, BinaryConv2d) == (kind == "binary")]
    return [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in found]


def test_nin_is_the_papers():
    net = network("nin")
    assert shapes(net, "binary") == [
        (192, 160, 1), (160, 96, 1), (96, 192, 5), (192, 192, 1), (192, 192, 1),
        (192, 192, 3), (192, 192, 1),
    ]  # fmt: skip
    assert shapes(net, "fp32") == [(3, 192, 5), (192, 10, 1)]
    assert all(m.bias is not None for m in weight_layers(net).values())


def test_fernet_is_the_papers():
    net = network("fernet", (48, 48, 1), 7)
    assert shapes(net, "binary") == [
        (32, 32, 3), (32, 32, 3), (32, 64, 3), (64, 64, 3), (64, 64, 3),
        (64, 128, 3), (128, 128, 3), (128, 128, 3),
    ]  # fmt: skip
    assert shapes(net, "fp32") == [(1, 32, 3)]
    assert net.head.dense.weight.shape == (7, 128)
    assert all(m.bias is not None for m in weight_layers(net).values())


def test_resnet9_is_the_papers():
    net = network("resnet9", classes=100)
    shortcuts = [m for n, m in weight_layers(net).items() if ".shortcut." in n]
    assert sum(m.weight.numel() for m in shortcuts) == 128**2 + 256**2 + 512**2
    assert all(isinstance(m, BinaryConv2d) for m in shortcuts)
    assert len(shapes(net)) == 1 + 8 + 3
    assert net.head.dense.bias is not None


@pytest.mark.parametrize(
    ("backbone", "blocks", "width"), [("resnet20", (3, 3, 3), 16), ("resnet18", (2, 2, 2, 2), 64)]
)
def test_residual_networks_are_the_papers(backbone, blocks, width):
    net = network(backbone)
    expected, cin = [(3, width, 3)], width
    for stage, count in enumerate(blocks):
        cout = width * 2**stage
        for block in range(count):
            expected += [(cin, cout, 3), (cout, cout, 3)]
            expected += [(cin, cout, 1)] if stage and not block else []
            cin = cout
    assert shapes(net) == expected
    assert len(shapes(net, "fp32")) == len(blocks)  # the first, and the 1x1 shortcuts
    assert {m.weight.numel() for m in net.modules() if isinstance(m, nn.PReLU)} == {1}


@pytest.mark.parametrize(("backbone", "layers"), [("birealnet18", 16), ("reactnet10", 8)])
def test_networks_with_a_shortcut_each(backbone, layers):
    net = network(backbone)
    main = [m for n, m in weight_layers(net).items() if n.startswith("body") and "short" not in n]
    downs = [m for n, m in weight_layers(net).items() if ".shortcut." in n]
    assert len(main) == layers
    assert all(isinstance(m, BinaryConv2d) for m in main)
    assert [m.out_channels for m in downs] == [128, 256, 512]
    # Bi-Real Net downsamples in FP32, ReActNet with binary 1x1 convolutions
    assert {isinstance(m, BinaryConv2d) for m in downs} == {backbone == "reactnet10"}
    slopes = [m.weight.numel() for m in net.modules() if isinstance(m, nn.PReLU)]
    assert slopes == ([64] * 2 + [128] * 2 + [256] * 2 + [512] * 2 if "react" in backbone else [])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_twins_share_names_and_shapes_of_weights(backbone):
    bnn = weight_layers(network(backbone, width=8))
    fp32 = weight_layers(network(backbone, width=8, binarizer=None))
    assert [(n, m.weight.shape) for n, m in bnn.items()] == [
        (n, m.weight.shape) for n, m in fp32.items()
    ]
    assert not any(isinstance(m, BinaryConv2d) for m in fp32.values())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "binarizer",
    [
        None,
        Binarizer(),
        Binarizer("learned", "float"),
        Binarizer("sign", shift=True, act="rprelu", stem="binary"),
    ],
)
def test_every_backbone_runs_and_every_parameter_gets_a_gradient(backbone, binarizer):
    torch.manual_seed(0)
    data = tiny.dataset((16, 12, 3), 5)
    net = build(tiny.model(backbone, 6, data, binarizer=binarizer))
    logits = net(torch.randn(3, 3, 16, 12))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_body_is_linear(backbone):
    """Nor can it be made so: signs, or else something that is not linear."""
    for act in (None, "prelu", "none"):
        spec = tiny.model(backbone, 6, tiny.dataset((16, 12, 3), 5),
                          binarizer=Binarizer("sign", "float", act=act))  # fmt: skip
        if act == "none" and backbone not in ("nin", "fernet"):  # which pool by maxima
            with pytest.raises(NetworkError, match=f"act: expected prelu.*{backbone} is linear"):
                build(spec)
            continue
        net = build(spec).eval()
        a = net.stem(torch.randn(3, 3, 16, 12))
        b = torch.randn(a.shape)
        both = net.body(a) + net.body(b)
        apart = both - net.body(a + b) - net.body(torch.zeros_like(a))
        assert apart.abs().max() > 0.01 * both.abs().max()


@pytest.mark.parametrize(("backbone", "layers"), [("leanresnet8", 6), ("leanresnet20", 18)])
def test_a_lean_network_holds_little_more_than_its_bits(backbone, layers):
    lean = Binarizer("sign", stem="binary", head="binary")
    net = network(backbone, binarizer=lean)
    assert len(shapes(net, "binary")) == layers + 2
    assert not shapes(net, "fp32")
    assert not [n for n in weight_layers(net) if "shortcut" in n]
    norms = [m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    numbers = sum(p.numel() for n, p in net.named_parameters() if "conv" not in n)
    assert numbers == 2 * sum(norms)  # nothing else has numbers: no biases, scales or slopes
    # One norm in front of each inner convolution, which becomes a threshold; one behind each edge.
    assert norms == [16, *(m[0] for m in shapes(net)[1:-1]), 10]


def test_dropout_draws_from_its_own_generator():
    layer = Dropout(0.5)
    x = torch.ones(10_000)
    layer.generator = torch.Generator().manual_seed(0)
    first = layer(x)
    torch.rand(7)  # the global generator must not matter
    layer.generator = torch.Generator().manual_seed(0)
    assert torch.equal(layer(x), first)
    assert first.unique().tolist() == [0, 2]  # kept values are scaled by 1 / (1 - p)
    assert 0.45 < (first == 0).float().mean() < 0.55
    assert torch.equal(layer.eval()(x), x)


def test_unknown_backbone_lists_those_there_are():
    with pytest.raises(ValueError, match=r"expected one of nin, .*leanplain .* got 'resnet999'"):
        build(ModelSpec("resnet999", (8, 8, 1), 4))


@pytest.mark.parametrize("image", [(8, 8, 1), (12, 13, 1), (17, 5, 1)], ids=str)
@pytest.mark.parametrize(
    "backbone", ["resnet9", "resnet20", "birealnet18", "reactnet10", "leanresnet8"]
)
def test_shortcuts_meet_their_blocks_at_any_size(backbone, image):
    """Maps of unequal size would be broadcast without a word."""
    torch.manual_seed(0)
    net = build(tiny.model(backbone, 8, tiny.dataset(image))).eval()
    sizes = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, a, y, name=name: sizes.update({name: y.shape}))
    net(torch.randn(1, 1, *image[:2]))
    shortcuts = [n for n in sizes if n.endswith(".shortcut")]
    assert shortcuts
    for name in shortcuts:
        assert sizes[name] == sizes[name.removesuffix(".shortcut")], name
