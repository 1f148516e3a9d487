"""When each value of a Program is alive, and where it lies in one block of memory.

A *step* reads and writes values: a node, or several fused into one. Steps that are done once for
all members come first, then those that each member repeats; a value that members share and read
stays until the last member is done. So one line of time says it all: steps are numbered in this
order, and a member's own values lie where the last member's lay.

The plan is static: it needs no image. Who runs the Program a batch at a time multiplies sizes and
offsets by the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from bnncore.packed.program import Program, Shape, validate


class Work(Protocol):
    """What the plan wants to know of a step: values as in `Node.inputs`; whether it is own."""

    @property
    def inputs(self) -> tuple[int, ...]: ...
    @property
    def outputs(self) -> tuple[int, ...]: ...
    @property
    def own(self) -> bool: ...


class NodeWork(NamedTuple):
    """A node as a step."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    own: bool


class Lifetime(NamedTuple):
    """From which step to which a value has to be held, both included, and its size.

    What a step needs for itself alone can be a Lifetime too, under a number that no value has.
    """

    value: int
    first: int
    last: int
    bytes: int


W = TypeVar("W", bound=Work)


def in_order(steps: Iterable[W]) -> list[W]:
    """The steps for all members, then a member's own, each in the order given."""
    return sorted(steps, key=lambda step: step.own)


def lifetimes(steps: Sequence[Work], output: int, size: Callable[[int], int]) -> list[Lifetime]:
    """The lifetimes of the image (value 0) and of all values that the steps write.

    Args:
        steps: see `in_order`.
        output: the value that is the result, held to the end.
        size: the bytes of a value.
    """
    end = len(steps) - 1
    own = {number for step in steps if step.own for number in step.outputs}
    first, last = {0: 0}, {0: 0}
    for time, step in enumerate(steps):
        for number in step.inputs:
            last[number] = end if step.own and number not in own else time
        for number in step.outputs:
            first[number] = last[number] = time
    last[output] = end
    return [Lifetime(number, first[number], last[number], size(number)) for number in first]


def of_nodes(program: Program, size: Callable[[Shape], int] | None = None) -> list[Lifetime]:
    """The lifetimes of a Program's values where every node is a step.

    Args:
        size: the bytes of a value for one image (default: `packed_bytes`).
    """
    shapes = validate(program)
    steps = [
        NodeWork(node.inputs, (number,), shapes[number].own)
        for number, node in enumerate(program.nodes, 1)
    ]
    count = size or packed_bytes
    return lifetimes(in_order(steps), len(steps), lambda number: count(shapes[number]))


def packed_bytes(shape: Shape) -> int:
    """Bytes of a value for one image, the channels of a bits value packed to whole bytes."""
    *positions, channels = shape.dims
    width = {"bits": -(-channels // 8), "u8": channels}.get(shape.kind, 4 * channels)
    return int(np.prod(positions)) * width


def float_bytes(shape: Shape) -> int:
    """Bytes of a value for one image, were everything float32."""
    return 4 * int(np.prod(shape.dims))


def peak(values: Sequence[Lifetime], align: int = 1) -> int:
    """The largest sum of bytes alive at one time, sizes rounded up to `align`.

    No placement takes less.
    """
    change = np.zeros(max(value.last for value in values) + 2, np.int64)
    for value in values:
        size = _up(value.bytes, align)
        change[value.first] += size
        change[value.last + 1] -= size
    return int(change.cumsum().max())


def place(values: Sequence[Lifetime], align: int = 64) -> tuple[dict[int, int], int]:
    """Give each value a place in one block, where no two that are alive together overlap.

    Large ones first, each at the lowest place that is free for all its life; where that takes more
    than `peak`, what sticks out at the top goes first in another try, a few dozen times.

    Args:
        align: offsets are multiples of it.

    Returns:
        value -> offset, and the size of the block, in bytes.
    """
    sizes = np.array([_up(value.bytes, align) for value in values], np.int64)
    first = np.array([value.first for value in values])
    last = np.array([value.last for value in values])
    least = peak(values, align)
    queue = sorted(range(len(values)), key=lambda k: (-sizes[k], first[k]))
    best, total = np.zeros(0, np.int64), -1
    for _ in range(_TRIES):
        offsets = _first_fit(queue, sizes, first, last)
        ends = offsets + sizes
        if total < 0 or ends.max() < total:
            best, total = offsets, int(ends.max())
        if total == least:
            break
        top = [k for k in queue if ends[k] == ends.max()]
        queue = top + [k for k in queue if k not in top]
    return {value.value: int(best[k]) for k, value in enumerate(values)}, total


_TRIES = 32


def _first_fit(
    queue: Sequence[int], sizes: np.ndarray, first: np.ndarray, last: np.ndarray
) -> np.ndarray:
    """Offsets, each the lowest that is free from `first` to `last` when its turn comes."""
    offsets = np.full(len(sizes), -1, np.int64)
    for k in queue:
        rivals = np.flatnonzero((offsets >= 0) & (first <= last[k]) & (last >= first[k]))
        rivals = rivals[np.argsort(offsets[rivals])]
        # A gap lies between the highest end so far and the next start; above all is room for all.
        starts = np.append(0, np.maximum.accumulate(offsets[rivals] + sizes[rivals]))
        gaps = np.append(offsets[rivals], np.iinfo(np.int64).max) - starts
        offsets[k] = starts[np.argmax(gaps >= sizes[k])]
    return offsets


def _up(size: int, align: int) -> int:
    return -(-size // align) * align
