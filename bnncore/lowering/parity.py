"""Where a Program and the torch ensemble it came from part ways: the first flipped sign.

Given the same bits a packed layer equals torch's to the bit. End to end, float32 additions in
another order (first convolution, shortcuts) can carry a value over a threshold that it all but
touched. Such images are counted, and traced here to the layer and to the value whose sign differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from bnncore.data import normalization
from bnncore.networks.ensemble import Ensemble
from bnncore.packed import execute, numpy_kernels
from bnncore.packed.program import Program

SIGNS = ("sign", "threshold", "interval")


@dataclass(frozen=True)
class Flip:
    """The first sign that differs in one member for one image.

    Attributes:
        image, member: which.
        layer: the trained layer whose sign it is.
        margin: absolute value in front of torch's sign; a few float32 roundings of `scale` are
            expected, more is a bug.
        scale: the largest absolute value in front of that sign in this map.
    """

    image: int
    member: int
    layer: str
    margin: float
    scale: float


def first_flips(
    ensemble: Ensemble,
    program: Program,
    images: np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> list[Flip]:
    """Compare all signs of all members on `images` (B, H, W, C) uint8, layer by layer.

    Returns:
        One `Flip` for each image and member in which any sign differs.
    """
    scale, shift = (torch.from_numpy(a)[:, None, None] for a in normalization(mean, std))
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() * scale + shift
    flips = []
    ensemble = ensemble.cpu().eval()
    for m, member in enumerate(ensemble.members):
        before: dict[str, torch.Tensor] = {}
        hooks = [
            member.get_submodule(node.name).register_forward_hook(partial(_keep, before, node.name))
            for node in program.nodes
            if node.op in SIGNS
        ]
        try:
            with torch.no_grad():
                member(x)
        finally:
            for hook in hooks:
                hook.remove()
        bits = _signs(program, images, m)
        seen: set[int] = set()
        for name, ours in bits.items():
            values = before[name].permute(0, 2, 3, 1).numpy()
            different = ours != (values >= 0)
            for image in np.flatnonzero(different.any((1, 2, 3))):
                if image not in seen:
                    seen.add(int(image))
                    size = np.abs(values[image])
                    margin = float(size[different[image]].max())
                    flips.append(Flip(int(image), m, name, margin, float(size.max())))
    return flips


def _keep(
    found: dict[str, torch.Tensor], name: str, _module: Any, inputs: Any, _output: Any
) -> None:
    found[name] = inputs[0]


def _signs(program: Program, images: np.ndarray, member: int) -> dict[str, np.ndarray]:
    """Layer -> booleans (B, H, W, C), of every sign of one member, by the numpy kernels."""
    values = execute.every_value(numpy_kernels.plan(program), images, member)
    found = {}
    for number, node in enumerate(program.nodes, 1):
        if node.op in SIGNS:
            channels = values[node.inputs[0]].shape[-1]
            bits = np.unpackbits(values[number], axis=-1, count=channels, bitorder="little")
            found[node.name] = bits.astype(bool)
    return found
