"""Backbones of both papers, each with its FP32 twin, at the papers' width and at any other.

Every backbone is a `Backbone` of three parts: `stem` (the full-precision first block), `body` (the
binary layers) and `head` (the full-precision classifier). A builder describes both twins: where
`binarizer` is None it gives the FP32 one. Convolutions and dense layers have the same names and
shapes in both, so that a BNN starts from the FP32 weights by name.

`width` is the number of channels of the first convolution; all others follow in proportion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnncore.networks.binarize import BinaryActivation, BinaryConv2d, Shift
from bnncore.networks.imports import despite_torchvision, imported
from bnncore.networks.parts import Backbone, ConvHead, DenseHead, ModelSpec, NetworkError
from bnncore.networks.template import binarized
from bnncore.params import Binarizer


def _activation(binarizer: Binarizer) -> nn.Module:
    return (
        nn.Identity() if binarizer.activation == "float" else BinaryActivation(binarizer.activation)
    )


def _binary_conv(binarizer: Binarizer, *args: Any, **kwargs: Any) -> BinaryConv2d:
    return BinaryConv2d(
        *args, binarizer=binarizer.weight, stochastic=binarizer.stochastic, **kwargs
    )


def _stem(channels: int, width: int, kernel: int, bias: bool) -> nn.Sequential:
    stem = nn.Sequential()
    stem.add_module("conv", nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=bias))
    stem.add_module("norm", nn.BatchNorm2d(width))
    stem.add_module("act", nn.ReLU(inplace=True))
    return stem


class Unit(nn.Sequential):
    """One inner layer of a plain network.

    FP32: conv, BN, ReLU. Binary: BN, sign, binary conv, PReLU (Kim et al. 2022, Fig. 1B; PReLU
    with one slope).
    """

    def __init__(self, cin: int, cout: int, kernel: int, binarizer: Binarizer | None):
        super().__init__()
        shape = {"kernel_size": kernel, "padding": kernel // 2, "bias": True}
        if binarizer is None:
            self.add_module("conv", nn.Conv2d(cin, cout, **shape))  # type: ignore[arg-type]
            self.add_module("norm", nn.BatchNorm2d(cout))
            self.add_module("act", nn.ReLU(inplace=True))
        else:
            self.add_module("norm", nn.BatchNorm2d(cin))
            self.add_module("sign", _activation(binarizer))
            self.add_module("conv", _binary_conv(binarizer, cin, cout, **shape))
            self.add_module("act", nn.PReLU())


Layer = nn.Module | tuple[int, int]  # a pooling module, or (channels, kernel) of a `Unit`


def _plain(
    stem: nn.Module,
    layers: Sequence[Layer],
    head: Callable[[int], nn.Module],
    cin: int,
    binarizer: Binarizer | None,
) -> Backbone:
    """A chain of `Unit`s (cout, kernel) and pooling modules between stem and head."""
    body = nn.Sequential()
    count = 0
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Module):
            body.add_module(f"pool{index}", layer)
        else:
            cout, kernel = layer
            count += 1
            body.add_module(f"unit{count}", Unit(cin, cout, kernel, binarizer))
            cin = cout
    if binarizer is not None:
        body.add_module("norm", nn.BatchNorm2d(cin))
    return Backbone(stem, body, head(cin))


def nin(
    channels: int, classes: int, width: int, dropout: float, binarizer: Binarizer | None
) -> Backbone:
    """Network in Network: no dense layer, no shortcuts, every convolution with a bias.

    Layer shapes as the sizes of TentacleNet's Tables 1 and 2 require. The batch norm behind the
    last binary layer is assumed; the papers' sizes do not count it. `dropout` is not used: there
    is no dense layer to drop in front of.
    """
    a, b = round(width * 160 / 192), round(width * 96 / 192)
    layers: list[Layer] = [
        (a, 1), (b, 1), nn.MaxPool2d(3, 2, 1),
        (width, 5), (width, 1), (width, 1), nn.AvgPool2d(3, 2, 1),
        (width, 3), (width, 1),
    ]  # fmt: skip
    stem = _stem(channels, width, 5, bias=True)
    return _plain(stem, layers, lambda k: ConvHead(k, classes), width, binarizer)


def fernet(
    channels: int, classes: int, width: int, dropout: float, binarizer: Binarizer | None
) -> Backbone:
    """FerNet: nine 3x3 convolutions with biases and a dense layer of 4 * width features.

    The paper gives no drawing; the shapes follow from its sizes. Max pooling 2x2 behind the last
    layer of width 1 and of width 2 is assumed.
    """
    w1, w2, w4 = width, 2 * width, 4 * width
    layers: list[Layer] = [
        (w1, 3), (w1, 3), nn.MaxPool2d(2, 2),
        (w2, 3), (w2, 3), (w2, 3), nn.MaxPool2d(2, 2),
        (w4, 3), (w4, 3), (w4, 3),
    ]  # fmt: skip
    stem = _stem(channels, width, 3, bias=True)
    return _plain(stem, layers, lambda k: DenseHead(k, classes, dropout), width, binarizer)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and one shortcut.

    FP32: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`` (He et al. 2016). Binary: BN, sign,
    conv (stride), PReLU, BN, sign, conv, PReLU, BN, add, PReLU (Kim et al. 2022, Fig. 3, with the
    order of its published model); one slope a PReLU.

    Args:
        shortcut: the module on the shortcut path.
    """

    def __init__(
        self, cin: int, cout: int, stride: int, shortcut: nn.Module, binarizer: Binarizer | None
    ):
        super().__init__()
        self.binary = binarizer is not None
        if binarizer is None:
            self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(cout)
            self.act1: nn.Module = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(cout)
        else:
            self.norm1 = nn.BatchNorm2d(cin)
            self.sign1 = _activation(binarizer)
            self.conv1 = _binary_conv(binarizer, cin, cout, 3, stride, 1, bias=False)
            self.act1 = nn.PReLU()
            self.norm2 = nn.BatchNorm2d(cout)
            self.sign2 = _activation(binarizer)
            self.conv2 = _binary_conv(binarizer, cout, cout, 3, 1, 1, bias=False)
            self.act2 = nn.PReLU()
            self.norm3 = nn.BatchNorm2d(cout)
        self.shortcut = shortcut
        self.act = nn.PReLU() if self.binary else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.binary:
            h = self.act1(self.conv1(self.sign1(self.norm1(x))))
            h = self.norm3(self.act2(self.conv2(self.sign2(self.norm2(h)))))
        else:
            h = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act(h + self.shortcut(x))


def _conv_shortcut(cin: int, cout: int, stride: int, binarizer: Binarizer | None) -> nn.Module:
    """FP32 1x1 convolution (stride) and BN where shapes change (Kim et al. 2022, Fig. 3B)."""
    if stride == 1 and cin == cout:
        return nn.Identity()
    shortcut = nn.Sequential()
    shortcut.add_module("conv", nn.Conv2d(cin, cout, 1, stride, bias=False))
    shortcut.add_module("norm", nn.BatchNorm2d(cout))
    return shortcut


class _Doubling(nn.Module):
    """Channels twice over: (B, C, H, W) to (B, 2C, H, W), without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), dim=1)


def _doubled_shortcut(cin: int, cout: int, stride: int, binarizer: Binarizer | None) -> nn.Module:
    """ResNet9's shortcut: channels doubled, then a 1x1 convolution, binary in the BNN.

    TentacleNet's sizes ask for 2C x 2C weights; the average pooling is assumed.
    """
    if stride == 1 and cin == cout:
        return nn.Identity()
    shortcut = nn.Sequential()
    shortcut.add_module("pool", nn.AvgPool2d(stride, stride, ceil_mode=True))
    shortcut.add_module("doubled", _Doubling())
    if binarizer is None:
        shortcut.add_module("conv", nn.Conv2d(cout, cout, 1, bias=False))
    else:
        shortcut.add_module("norm1", nn.BatchNorm2d(cout))
        shortcut.add_module("sign", _activation(binarizer))
        shortcut.add_module("conv", _binary_conv(binarizer, cout, cout, 1, bias=False))
    shortcut.add_module("norm", nn.BatchNorm2d(cout))
    return shortcut


def _stages(
    make: Callable[[int, int, int], nn.Module], width: int, blocks: tuple[int, ...]
) -> tuple[nn.Sequential, int]:
    """Stages of blocks, the width doubling and the map halving from one to the next."""
    body = nn.Sequential()
    cin = width
    for s, count in enumerate(blocks):
        cout = width * 2**s
        stage = nn.Sequential()
        for b in range(count):
            stage.add_module(f"block{b + 1}", make(cin, cout, 2 if s > 0 and b == 0 else 1))
            cin = cout
        body.add_module(f"layer{s + 1}", stage)
    return body, cin


def _residual(
    blocks: tuple[int, ...],
    shortcut: Callable[[int, int, int, Binarizer | None], nn.Module] = _conv_shortcut,
) -> Callable[..., Backbone]:
    def build(
        channels: int, classes: int, width: int, dropout: float, binarizer: Binarizer | None
    ) -> Backbone:
        def block(cin: int, cout: int, stride: int) -> nn.Module:
            return ResidualBlock(
                cin, cout, stride, shortcut(cin, cout, stride, binarizer), binarizer
            )

        body, features = _stages(block, width, blocks)
        head = DenseHead(features, classes, dropout)
        return Backbone(_stem(channels, width, 3, bias=False), body, head)

    return build


class ShortcutLayer(nn.Module):
    """One 3x3 convolution with a shortcut of its own.

    Binary, Bi-Real Net: ``bn(conv(sign(x))) + shortcut(x)`` (Liu et al. 2018, Fig. 3). With
    `react`: ``rprelu(bn(conv(rsign(x))) + shortcut(x))`` (Liu et al. 2020, Fig. 5), slopes one a
    channel. FP32 twin: ``relu(bn(conv(x)) + shortcut(x))``.
    """

    def __init__(self, cin: int, cout: int, stride: int, binarizer: Binarizer | None, react: bool):
        super().__init__()
        conv = (cin, cout, 3, stride, 1)
        self.sign: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()
        if binarizer is None:
            self.conv = nn.Conv2d(*conv, bias=False)
            self.act = nn.ReLU(inplace=True)
        else:
            self.conv = _binary_conv(binarizer, *conv, bias=False)
            self.sign = _activation(binarizer)
            if react:
                self.sign = nn.Sequential(Shift(cin), self.sign)
                self.act = nn.Sequential(Shift(cout), nn.PReLU(cout), Shift(cout))
        self.norm = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential()
            self.shortcut.add_module("pool", nn.AvgPool2d(stride, stride, ceil_mode=True))
            if react and binarizer is not None:
                # Kim et al. 2022 say that ReActNet-10's downsampling 1x1 convolutions are binary.
                self.shortcut.add_module("sign", nn.Sequential(Shift(cin), _activation(binarizer)))
                self.shortcut.add_module("conv", _binary_conv(binarizer, cin, cout, 1, bias=False))
            else:
                self.shortcut.add_module("conv", nn.Conv2d(cin, cout, 1, bias=False))
            self.shortcut.add_module("norm", nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.sign(x))) + self.shortcut(x))


def _shortcut_each(blocks: tuple[int, ...], react: bool) -> Callable[..., Backbone]:
    def build(
        channels: int, classes: int, width: int, dropout: float, binarizer: Binarizer | None
    ) -> Backbone:
        body, features = _stages(
            lambda cin, cout, stride: ShortcutLayer(cin, cout, stride, binarizer, react),
            width,
            blocks,
        )
        head = DenseHead(features, classes, dropout)
        return Backbone(_stem(channels, width, 3, bias=False), body, head)

    return build


# name -> (builder, width in the paper)
BACKBONES: dict[str, tuple[Callable[..., Backbone], int]] = {
    "nin": (nin, 192),
    "resnet9": (_residual((1, 1, 1, 1), _doubled_shortcut), 64),
    "fernet": (fernet, 32),
    "resnet8": (_residual((1, 1, 1)), 16),  # in neither paper: the smallest of its family
    "resnet20": (_residual((3, 3, 3)), 16),
    "resnet18": (_residual((2, 2, 2, 2)), 64),
    "birealnet18": (_shortcut_each((4, 4, 4, 4), react=False), 64),
    "reactnet10": (_shortcut_each((2, 2, 2, 2), react=True), 64),
}


def build(spec: ModelSpec) -> Backbone:
    """The network that `spec` describes, freshly initialised from torch's global generator.

    Raises:
        NetworkError: an unknown backbone (lists the known ones), or a user's that does not fit.
    """
    if spec.backbone in BACKBONES:
        builder, paper_width = BACKBONES[spec.backbone]
        width = spec.width or paper_width
        return builder(spec.image[2], spec.classes, width, spec.dropout, spec.binarizer)
    if ":" not in spec.backbone:
        raise NetworkError(
            f"model.backbone: expected one of {', '.join(BACKBONES)} or 'module:function', "
            f"got {spec.backbone!r}"
        )
    function = imported(spec.backbone, "model.backbone")
    try:
        inspect.signature(function).bind(spec.image[2], spec.classes)
    except (TypeError, ValueError) as error:
        raise NetworkError(
            f"model.backbone: expected {spec.backbone} to be a function of (channels, classes): "
            f"{error}"
        ) from None
    model = despite_torchvision(function, spec.image[2], spec.classes)
    return binarized(model, spec)
