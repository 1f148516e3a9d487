"""Steps that run, and the memory they run in: one block a worker, laid out once by the plan.

Fresh memory costs a page fault every 4 KiB, and what a dead value just left is still in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnncore.packed import plan

LINE = 64  # bytes of a cache line, where every room starts


@dataclass(frozen=True)
class Kernel(plan.Step):
    """A step that runs.

    Attributes:
        run: ``run(values, member, rooms) -> outputs``; `member` counts from 0 and means nothing if
            not own.
        rooms: bytes an image that it wants: one entry an output, then perhaps one for itself alone.
            `run` gets arrays of uint8 of so many bytes times the images, of any content. Empty, if
            it takes memory of its own.
        about: what it does, for people.
        tile: what does it, for so many images, where there is a choice.
    """

    run: Callable[[Sequence[Any], int, Sequence[np.ndarray]], Sequence[Any]]
    rooms: tuple[int, ...] = ()
    about: str = ""
    tile: Callable[[int], str] | None = None

    def alone(self, values: Sequence[Any], member: int = 0) -> Sequence[Any]:
        """Run once, in fresh memory."""
        return self.run(values, member, [empty(size * len(values[0])) for size in self.rooms])


def empty(size: int) -> np.ndarray:
    """So many bytes of anything, from the start of a cache line."""
    room = np.empty(size + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + size]


class Layout:
    """Where the rooms of all steps lie, for one image, and which values a step is the last to need.

    Args:
        steps: see `plan.in_order`.
        output: the value that is the result.
    """

    def __init__(self, steps: Sequence[Kernel], output: int) -> None:
        names = [(*step.outputs, ~time) for time, step in enumerate(steps)]
        sizes = {
            name: size
            for step, mine in zip(steps, names, strict=True)
            for name, size in zip(mine, step.rooms, strict=False)
        }
        lives = plan.lifetimes(steps, output, lambda number: sizes.get(number, 0))
        self.dead: list[list[int]] = [[] for _ in steps]
        for life in lives:
            if life.value != output:
                self.dead[life.last].append(life.value)
        lives += [
            plan.Lifetime(~time, time, time, sizes[~time])
            for time in range(len(steps))
            if ~time in sizes
        ]
        places, self.total = plan.place([life for life in lives if life.bytes], LINE)
        self.rooms = [
            [(places.get(name, 0), sizes[name]) for name in mine if name in sizes] for mine in names
        ]


class Arena:
    """The block of one worker."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.memory = layout, empty(0)

    def rooms(self, time: int, images: int) -> list[np.ndarray]:
        """The rooms of a step, for so many images."""
        if len(self.memory) < self.layout.total * images:
            self.memory = empty(self.layout.total * images)
        return [
            self.memory[place * images : (place + size) * images]
            for place, size in self.layout.rooms[time]
        ]
