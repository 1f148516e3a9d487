"""What running a Program takes: multiply-accumulates, and memory for its values."""

from __future__ import annotations

import math

from bnncore.packed import plan
from bnncore.packed.program import Program, Shape
from bnncore.packed.rules import validate


def operations(program: Program) -> list[tuple[int, int]]:
    """For each node its (binary, float) multiply-accumulates for one image and one member.

    Those of bconv, and those of conv and dense; what other operators do is linear in the map's
    size and not counted.
    """
    return _operations(program, validate(program))


def _operations(program: Program, shapes: list[Shape]) -> list[tuple[int, int]]:
    counts = []
    for node, shape in zip(program.nodes, shapes[1:], strict=True):
        count = 0
        if node.op in ("bconv", "conv", "dense"):
            taps = program.tensors[node.tensors["weight"]].shape[1:]
            count = math.prod(shape.dims) * math.prod(taps)
        counts.append((count, 0) if node.op == "bconv" else (0, count))
    return counts


def once_and_each(program: Program) -> tuple[tuple[int, int], tuple[int, int]]:
    """(binary, float) multiply-accumulates an image: once for all members, and for each of them."""
    sums, shapes = [[0, 0], [0, 0]], validate(program)
    for shape, (binary, real) in zip(shapes[1:], _operations(program, shapes), strict=True):
        sums[shape.own][0] += binary
        sums[shape.own][1] += real
    return (sums[0][0], sums[0][1]), (sums[1][0], sums[1][1])


def cost(program: Program, members: int | None = None) -> tuple[int, int]:
    """(binary, float) multiply-accumulates an image with the first so many members."""
    once, each = once_and_each(program)
    count = program.members if members is None else members
    return once[0] + count * each[0], once[1] + count * each[1]


def peak_memory(program: Program) -> tuple[int, int]:
    """Bytes of the values alive at once, at most, for one image: (bits as bits, all as float32).

    Nodes run one by one, members one after another; what members share stays until the last.
    """
    sizes = (plan.packed_bytes, plan.float_bytes)
    packed, floats = (plan.peak(plan.of_nodes(program, size)) for size in sizes)
    return packed, floats
