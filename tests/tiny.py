"""Small things for the training tests: a data set, parameters, networks with random statistics."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bnncore import params as P
from bnncore.data import Dataset, Split, moments
from bnncore.networks.binarize import Shift
from bnncore.networks.ensemble import Ensemble, EnsembleSpec
from bnncore.networks.parts import ModelSpec
from bnncore.networks.sharing import SHARING, Sharing


def dataset(
    image: tuple[int, int, int] = (8, 8, 1), classes: int = 4, train: int = 48, seed: int = 0
) -> Dataset:
    """Noise around one random picture a class: easy to learn, never perfectly."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (classes, *image))

    def split(n: int) -> Split:
        labels = rng.permutation(np.arange(n) % classes).astype(np.int64)
        noisy = pictures[labels] + rng.normal(0, 80, (n, *image))
        return Split(np.clip(noisy, 0, 255).astype(np.uint8), labels)

    parts = [split(n) for n in (train, 16, 16)]
    mean, std = moments(parts[0].images)
    return Dataset("tiny", tuple("abcdefghij"[:classes]), *parts, mean, std)


def model(backbone: str = "resnet8", width: int = 8, data: Dataset | None = None, **changes):
    """A `ModelSpec`; a BNN unless ``binarizer=None``."""
    image, classes = (data.image, len(data.classes)) if data else ((8, 8, 1), 4)
    values = {"binarizer": P.Binarizer(), **changes}
    return ModelSpec(backbone, image, classes, width, **values)


def ensemble(
    members: int = 2, sharing: str | Sharing = "shared_conv", combine: str = "mean", **changes
) -> Ensemble:
    """A fresh ensemble of small members."""
    spec = changes.pop("spec", None)
    if spec is None:
        classifier = changes.pop("classifier", None)
        row = SHARING[sharing] if isinstance(sharing, str) else sharing
        spec = EnsembleSpec(model(**changes), members, row, combine, classifier)
    return Ensemble(spec, seed=3)


@torch.no_grad()
def scramble(network: nn.Module, seed: int = 0) -> None:
    """Random statistics, scales of both signs and slopes of both signs, as training may give."""
    rng = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, spread: float, centre: float = 0.0) -> torch.Tensor:
        return centre + spread * torch.randn(like.shape, generator=rng)

    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.copy_(normal(module.weight, 1.0))
            module.bias.copy_(normal(module.bias, 0.5))
            module.running_mean.copy_(normal(module.running_mean, 0.5))
            module.running_var.copy_(normal(module.running_var, 1.0).abs() + 0.3)
        elif isinstance(module, nn.PReLU):
            module.weight.copy_(normal(module.weight, 0.5))
        elif isinstance(module, Shift):
            module.shift.copy_(normal(module.shift, 0.5))


def normalized(data: Dataset, images: np.ndarray) -> torch.Tensor:
    """uint8 (N,H,W,C) as the networks take them: float (N,C,H,W), by an independent formula."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    mean = torch.tensor(data.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(data.std, dtype=torch.float64)[:, None, None]
    return ((x - mean) / std).float()


def parse(**sections) -> P.Params:
    """Parameters of a very short run."""
    short = {"epochs": 2, "batch_size": 16, "lr": 0.01}
    values = {
        "model": {"backbone": "resnet8", "width": 8},
        "pretrain": dict(short),
        "binarize": dict(short),
        **sections,
    }
    ensembles = values.setdefault("ensembles", {})
    ensembles.setdefault("recipe", dict(short))
    return P.parse(values)
