"""The narrow waist between training and inference: a list of plain nodes and one table of tensors.

`lower` (torch) writes a `Program`; `packfile` stores it; `storage` counts it; `execute` runs it.
Nothing here, nor anything that reads a Program, imports torch.

Legend: `B` images, `H W` height and width of a map (`Ho Wo` of an output), `C` input channels, `O`
output channels (filters), `kh kw` height and width of a window, `M` members (`m` of them in use),
`F` features, `S` channels as stored. Activations are laid out B H W C; a bit of 1 stands for +1, a
bit of 0 for -1.

One template graph serves all members. A tensor is *shared* (one copy) or a member's *own* (a
leading axis of `M` copies), and a value of the graph is computed once for all members exactly when
nothing it depends on is own; so a first block shared by all members runs once, and no second
description of "who owns what" is needed.

Operators (inputs -> output; tensor slots, `?` = optional; attributes in brackets):

=========== ==================== ==============================================================
normalize   image u8 -> f32      scale[C], shift[C]: ``x * scale + shift``
conv        f32 -> f32           weight[O,kh,kw,C], bias?[O]; [stride, pad]; zero padding.
                                 weight is float32, float16, int8 (then weight_scale[O]) or binary
bconv       bits -> i32          weight[O,kh,kw,C] binary; [stride, pad, biases]; the sum of +-1
                                 products; a padded tap counts 0. `biases` is how many bias values
                                 the trained layer had before folding (for the papers' counts)
affine      f32|i32 -> f32       scale?[C], shift?[C]: ``x * scale`` rounded, then ``+ shift``
prelu       f32|i32 -> f32       slope[C] or slope[1]: ``x if x >= 0 else slope * x``
relu        f32|i32 -> f32
clip        f32|i32 -> f32       [low, high]
sign        f32|i32 -> bits      ``x >= 0``
threshold   f32|i32 -> bits      threshold[C], direction?[C] binary: ``x >= threshold`` where
                                 direction is 1 (or absent), ``x <= threshold`` where it is 0
interval    f32|i32 -> bits      low[C], high[C], inside?[C] binary: ``low <= x <= high``, negated
                                 where inside is 0
add         f32|i32, f32|i32 -> f32
concat      n values -> same     along channels (all bits, or all numbers)
maxpool     any but u8 -> same   direction?[C] binary, of bits alone: where it is 0 the smallest;
                                 [kernel, stride, pad, ceil]; padded taps never win
avgpool     f32|i32 -> f32       [kernel, stride, pad, ceil, include_pad]
global_avg  f32|i32 -> f32 (B,C) mean over H and W
flatten     f32 -> f32 (B,F)     in C, H, W order, torch's
dense       f32 (B,F) -> (B,O)   weight[O,F] (float32, float16, or int8 with weight_scale[O]),
                                 bias?[O]
=========== ==================== ==============================================================

Operators on integers alone (`packed.integers` makes them), with which nothing rounds differently
anywhere. No integer is above 2**24 in size, so that float32 holds all of them; `rescale` takes 32
bits:

=========== ==================== ==============================================================
conv        u8|i32 -> i32        weight[O,kh,kw,C] int8 or binary; [stride, pad]; on the image
                                 zero[C]: what stands in its padding
dense       i32 (B,F) -> (B,O)   weight[O,F] int8
rescale     u8|i32, i32? -> i32  scale[C], shift[C], slope?[C]; [right, low, high]:
                                 ``clip((x * scale + shift >> right) + second, low, high)``;
                                 slope instead of scale where x < 0
sumpool     i32 -> i32           [kernel, stride, pad, ceil, include_pad]: avgpool times the least
                                 common multiple of its divisors
global_sum  i32 -> i32 (B,C)     sum over H and W
flatten     i32 -> i32 (B,F)
fixed       i32 -> f32           [fraction]: ``x / 2**fraction``; the last node, and then votes take
                                 probabilities from a table (`votes.table_softmax`)
=========== ==================== ==============================================================

The last node gives each member's outputs z (B,C); `combine` joins those of the first m members:

========= ============================================================================
mean      ``sum_i(z_i) / m``; tensors: none
sum       ``sum_i(weight[i] * z_i) + bias``; weight?[M] and bias?[C] in `combine_tensors`
soft_vote ``sum_i(weight[i] * softmax(z_i)) / sum_i(weight[i])``; weight?[M]
hard_vote ``sum_i(weight[i] * onehot(argmax z_i))``; weight?[M]; ties go to the larger
          summed softmax probability, then to the lower class
========= ============================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bnncore.errors import UserError

KINDS: dict[str, np.dtype] = {
    "binary": np.dtype("u1"),  # eight weights a byte, see `Tensor.data`
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
}
COMBINES = ("mean", "sum", "soft_vote", "hard_vote")
ROLES = (
    "weight",
    "weight_scale",
    "bias",
    "scale",
    "shift",
    "slope",
    "threshold",
    "direction",
    "input",
    "combine",
)


class PackedFormatError(UserError, ValueError):
    """A Program, or the file that should hold one, is invalid; the message says what and where."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """One entry of a Program's table.

    Attributes:
        kind: a key of `KINDS`.
        role: what it is for, in the words of the storage table: ``weight``, ``weight_scale``,
            ``bias``, ``scale`` (the XNOR alpha or a folded batch norm), ``shift``, ``slope``,
            ``threshold``, ``direction``, ``input``, ``combine``.
        shape: logical shape of one copy, without the member axis.
        own: whether each member has a copy of its own.
        data: ``shape``, or ``(M, *shape)`` where own. Of kind binary: uint8 of
            ``ceil(prod(shape) / 8)`` bytes (after the member axis, if any), the C-order flattened
            bits, first bit in the lowest bit of the first byte; spare bits are 0.
    """

    kind: str
    role: str
    shape: tuple[int, ...]
    own: bool
    data: np.ndarray


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        op: a name from the table above.
        name: the trained layer it comes from, for people and for error messages.
        inputs: value numbers; 0 is the image, node ``i`` of the list gives value ``i + 1``.
        tensors: slot -> name in the Program's table.
        attrs: scalars only (``[kernel, stride, pad]`` are the same for height and width).
    """

    op: str
    name: str
    inputs: tuple[int, ...]
    tensors: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Program:
    """A trained ensemble, ready to be counted, stored and run.

    Attributes:
        nodes: in an order that can be executed; the last gives the members' outputs.
        tensors: name -> Tensor.
        members: M >= 1.
        combine: one of `COMBINES`.
        combine_tensors: slot -> name in the table (never own).
        image: (H, W, C) of the uint8 input.
        classes: class names; their number is that of the outputs.
        info: small facts for people (name, scheme, sharing, recorded accuracies ...); JSON scalars.
    """

    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]
    members: int
    combine: str
    image: tuple[int, int, int]
    classes: tuple[str, ...]
    combine_tensors: dict[str, str] = field(default_factory=dict)
    info: dict[str, str | int | float] = field(default_factory=dict)


def pack_bits(signs: np.ndarray, own: bool) -> np.ndarray:
    """Pack booleans (True = +1) of shape (...) or (M, ...) into `Tensor.data`'s binary form."""
    flat = signs.reshape(len(signs) if own else 1, -1)
    packed = np.packbits(flat, axis=1, bitorder="little")
    return packed if own else packed[0]


def unpack_bits(tensor: Tensor) -> np.ndarray:
    """The inverse of `pack_bits`: booleans of shape ``shape`` or ``(M, *shape)``."""
    count = int(np.prod(tensor.shape))
    bits = np.unpackbits(tensor.data, axis=-1, count=count, bitorder="little")
    return bits.astype(bool).reshape(tensor.data.shape[:-1] + tensor.shape)


class Shape(NamedTuple):
    """What `validate` knows of one value of the graph.

    Attributes:
        kind: ``u8`` (the image), ``f32``, ``i32`` or ``bits``.
        dims: (H, W, C) or (F,), without the batch.
        own: whether each member computes its own.
        bound: no integer is larger in size; 0 for floats and bits.
    """

    kind: str
    dims: tuple[int, ...]
    own: bool
    bound: int = 0


def stored_shape(tensor: Tensor, members: int) -> tuple[int, ...]:
    """The shape that `Tensor.data` has to have."""
    one = tuple(tensor.shape)
    if tensor.kind == "binary":
        one = (-(-math.prod(one) // 8),)
    return (members, *one) if tensor.own else one
