"""What running a Program takes: multiply-accumulates, and memory for its values."""

from __future__ import annotations

import math

from bnncore.packed import plan
from bnncore.packed.program import Program
from bnncore.packed.rules import validate


def operations(program: Program) -> list[tuple[int, int]]:
    """For each node its (binary, float) multiply-accumulates for one image and one member.

    Those of bconv, and those of conv and dense; what other operators do is linear in the map's
    size and not counted.
    """
    counts = []
    for node, shape in zip(program.nodes, validate(program)[1:], strict=True):
        count = 0
        if node.op in ("bconv", "conv", "dense"):
            taps = program.tensors[node.tensors["weight"]].shape[1:]
            count = math.prod(shape.dims) * math.prod(taps)
        counts.append((count, 0) if node.op == "bconv" else (0, count))
    return counts


def cost(program: Program, members: int | None = None) -> tuple[int, int]:
    """(binary, float) multiply-accumulates an image with the first so many members."""
    count = program.members if members is None else members
    shapes = validate(program)[1:]
    total = [0, 0]
    for shape, each in zip(shapes, operations(program), strict=True):
        times = count if shape.own else 1
        total = [total[0] + times * each[0], total[1] + times * each[1]]
    return total[0], total[1]


def peak_memory(program: Program) -> tuple[int, int]:
    """Bytes of the values alive at once, at most, for one image: (bits as bits, all as float32).

    Nodes run one by one, members one after another; what members share stays until the last.
    """
    sizes = (plan.packed_bytes, plan.float_bytes)
    packed, floats = (plan.peak(plan.of_nodes(program, size)) for size in sizes)
    return packed, floats
