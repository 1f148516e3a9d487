"""Run a `Program` on images: one executor for every set of kernels, and anytime inference.

A set of kernels is a module with ``plan(program) -> list[Kernel]``: `numpy_kernels` (readable, the
reference) and `compiled_kernels` (the default); `lowering.torch_kernels` (floats all through) is
there to compare with. How values look between its steps is its own affair, but the image is their
first axis, value 0 is uint8 images (B,H,W,C) and the last one float32 (B, classes). Legend as in
`packed.program`; m of the M members are in use.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from bnncore.packed import plan, votes
from bnncore.packed.arena import Arena, Kernel, Layout
from bnncore.packed.program import Program
from bnncore.packed.rules import validate

OPS = {
    "numpy": "bnncore.packed.numpy_kernels",
    "compiled": "bnncore.packed.compiled_kernels",
    "torch": "bnncore.lowering.torch_kernels",
}


class Model:
    """A Program made ready to run.

    Args:
        program: checked here.
        ops: a key of `OPS`.
        threads: how many chunks of images are worked on at once.
    """

    def __init__(self, program: Program, ops: str = "compiled", threads: int = 1) -> None:
        if ops not in OPS:
            raise ValueError(f"ops: expected one of {sorted(OPS)}, got {ops!r}")
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        validate(program)
        module = importlib.import_module(OPS[ops])
        self.program = program
        self.ops = ops
        self.threads = threads
        self._one_thread = _one_thread() if ops == "numpy" else nullcontext
        self._steps: list[Kernel] = plan.in_order(module.plan(program))
        self._shared = sum(not step.own for step in self._steps)
        self._last = len(program.nodes)
        self._layout = Layout(self._steps, self._last)
        self._arenas: list[Arena] = []  # of workers that are not at work

    @property
    def memory(self) -> int:
        """Bytes an image of its values, where its kernels have them laid out."""
        return self._layout.total

    def __call__(
        self, images: np.ndarray, members: int | None = None, batch: int = 64
    ) -> np.ndarray:
        """Combined scores.

        Args:
            images: uint8 (B,H,W,C) of the Program's image size.
            members: use the first so many members only (default: all).
            batch: how many images are in work at once; bounds the memory.

        Returns:
            float32 (B, classes); what they mean depends on `Program.combine`.
        """
        return votes.combine(self.program, self.outputs(images, members, batch))[0]

    def predict(
        self, images: np.ndarray, members: int | None = None, batch: int = 64
    ) -> np.ndarray:
        """The predicted class numbers, int64 (B,)."""
        return votes.combine(self.program, self.outputs(images, members, batch))[1]

    def outputs(
        self, images: np.ndarray, members: int | None = None, batch: int = 64
    ) -> np.ndarray:
        """Each member's outputs before they are combined, float32 (m, B, classes)."""
        count = self._members(members)
        result = np.empty((count, len(images), len(self.program.classes)), np.float32)

        def work(part: slice, arena: Arena) -> None:
            shared = self._run_shared(images[part], arena)
            for member in range(count):
                result[member, part] = self._run_member(shared, member, arena)

        self._each(images, batch, work)
        return result

    def anytime(
        self,
        images: np.ndarray,
        threshold: float | None = None,
        members: int | None = None,
        batch: int = 64,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict with as many members as each image needs.

        Votes stop when the members not yet asked can no longer change the winner, so the labels
        are those of `predict`, exactly. With a `threshold` (any combine) an image also stops as
        soon as the score of its best class leads the second best by that much; see
        `exits.choose_threshold`. Without one, means and sums of logits use all members.

        Returns:
            labels int64 (B,), and the number of members that each image used, int64 (B,).
        """
        count = self._members(members)
        labels = np.empty(len(images), np.int64)
        used = np.empty(len(images), np.int64)

        def work(part: slice, arena: Arena) -> None:
            shared = self._run_shared(images[part], arena)
            alive = np.arange(len(images))[part]
            outputs = np.empty((0, len(alive), len(self.program.classes)), np.float32)
            for member in range(count):
                outputs = np.concatenate([outputs, self._run_member(shared, member, arena)[None]])
                predicted, done = votes.stop(self.program, outputs, count, threshold)
                labels[alive[done]] = predicted[done]
                used[alive[done]] = member + 1
                if done.all():
                    break
                if done.any():
                    stay = ~done
                    alive, outputs = alive[stay], outputs[:, stay]
                    shared = {number: value[stay] for number, value in shared.items()}

        self._each(images, batch, work)
        return labels, used

    def layers(self, images: np.ndarray) -> list[tuple[Kernel, float]]:
        """Every step, and the seconds that it takes for all images at once and one member."""
        steps, seconds = self._steps, [0.0] * len(self._steps)

        def timed(time: int, step: Kernel) -> Kernel:
            def run(*arguments: Any) -> Sequence[Any]:
                began = perf_counter()
                outputs = step.run(*arguments)
                seconds[time] += perf_counter() - began
                return outputs

            return replace(step, run=run, bind=None)

        self._steps = [timed(time, step) for time, step in enumerate(steps)]
        try:
            self.outputs(images, 1, len(images))
        finally:
            self._steps = steps
        return list(zip(steps, seconds, strict=True))

    def _members(self, members: int | None) -> int:
        if members is None:
            return self.program.members
        if not 1 <= members <= self.program.members:
            raise ValueError(f"members: expected 1 to {self.program.members}, got {members}")
        return members

    def _each(self, images: np.ndarray, batch: int, work: Callable[[slice, Arena], None]) -> None:
        """Call `work` for every chunk of images, `threads` of them at once."""
        expected = tuple(self.program.image)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images: expected uint8 of shape (B, {', '.join(map(str, expected))}), "
                f"got {images.dtype} of {images.shape}"
            )
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        size = max(1, min(batch, -(-len(images) // self.threads)))
        parts = [slice(start, start + size) for start in range(0, len(images), size)]

        def take(part: slice) -> None:
            try:
                arena = self._arenas.pop()
            except IndexError:
                arena = Arena(self._layout)
            work(part, arena)
            self._arenas.append(arena)

        with self._one_thread():
            if self.threads == 1 or len(parts) < 2:
                for part in parts:
                    take(part)
            else:
                with ThreadPoolExecutor(self.threads) as pool:
                    list(pool.map(take, parts))

    def _run_shared(self, images: np.ndarray, arena: Arena) -> dict[int, Any]:
        values = arena.begin(images)
        arena.run(self._steps[: self._shared], 0, values, 0, len(images))
        return values

    def _run_member(self, shared: dict[int, Any], member: int, arena: Arena) -> np.ndarray:
        """Its outputs, which the next member's may overwrite."""
        values = dict(shared)
        images = len(next(iter(values.values())))
        arena.run(self._steps[self._shared :], self._shared, values, member, images)
        return values[self._last]


def every_value(steps: Sequence[Kernel], images: np.ndarray, member: int = 0) -> dict[int, Any]:
    """All values between the steps of a set of kernels, for uint8 images (B,H,W,C)."""
    values: dict[int, Any] = {0: images}
    for step in steps:
        outputs = step.alone([values[number] for number in step.inputs], member)
        values.update(zip(step.outputs, outputs, strict=True))
    return values


@functools.cache
def _one_thread() -> Callable[[], AbstractContextManager[Any]]:
    """A context in which BLAS uses one thread: here chunks of images are what runs in parallel."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return nullcontext
    controller = ThreadpoolController()
    return lambda: controller.limit(limits=1, user_api="blas")
