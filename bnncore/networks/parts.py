"""What every network is made of: the three parts of a backbone, heads, dropout, `ModelSpec`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnncore.errors import UserError
from bnncore.params import Binarizer


class NetworkError(UserError, ValueError):
    """A network that cannot be built as it was asked for; names the parameter or the layer."""


class Backbone(nn.Module):
    """``mix(head(body(stem(x))))``: images (B, C, H, W), float, to logits (B, classes).

    `mix` is the identity, but for a tentacle whose logits are concatenated (`ensemble`).
    `shortcuts` names the layers on shortcuts that are not below a module called ``shortcut``.
    """

    shortcuts: frozenset[str] = frozenset()

    def __init__(self, stem: nn.Module, body: nn.Module, head: nn.Module):
        super().__init__()
        self.stem = stem
        self.body = body
        self.head = head
        self.mix: nn.Module = nn.Identity()

    def tentacle(self, h: Tensor) -> Tensor:
        """Everything behind the stem: (B, C', H', W') to logits (B, classes)."""
        return self.mix(self.head(self.body(h)))

    def forward(self, x: Tensor) -> Tensor:
        return self.tentacle(self.stem(x))


class DenseHead(nn.Module):
    """Global average pooling, dropout, dense layer: (B, K, H, W) to (B, classes)."""

    def __init__(self, features: int, classes: int, dropout: float):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = Dropout(dropout)
        self.dense = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.dropout(torch.flatten(self.pool(x), 1)))


class ConvHead(nn.Module):
    """1x1 convolution and global average pooling, no dense layer: (B, K, H, W) to (B, classes)."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None = None):
        super().__init__()
        self.conv = conv
        self.norm = norm or nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.pool(self.norm(self.conv(x))), 1)


class Dropout(nn.Module):
    """Dropout whose masks come from a generator of its own.

    A mask then depends on the member's seed, the epoch and the step only, not on the process that
    trains the member or on what was trained before it; so training split over actors, replayed or
    resumed draws the same masks.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep / (1 - self.p)


@dataclass(frozen=True)
class ModelSpec:
    """What to build: plain data, so that any process can build the same network.

    Attributes:
        backbone: a key of `BACKBONES`, or ``module:function`` that takes (channels, classes) and
            returns a plain FP32 torch model.
        image: (H, W, C) of the images.
        classes: number of classes.
        width: channels of the first convolution; None for the paper's.
        dropout: probability in front of the dense layer.
        binarizer: None for the FP32 twin.
    """

    backbone: str
    image: tuple[int, int, int]
    classes: int
    width: int | None = None
    dropout: float = 0.0
    binarizer: Binarizer | None = None
