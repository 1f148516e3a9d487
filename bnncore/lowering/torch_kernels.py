"""The kernels in torch fp32 eager: what ``bench --torch`` compares with, and a third opinion.

Bits are floats of +-1 here and convolutions torch's own, so this runs what a framework without
bits would run. It is the one set of kernels that imports torch, and nothing imports it by itself.

How values look here: float32 tensors (B,C,H,W), in memory as B H W C (channels last), or (B,F).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bnncore.packed import borders
from bnncore.packed.arena import Kernel
from bnncore.packed.program import Node, Program, Tensor, unpack_bits
from bnncore.packed.rules import validate

Slots = dict[str, torch.Tensor]


def plan(program: Program) -> list[Kernel]:
    """One step for each node of a Program."""
    shapes = validate(program)
    last = len(program.nodes)
    steps = []
    for index, node in enumerate(program.nodes):
        maps = len(shapes[node.inputs[0]].dims) == 3
        own = any(program.tensors[name].own for name in node.tensors.values())
        slots = [
            _slots(program, node, member, maps) for member in range(program.members * own or 1)
        ]
        run = _run(_OPS[node.op], node, slots, index + 1 == last)
        steps.append(Kernel(node.inputs, (index + 1,), shapes[index + 1].own, run))
    return steps


def _run(
    op: Callable[..., torch.Tensor], node: Node, slots: list[Slots], last: bool
) -> Callable[[Sequence[Any], int, Sequence[np.ndarray]], Sequence[Any]]:
    def run(values: Sequence[Any], member: int, rooms: Sequence[np.ndarray]) -> Sequence[Any]:
        mine = slots[member if len(slots) > 1 else 0]
        out = op(*values, **mine, **node.attrs)
        return (out.numpy() if last else out,)

    return run


def _slots(program: Program, node: Node, member: int, maps: bool) -> Slots:
    """A member's tensors as torch wants them: O C kh kw, per-channel ones ready to broadcast."""
    slots = {}
    for slot, name in node.tensors.items():
        array = torch.from_numpy(_plain(program.tensors[name], member))
        if array.ndim == 4:
            array = array.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        elif array.ndim == 1 and maps and node.op not in ("conv", "bconv"):
            array = array[:, None, None]
        slots[slot] = array
    scale = slots.pop("weight_scale", None)
    if scale is not None:
        slots["weight"] = slots["weight"] * scale.view(-1, *[1] * (slots["weight"].ndim - 1))
    return slots


def _plain(tensor: Tensor, member: int) -> np.ndarray:
    """float32, bits as +-1; integer levels too, exact because popcounts stay below 2^24."""
    if tensor.kind == "binary":
        data = np.where(unpack_bits(tensor), np.float32(1), np.float32(-1))
    else:
        data = tensor.data
    data = data[member] if tensor.own else data
    if tensor.kind == "int32" and tensor.role != "threshold":
        return np.array(data)  # of a rescaling, which is done in integers
    limited = np.clip(data, -(2.0**25), 2.0**25) if tensor.kind == "int32" else data
    return np.array(limited, np.float32)


def _normalize(image: np.ndarray, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(image).permute(0, 3, 1, 2) * scale + shift


def _affine(
    x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
) -> torch.Tensor:
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    pad: int,
    bias: torch.Tensor | None = None,
    biases: int = 0,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    if zero is None:
        return F.conv2d(x, weight, bias, stride, pad)
    zero = zero[:, None, None]
    image = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float()
    # Zeros in the padding of what is less by `zero`, and in double, for these sums are larger.
    apart = F.conv2d((image - zero).double(), weight.double(), None, stride, pad)
    return (apart + (weight * zero).sum((1, 2, 3))[:, None, None]).float()


def _signs(condition: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, 1.0, -1.0)


def _threshold(
    x: torch.Tensor, threshold: torch.Tensor, direction: torch.Tensor | None = None
) -> torch.Tensor:
    if direction is None:
        return _signs(x >= threshold)
    return _signs(torch.where(direction > 0, x >= threshold, x <= threshold))


def _interval(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, inside: torch.Tensor | None = None
) -> torch.Tensor:
    between = _signs((x >= low) & (x <= high))
    return between if inside is None else between * inside


def _rescale(
    x: Any,
    second: torch.Tensor | None = None,
    *,
    scale: torch.Tensor,
    shift: torch.Tensor,
    slope: torch.Tensor | None = None,
    right: int,
    low: int,
    high: int,
) -> torch.Tensor:
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
    x = x.long()
    factor = scale.long() if slope is None else torch.where(x >= 0, scale, slope).long()
    y = (x * factor + shift.long()) >> right
    return torch.clamp(y if second is None else y + second.long(), low, high).float()


def _sumpool(
    x: torch.Tensor, kernel: int, stride: int, pad: int, ceil: int, include_pad: int
) -> torch.Tensor:
    average = F.avg_pool2d(x.double(), kernel, stride, pad, bool(ceil), bool(include_pad))
    out = tuple(average.shape[2:])
    reach = pad * include_pad
    counts = borders.divisors(tuple(x.shape[2:]), out, (kernel, kernel), stride, pad, reach)
    multiple = float((counts * borders.factors(counts)).max())
    return torch.round(average * multiple).float()


def _maxpool(
    x: torch.Tensor,
    kernel: int,
    stride: int,
    pad: int,
    ceil: int,
    direction: torch.Tensor | None = None,
) -> torch.Tensor:
    if direction is None:
        return F.max_pool2d(x, kernel, stride, pad, ceil_mode=bool(ceil))
    return _maxpool(x * direction, kernel, stride, pad, ceil) * direction


def _avgpool(
    x: torch.Tensor, kernel: int, stride: int, pad: int, ceil: int, include_pad: int
) -> torch.Tensor:
    return F.avg_pool2d(x, kernel, stride, pad, bool(ceil), bool(include_pad))


def _dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)


_OPS: dict[str, Callable[..., torch.Tensor]] = {
    "normalize": _normalize,
    "conv": _conv,
    "bconv": _conv,
    "affine": _affine,
    "prelu": lambda x, slope: torch.where(x >= 0, x, x * slope),
    "relu": lambda x: F.relu(x),
    "clip": lambda x, low, high: torch.clamp(x, low, high),
    "sign": lambda x: _signs(x >= 0),
    "threshold": _threshold,
    "interval": _interval,
    "add": lambda a, b: a + b,
    "concat": lambda *parts: torch.cat(parts, 1),
    "maxpool": _maxpool,
    "avgpool": _avgpool,
    "sumpool": _sumpool,
    "global_avg": lambda x: x.mean((2, 3)),
    "global_sum": lambda x: x.sum((2, 3)),
    "flatten": lambda x: x.flatten(1),
    "dense": _dense,
    "rescale": _rescale,
    "fixed": lambda x, fraction: x * 2.0**-fraction,
}
