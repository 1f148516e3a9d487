"""Run a `Program` on images: one executor for every set of kernels, votes, and anytime inference.

A set of kernels is a module with ``plan(program) -> list[Step]``: `bnncore.ops` (numpy, readable,
the reference) and `bnncore.kernel` (compiled, the default). Legend as in `bnncore.program`; m of
the M members are in use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from .program import Program, validate

OPS = {"numpy": "bnncore.ops", "compiled": "bnncore.kernel"}


@dataclass(frozen=True)
class Step:
    """One piece of work of a plan: a node, or several fused into one.

    Attributes:
        inputs: value numbers, as in `Node.inputs`.
        output: the value number it gives; values inside a fused step are never seen.
        own: whether each member does it with its own tensors or inputs. False: once for all.
        run: ``run(values, member) -> value``; `member` counts from 0 and means nothing if not own.

    How values look between steps is the ops set's own affair, except that value 0 is uint8 images
    (B,H,W,C) and the last one float32 (B, classes). An ops set whose values are all arrays with the
    image as first axis says so by ``IMAGES_FIRST = True``; images that are decided early then
    leave the batch without the shared steps being repeated for the others.
    """

    inputs: tuple[int, ...]
    output: int
    own: bool
    run: Callable[[Sequence[Any], int], Any]


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
        self._images_first = bool(getattr(module, "IMAGES_FIRST", False))
        self._one_thread = _one_thread() if ops == "numpy" else nullcontext
        steps: list[Step] = module.plan(program)
        self._shared = [step for step in steps if not step.own]
        self._own = [step for step in steps if step.own]
        self._last = len(program.nodes)
        # After which step a value is not needed any more, so that memory is given back early.
        self._dead_shared = _last_uses(self._shared, {self._last, *_inputs(self._own)})
        self._dead_own = _last_uses(
            self._own, {self._last, 0, *(step.output for step in self._shared)}
        )

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
        return combine(self.program, self.outputs(images, members, batch))[0]

    def predict(
        self, images: np.ndarray, members: int | None = None, batch: int = 64
    ) -> np.ndarray:
        """The predicted class numbers, int64 (B,)."""
        return combine(self.program, self.outputs(images, members, batch))[1]

    def outputs(
        self, images: np.ndarray, members: int | None = None, batch: int = 64
    ) -> np.ndarray:
        """Each member's outputs before they are combined, float32 (m, B, classes)."""
        count = self._members(members)
        result = np.empty((count, len(images), len(self.program.classes)), np.float32)

        def work(part: slice) -> None:
            shared = self._run_shared(images[part])
            for member in range(count):
                result[member, part] = self._run_member(shared, member)

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
        `choose_threshold`. Without one, means and sums of logits use all members.

        Returns:
            labels int64 (B,), and the number of members that each image used, int64 (B,).
        """
        count = self._members(members)
        labels = np.empty(len(images), np.int64)
        used = np.empty(len(images), np.int64)

        def work(part: slice) -> None:
            here = images[part]
            alive = np.arange(part.start, part.start + len(here))
            shared = self._run_shared(here)
            outputs = np.empty((0, len(here), len(self.program.classes)), np.float32)
            for member in range(count):
                outputs = np.concatenate([outputs, self._run_member(shared, member)[None]])
                scores, predicted = combine(self.program, outputs)
                done = _decided(self.program, outputs, count)
                if threshold is not None:
                    done |= margin(scores) >= threshold
                if member + 1 == count:
                    done[:] = True
                labels[alive[done]] = predicted[done]
                used[alive[done]] = member + 1
                if done.all():
                    break
                if done.any():
                    stay = ~done
                    alive, outputs, here = alive[stay], outputs[:, stay], here[stay]
                    if self._images_first:
                        shared = {number: value[stay] for number, value in shared.items()}
                    else:
                        shared = self._run_shared(here)

        self._each(images, batch, work)
        return labels, used

    def _members(self, members: int | None) -> int:
        if members is None:
            return self.program.members
        if not 1 <= members <= self.program.members:
            raise ValueError(f"members: expected 1 to {self.program.members}, got {members}")
        return members

    def _each(self, images: np.ndarray, batch: int, work: Callable[[slice], None]) -> None:
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
        with self._one_thread():
            if self.threads == 1 or len(parts) < 2:
                for part in parts:
                    work(part)
            else:
                with ThreadPoolExecutor(self.threads) as pool:
                    list(pool.map(work, parts))

    def _run_shared(self, images: np.ndarray) -> dict[int, Any]:
        values: dict[int, Any] = {0: np.ascontiguousarray(images)}
        _run(self._shared, self._dead_shared, values, 0)
        return values

    def _run_member(self, shared: dict[int, Any], member: int) -> np.ndarray:
        values = dict(shared)
        _run(self._own, self._dead_own, values, member)
        return values[self._last]


def _run(
    steps: list[Step], dead: list[tuple[int, ...]], values: dict[int, Any], member: int
) -> None:
    for step, gone in zip(steps, dead, strict=True):
        values[step.output] = step.run([values[number] for number in step.inputs], member)
        for number in gone:
            del values[number]


def _inputs(steps: list[Step]) -> Iterator[int]:
    for step in steps:
        yield from step.inputs


def _last_uses(steps: list[Step], keep: set[int]) -> list[tuple[int, ...]]:
    """For each step the values that no later one of these steps needs."""
    seen = set(keep)
    dead: list[tuple[int, ...]] = []
    for step in reversed(steps):
        gone = {*step.inputs, step.output} - seen
        seen |= gone
        dead.append(tuple(gone))
    return dead[::-1]


def _one_thread() -> Callable[[], AbstractContextManager[Any]]:
    """A context in which BLAS uses one thread: here chunks of images are what runs in parallel."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return nullcontext
    controller = ThreadpoolController()
    return lambda: controller.limit(limits=1, user_api="blas")


def combine(program: Program, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join the outputs of the first m members as `Program.combine` says.

    Sums run over the members in order, in float64. A hard vote's ties go to the larger sum of
    unweighted softmax probabilities, then to the lower class.

    Args:
        outputs: (m, B, classes), from `Model.outputs` or from anywhere else.

    Returns:
        scores float32 (B, classes) and predicted classes int64 (B,).
    """
    expected = f"(1 to {program.members}, B, {len(program.classes)})"
    good = outputs.ndim == 3 and 1 <= len(outputs) <= program.members
    if not good or outputs.shape[2] != len(program.classes):
        raise ValueError(f"outputs: expected shape {expected}, got {outputs.shape}")
    z = outputs.astype(np.float64)
    weight = _weights(program)[: len(z)]
    if program.combine == "mean":
        scores = z.sum(0) / len(z)
    elif program.combine == "sum":
        scores = (weight[:, None, None] * z).sum(0)
        if "bias" in program.combine_tensors:
            scores = scores + program.tensors[program.combine_tensors["bias"]].data
    elif program.combine == "soft_vote":
        scores = (weight[:, None, None] * softmax(z)).sum(0) / weight.sum()
    else:
        votes = np.zeros(z.shape[1:])
        rows = np.arange(z.shape[1])
        for member, winner in enumerate(z.argmax(2)):
            votes[rows, winner] += weight[member]
        best = votes == votes.max(1, keepdims=True)
        doubt = np.where(best, softmax(z).sum(0), -1.0)
        return votes.astype(np.float32), doubt.argmax(1)
    return scores.astype(np.float32), scores.astype(np.float32).argmax(1)


def softmax(z: np.ndarray) -> np.ndarray:
    """``exp(z) / sum(exp(z))`` over the last axis, in z's precision."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def margin(scores: np.ndarray) -> np.ndarray:
    """By how much the best class leads the second best: (B, classes) -> (B,); alone, infinitely."""
    if scores.shape[1] < 2:
        return np.full(len(scores), np.inf)
    top = np.partition(scores, -2, axis=1)
    return top[:, -1] - top[:, -2]


def _weights(program: Program) -> np.ndarray:
    if "weight" in program.combine_tensors:
        return program.tensors[program.combine_tensors["weight"]].data.astype(np.float64)
    return np.ones(program.members)


def _decided(program: Program, outputs: np.ndarray, count: int) -> np.ndarray:
    """Which images' winner the members after these, up to `count`, cannot change any more."""
    asked = len(outputs)
    weight = _weights(program)[:count]
    rest = weight[asked:].sum()
    if program.combine == "hard_vote":
        scores = combine(program, outputs)[0].astype(np.float64)
    elif program.combine == "soft_vote":
        scores = (weight[:asked, None, None] * softmax(outputs.astype(np.float64))).sum(0)
    else:
        return np.full(outputs.shape[1], asked == count)
    # A later member takes nothing from the winner and gives the second at most its weight. Strictly
    # more than that, and by more than rounding, because a tie could still go the other way.
    return margin(scores) > rest + 1e-6 * weight.sum()
