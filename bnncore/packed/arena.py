"""Steps that run, and the memory they run in: one block a worker, laid out once by the plan.

Fresh memory costs a page fault every 4 KiB, and what a dead value just left is still in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bnncore.packed import plan

LINE = 64  # bytes of a cache line, where every room starts


Values = Sequence[Any]
Rooms = Sequence[np.ndarray]
Run = Callable[[Values, int, Rooms], Values]
Bind = Callable[[Values, int, Rooms], tuple[Callable[[], object], Values]]


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
        bind: of the same arguments, a call that does it, as often as what lies in `values` has
            changed, and the outputs, where it always puts them; None where they are new each time.
    """

    run: Run
    rooms: tuple[int, ...] = ()
    about: str = ""
    tile: Callable[[int], str] | None = None
    bind: Bind | None = None

    def alone(self, values: Values, member: int = 0) -> Values:
        """Run once, in fresh memory."""
        return self.run(values, member, [empty(size * len(values[0])) for size in self.rooms])


def at_once(bind: Bind) -> Run:
    """What binds and calls."""

    def run(values: Values, member: int, rooms: Rooms) -> Values:
        call, outputs = bind(values, member, rooms)
        call()
        return outputs

    return run


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


class Tape(NamedTuple):
    """Steps that were bound, one after another.

    Attributes:
        steps: what was bound.
        needs: values from before, by their numbers.
        calls: what does the steps.
        dead, made: values that are gone afterwards, and that are new.
    """

    steps: Sequence[Kernel]
    needs: dict[int, Any]
    calls: list[Callable[[], object]]
    dead: list[int]
    made: dict[int, Any]


@dataclass
class _Size:
    """What an arena has for one number of images."""

    images: np.ndarray
    tapes: dict[tuple[int, int], Tape] = field(default_factory=dict)


class Arena:
    """The memory of one worker, and the steps bound to it."""

    SIZES = 2  # numbers of images: those of a whole batch, and of what is left at the end

    def __init__(self, layout: Layout) -> None:
        self.layout, self.memory = layout, empty(0)
        self._sizes: dict[int, _Size] = {}

    def begin(self, images: np.ndarray) -> dict[int, Any]:
        """The values before the first step: the images, where the last ones of this number lay."""
        count = len(images)
        if count not in self._sizes:
            while len(self._sizes) >= self.SIZES:
                del self._sizes[next(iter(self._sizes))]
            self._sizes[count] = _Size(np.empty(images.shape, images.dtype))
        here = self._sizes[count].images
        np.copyto(here, images)
        return {0: here}

    def run(
        self, steps: Sequence[Kernel], first: int, values: dict[int, Any], member: int, images: int
    ) -> None:
        """Run steps, of which `first` is the number of the first, on `values`: what they make comes
        in, what nothing needs any more goes."""
        size = self._sizes.get(images)
        tape = size.tapes.get((first, member)) if size else None
        if tape and tape.steps == steps and all(
            values[number] is value for number, value in tape.needs.items()
        ):  # fmt: skip
            for call in tape.calls:
                call()
            for number in tape.dead:
                values.pop(number, None)
            values.update(tape.made)
            return
        before, bound = dict(values), []
        needs: dict[int, Any] = {}
        for time, step in enumerate(steps, first):
            inputs = [values[number] for number in step.inputs]
            needs.update((n, before[n]) for n in step.inputs if n in before)
            if step.bind:
                call, outputs = step.bind(inputs, member, self.rooms(time, images))
                call()
                bound.append(call)
            else:
                outputs = step.run(inputs, member, self.rooms(time, images))
            values.update(zip(step.outputs, outputs, strict=True))
            for number in self.layout.dead[time]:
                del values[number]
        if size and bound and len(bound) == len(steps):
            dead = [number for number in before if number not in values]
            made = {n: value for n, value in values.items() if n not in before}
            size.tapes[first, member] = Tape(list(steps), needs, bound, dead, made)

    def rooms(self, time: int, images: int) -> list[np.ndarray]:
        """The rooms of a step, for so many images."""
        if len(self.memory) < self.layout.total * images:
            self.memory = empty(self.layout.total * images)
            for size in self._sizes.values():
                size.tapes.clear()
        return [
            self.memory[place * images : (place + size) * images]
            for place, size in self.layout.rooms[time]
        ]
