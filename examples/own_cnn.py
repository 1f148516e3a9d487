"""Networks of one's own: plain torch models that parameters name as ``module:function``.

In params.yaml::

    model:
      backbone: examples.own_cnn:torchvision_resnet18
      width: null

trains torchvision's ResNet-18, unmodified, in full precision, binarizes it by the template (first
convolution and last layer stay as they are), makes ensembles of it and packs them, like any other
backbone. ``python -m examples.own_cnn`` shows, on random weights, what becomes of it.
"""

from __future__ import annotations

import torch
from torch import nn


def torchvision_resnet18(channels: int, classes: int) -> nn.Module:
    """torchvision's ResNet-18 as it is, for RGB images."""
    import torchvision

    if channels != 3:
        raise ValueError(f"torchvision_resnet18: expected images of 3 channels, got {channels}")
    return torchvision.models.resnet18(num_classes=classes)


class SmallCNN(nn.Module):
    """A network as one writes it without a thought for binarization."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        x = x.mean((2, 3)).view(x.size(0), -1)
        return self.classifier(self.dropout(x))


def small_cnn(channels: int, classes: int) -> nn.Module:
    """`SmallCNN` for any images."""
    return SmallCNN(channels, classes)


def main() -> None:
    import numpy as np

    from bnncore.lowering.lower import lower
    from bnncore.networks.binarize import BinaryConv2d
    from bnncore.networks.ensemble import Ensemble, EnsembleSpec
    from bnncore.networks.parts import ModelSpec
    from bnncore.networks.sharing import SHARING
    from bnncore.packed import execute
    from bnncore.params import Binarizer

    name = "examples.own_cnn:torchvision_resnet18"
    model = ModelSpec(name, (32, 32, 3), 10, binarizer=Binarizer())
    ensemble = Ensemble(EnsembleSpec(model, 2, SHARING["shared_conv"])).eval()
    binary = [m for m in ensemble.members[0].modules() if isinstance(m, BinaryConv2d)]
    print(f"{name}: {len(binary)} binary convolutions")
    program = lower(ensemble, (0.5,) * 3, (0.25,) * 3, tuple("0123456789"))
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    packed = execute.Model(program, ops="numpy")(images)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = ensemble(x).numpy()
    print(f"packed and torch logits differ by at most {np.abs(packed - expected).max():.2g}")


if __name__ == "__main__":
    main()
