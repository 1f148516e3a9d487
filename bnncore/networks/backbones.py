"""Backbones of both papers, each with its FP32 twin, at the papers' width and at any other.

Every backbone is a `Backbone` of three parts: `stem` (the first block), `body` (the binary layers)
and `head` (the classifier); `Binarizer` says whether stem and head are binary, too. A builder
describes both twins: where `binarizer` is None it gives the FP32 one. Convolutions and dense layers
have the same names and shapes in both, so that a BNN starts from the FP32 weights by name.

`width` is the number of channels of the first convolution; all others follow in proportion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bnncore.networks.binarize import edge_conv, inner_act, inner_conv, inner_sign
from bnncore.networks.imports import despite_torchvision, imported
from bnncore.networks.parts import Backbone, ConvHead, DenseHead, ModelSpec, NetworkError
from bnncore.networks.template import binarized
from bnncore.params import Binarizer


def _stem(
    channels: int, width: int, kernel: int, bias: bool, binarizer: Binarizer | None
) -> nn.Sequential:
    stem = nn.Sequential()
    stem.add_module("conv", edge_conv(binarizer, "stem", channels, width, kernel, bias))
    stem.add_module("norm", nn.BatchNorm2d(width))
    stem.add_module("act", nn.ReLU(inplace=True))
    return stem


def _dense_head(
    features: int, classes: int, dropout: float, binarizer: Binarizer | None
) -> DenseHead:
    if binarizer is not None and binarizer.head != "float":
        raise NetworkError(
            "model.binarizer.head: expected float with a backbone that ends in a dense layer, got "
            f"{binarizer.head!r}; nin and the lean ones end in a convolution"
        )
    return DenseHead(features, classes, dropout)


def _conv_head(
    features: int, classes: int, binarizer: Binarizer | None, norm: bool = False
) -> ConvHead:
    """With binary weights, and in all lean networks, a norm gives each class a scale and a bias."""
    norm = norm or (binarizer is not None and binarizer.head == "binary")
    conv = edge_conv(binarizer, "head", features, classes, 1, not norm)
    return ConvHead(conv, nn.BatchNorm2d(classes) if norm else None)


class Unit(nn.Sequential):
    """One inner layer of a plain network.

    FP32: conv, BN, ReLU. Binary: BN, sign, binary conv, PReLU (Kim et al. 2022, Fig. 1B; PReLU
    with one slope), or none in a `lean` one, whose convolution has no bias.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        binarizer: Binarizer | None,
        stride: int = 1,
        lean: bool = False,
    ):
        super().__init__()
        shape = (cin, cout, kernel, stride, kernel // 2)
        if binarizer is None:
            self.add_module("conv", nn.Conv2d(*shape, bias=not lean))
            self.add_module("norm", nn.BatchNorm2d(cout))
            self.add_module("act", nn.ReLU(inplace=True))
        else:
            self.add_module("norm", nn.BatchNorm2d(cin))
            self.add_module("sign", inner_sign(binarizer, cin))
            self.add_module("conv", inner_conv(binarizer, *shape, bias=not lean))
            self.add_module("act", inner_act(binarizer, cout, "none" if lean else "slope"))


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
    stem = _stem(channels, width, 5, True, binarizer)
    return _plain(stem, layers, lambda k: _conv_head(k, classes, binarizer), width, binarizer)


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
    stem = _stem(channels, width, 3, True, binarizer)

    def head(features: int) -> nn.Module:
        return _dense_head(features, classes, dropout, binarizer)

    return _plain(stem, layers, head, width, binarizer)


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
            self.sign1 = inner_sign(binarizer, cin)
            self.conv1 = inner_conv(binarizer, cin, cout, 3, stride, 1, bias=False)
            self.act1 = inner_act(binarizer, cout, "slope")
            self.norm2 = nn.BatchNorm2d(cout)
            self.sign2 = inner_sign(binarizer, cout)
            self.conv2 = inner_conv(binarizer, cout, cout, 3, 1, 1, bias=False)
            self.act2 = inner_act(binarizer, cout, "slope")
            self.norm3 = nn.BatchNorm2d(cout)
        self.shortcut = shortcut
        self.act = (
            nn.ReLU(inplace=True) if binarizer is None else inner_act(binarizer, cout, "slope")
        )

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
        shortcut.add_module("sign", inner_sign(binarizer, cout))
        shortcut.add_module("conv", inner_conv(binarizer, cout, cout, 1, bias=False))
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
        head = _dense_head(features, classes, dropout, binarizer)
        return Backbone(_stem(channels, width, 3, False, binarizer), body, head)

    return build


class ShortcutLayer(nn.Module):
    """One 3x3 convolution with a shortcut of its own.

    Binary, Bi-Real Net: ``bn(conv(sign(x))) + shortcut(x)`` (Liu et al. 2018, Fig. 3). With
    `react`: ``rprelu(bn(conv(rsign(x))) + shortcut(x))`` (Liu et al. 2020, Fig. 5). FP32 twin:
    ``relu(bn(conv(x)) + shortcut(x))``.
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
            self.conv = inner_conv(binarizer, *conv, bias=False)
            self.sign = inner_sign(binarizer, cin, shift=react)
            self.act = inner_act(binarizer, cout, "rprelu" if react else "none")
        self.norm = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential()
            self.shortcut.add_module("pool", nn.AvgPool2d(stride, stride, ceil_mode=True))
            if react and binarizer is not None:
                # Kim et al. 2022 say that ReActNet-10's downsampling 1x1 convolutions are binary.
                self.shortcut.add_module("sign", inner_sign(binarizer, cin, shift=True))
                self.shortcut.add_module("conv", inner_conv(binarizer, cin, cout, 1, bias=False))
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
        head = _dense_head(features, classes, dropout, binarizer)
        return Backbone(_stem(channels, width, 3, False, binarizer), body, head)

    return build


class LeanLayer(nn.Module):
    """One 3x3 convolution and a shortcut that holds nothing: a layer made for few bytes.

    Binary: ``conv(sign(bn(x))) + shortcut(x)``, Bi-Real Net's shortcut around every convolution
    (Liu et al. 2018) in the order of He et al. 2016 (pre-activation), so that the norm folds into
    one threshold a channel, and without scales (``weight: sign``) the sums stay whole numbers. FP32
    twin: ``conv(relu(bn(x))) + shortcut(x)``. Where shapes change, the shortcut averages 2x2 and
    gives each channel twice.
    """

    def __init__(self, cin: int, cout: int, stride: int, binarizer: Binarizer | None):
        super().__init__()
        conv = (cin, cout, 3, stride, 1)
        self.norm = nn.BatchNorm2d(cin)
        self.act: nn.Module = nn.Identity()
        if binarizer is None:
            self.sign: nn.Module = nn.ReLU(inplace=True)
            self.conv = nn.Conv2d(*conv, bias=False)
        else:
            self.sign = inner_sign(binarizer, cin)
            self.conv = inner_conv(binarizer, *conv, bias=False)
            self.act = inner_act(binarizer, cout, "none")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential()
            self.shortcut.add_module("pool", nn.AvgPool2d(stride, stride, ceil_mode=True))
            self.shortcut.add_module("doubled", _Doubling())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.sign(self.norm(x))) + self.shortcut(x))


def _lean(blocks: tuple[int, ...], layer: Callable[..., nn.Module]) -> Callable[..., Backbone]:
    """A network whose file is little more than its bits: no biases, no ReLU behind the stem, a
    convolution as head. `dropout` is not used."""

    def build(
        channels: int, classes: int, width: int, dropout: float, binarizer: Binarizer | None
    ) -> Backbone:
        stem = _stem(channels, width, 3, False, binarizer)[:2]
        body, features = _stages(partial(layer, binarizer=binarizer), width, blocks)
        return Backbone(stem, body, _conv_head(features, classes, binarizer, norm=True))

    return build


def _lean_unit(cin: int, cout: int, stride: int, binarizer: Binarizer | None) -> Unit:
    return Unit(cin, cout, 3, binarizer, stride, lean=True)


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
    # made for bytes, in neither paper: shapes of resnet8 and resnet20
    "leanresnet8": (_lean((2, 2, 2), LeanLayer), 16),
    "leanresnet20": (_lean((6, 6, 6), LeanLayer), 16),
    "leanplain": (_lean((2, 2, 2), _lean_unit), 16),
}


BENT = (nn.ReLU, nn.PReLU, nn.MaxPool2d)  # what is not linear, but signs


def build(spec: ModelSpec) -> Backbone:
    """The network that `spec` describes, freshly initialised from torch's global generator.

    Raises:
        NetworkError: an unknown backbone (lists the known ones), or a user's that does not fit.
    """
    if spec.backbone in BACKBONES:
        builder, paper_width = BACKBONES[spec.backbone]
        width = spec.width or paper_width
        network = builder(spec.image[2], spec.classes, width, spec.dropout, spec.binarizer)
        binarizer = spec.binarizer
        if binarizer is None or binarizer.activation != "float":
            return network
        if not any(isinstance(m, BENT) for m in network.body.modules()):
            raise NetworkError(
                f"model.binarizer.act: expected prelu, rprelu or null with activation float, "
                f"without which {spec.backbone} is linear, got {binarizer.act}"
            )
        return network
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
