"""Smaller files: the tensors of a `Program` in fewer bits, where `pack` asks for it.

Three options (`params.PackParams`), all lossy, all off by default:

affine: float16
    batch norms that do not fold, scales, PReLU slopes, biases, and thresholds on floats, each
    rounded to the nearest float16. Thresholds on popcounts are integers already and stay exact.
weights: int8, float16 or mixed
    first convolution, full-precision shortcuts and dense layers. int8: ``w ~ q * s`` with one scale
    a filter, ``s = max|w| / 127``, ``q = round(w / s)``. mixed: float16 for the first convolution,
    int8 for the others. Behind the first convolution of a BNN come signs, and nothing behind them
    averages a flipped one away: in int8 it changes the class of 4 to 6 % of the images where no
    shortcut goes around (NIN, FER-Net), in float16 of 0.5 %, and all other layers together hardly
    any. Estimating norms again behind the rounding, or the mean that it adds, does not help.

integer: true
    no floats at all, of activations neither: see `packed.integers`. It goes before the others.

Of the first two arithmetic stays float32: a narrowed Program computes what the wide one would with
rounded values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bnncore.errors import UserError
from bnncore.packed import integers
from bnncore.packed.program import KINDS, Program, Tensor

if TYPE_CHECKING:  # what runs packed files needs no pydantic
    from bnncore.params import PackParams

AFFINE_ROLES = ("scale", "shift", "slope", "bias", "threshold")
FLOAT16_MAX = float(np.finfo(np.float16).max)


class NarrowError(UserError, ValueError):
    """A value does not fit the narrower type; names the layer and what to choose instead."""


def narrowed(
    program: Program, pack: PackParams, images: np.ndarray | None = None, alike: bool = False
) -> Program:
    """`program` with the kinds of tensors that `pack` asks for.

    Args:
        images: uint8 (B,H,W,C) that show the ranges of values, for `integer`; None for a drawing,
            which has no values.
        alike: see `integers.converted`.

    Raises:
        NarrowError: a value is too large for float16; names the layer.
        IntegerError: a layer needs larger integers than there are.
    """
    if pack.integer:
        sizes = None if images is None else integers.ranges(program, images)
        return integers.converted(program, sizes, alike)
    tensors = dict(program.tensors)
    nodes = []
    first = next((node for node in program.nodes if "weight" in node.tensors), None)
    for node in program.nodes:
        slots = dict(node.tensors)
        name = slots.get("weight", "")
        kind = pack.weights
        if kind == "mixed":
            kind = "float16" if node is first else "int8"
        if kind != "float32" and name and tensors[name].kind == "float32":
            if kind == "int8":
                slots["weight_scale"] = f"{name}_scale"
                tensors[name], tensors[slots["weight_scale"]] = _int8(tensors[name])
            else:
                tensors[name] = _float16(tensors[name], f"layer {node.name!r}, weight")
        nodes.append(replace(node, tensors=slots))
        if pack.affine == "float16":
            for name in slots.values():
                tensor = tensors[name]
                small = (*AFFINE_ROLES, "weight_scale")
                if tensor.kind == "float32" and tensor.role in small:
                    tensors[name] = _float16(tensor, f"layer {node.name!r}, {tensor.role}")
    return replace(program, nodes=tuple(nodes), tensors=tensors)


def _float16(tensor: Tensor, where: str) -> Tensor:
    data = tensor.data
    largest = float(np.abs(data).max(initial=0))
    if tensor.role == "threshold":
        # A channel that is always on or off has a threshold no value reaches; it stays so.
        data = np.clip(data, -FLOAT16_MAX, FLOAT16_MAX)
    elif largest > FLOAT16_MAX:
        raise NarrowError(
            f"{where}: expected values that float16 can hold (up to {FLOAT16_MAX:g}), got "
            f"{largest:g}; pack it in float32"
        )
    return replace(tensor, kind="float16", data=data.astype(KINDS["float16"]))


def _int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(weights in int8, their scales in float32), one scale a filter, and a member where own."""
    data = tensor.data.astype(np.float32)
    lead = 2 if tensor.own else 1
    axes = tuple(range(lead, data.ndim))
    scale = np.abs(data).max(axis=axes) / 127
    # As float16 would hold it, so that the quotients below fit whatever `affine` says.
    scale = np.where(scale > 0, scale, 1).astype(np.float16).astype(np.float32)
    scale = np.maximum(scale, np.float32(np.finfo(np.float16).smallest_subnormal))
    spread = scale.reshape(scale.shape + (1,) * len(axes))
    q = np.clip(np.rint(data / spread), -127, 127).astype(KINDS["int8"])
    weights = replace(tensor, kind="int8", data=q)
    scales = Tensor("float32", "weight_scale", tensor.shape[:1], tensor.own, scale)
    return weights, scales
