"""Run a `Program` on images: one executor for every set of kernels, votes, and anytime inference.

A set of kernels is a module with ``plan(program) -> list[Step]``: `numpy_kernels` (readable, the
reference) and `compiled_kernels` (the default); `lowering.torch_kernels` (floats all through) is
there to compare with. Legend as in `packed.program`; m of the M members are in use.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnncore import metrics
from bnncore.packed.program import Program, Shape, validate

OPS = {
    "numpy": "bnncore.packed.numpy_kernels",
    "compiled": "bnncore.packed.compiled_kernels",
    "torch": "bnncore.lowering.torch_kernels",
}


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
                predicted, done = _stop(self.program, outputs, count, threshold)
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


@functools.cache
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


def _stop(
    program: Program, outputs: np.ndarray, count: int, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """After the outputs of some of `count` members: predictions, and who needs no more members."""
    asked = len(outputs)
    scores, predicted = combine(program, outputs)
    weight = _weights(program)[:count]
    if asked == count:
        done = np.ones(len(scores), bool)
    elif program.combine in ("soft_vote", "hard_vote"):
        # A later member takes nothing from the winner and gives the second at most its weight.
        # Strictly more than that, and by more than rounding, because a tie could go either way.
        total = scores * (weight[:asked].sum() if program.combine == "soft_vote" else 1)
        done = margin(total) > weight[asked:].sum() + 1e-5 * weight.sum()
    else:
        done = np.zeros(len(scores), bool)
    if threshold is not None:
        done |= margin(scores) >= threshold
    return predicted, done


def probabilities(program: Program, scores: np.ndarray) -> np.ndarray:
    """Scores as probabilities (B, classes): softmax of logits, shares of votes."""
    if program.combine in ("mean", "sum"):
        return softmax(scores)
    return scores / scores.sum(1, keepdims=True)


def curve(
    model: Model, images: np.ndarray, labels: np.ndarray, outputs: np.ndarray | None = None
) -> list[dict[str, float]]:
    """Accuracy and cost over the number of members used.

    Args:
        outputs: `Model.outputs` of these images, where they are there already.

    Returns:
        For each m of 1..M ``{members, accuracy, binary_macs, float_macs}``: a fraction, and
        multiply-accumulates an image.
    """
    outputs = model.outputs(images) if outputs is None else outputs
    rows = []
    for m in range(1, len(outputs) + 1):
        accuracy = metrics.accuracy(combine(model.program, outputs[:m])[1], labels)
        binary, floats = cost(model.program, m)
        rows.append(
            {"members": m, "accuracy": accuracy, "binary_macs": binary, "float_macs": floats}
        )
    return rows


def exit_curve(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    thresholds: Sequence[float | None],
    outputs: np.ndarray | None = None,
) -> list[dict[str, float | None]]:
    """What `Model.anytime` reaches with each threshold: ``{threshold, accuracy, mean_members}``.

    Args:
        outputs: `Model.outputs` of these images, where they are there already.
    """
    outputs = model.outputs(images) if outputs is None else outputs
    rows: list[dict[str, float | None]] = []
    for threshold in thresholds:
        predicted, used = _exits(model.program, outputs, threshold)
        accuracy = metrics.accuracy(predicted, labels)
        rows.append(
            {"threshold": threshold, "accuracy": accuracy, "mean_members": float(used.mean())}
        )
    return rows


def choose_threshold(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    loss: float = 0.0,
    steps: int = 200,
    outputs: np.ndarray | None = None,
) -> float:
    """The smallest threshold for `Model.anytime` that costs at most `loss` of accuracy.

    Args:
        images, labels: validation data; on the test set the choice would be a peek.
        loss: fraction of the images, against all members without a threshold.
        steps: how many quantiles of the margins that occur are tried.
        outputs: `Model.outputs` of these images, where they are there already.

    Returns:
        The threshold; infinity if no other holds the accuracy.
    """
    outputs = model.outputs(images) if outputs is None else outputs
    prefixes = range(1, len(outputs) + 1)
    margins = np.concatenate([margin(combine(model.program, outputs[:m])[0]) for m in prefixes])
    least = metrics.accuracy(combine(model.program, outputs)[1], labels) - loss
    finite = margins[np.isfinite(margins)]
    candidates = np.unique(np.quantile(finite, np.linspace(0, 1, steps))) if len(finite) else ()
    for threshold in map(float, candidates):
        if metrics.accuracy(_exits(model.program, outputs, threshold)[0], labels) >= least:
            return threshold
    return float("inf")


def _exits(
    program: Program, outputs: np.ndarray, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """`Model.anytime` from outputs that are all there already."""
    count, size = outputs.shape[:2]
    labels, used = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for m in range(1, count + 1):
        predicted, done = _stop(program, outputs[:m], count, threshold)
        now = done & (used == 0)
        labels[now], used[now] = predicted[now], m
    return labels, used


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
            count = int(np.prod(shape.dims)) * int(np.prod(taps))
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
    shapes = validate(program)
    last = len(program.nodes)
    shared = [i for i in range(1, last + 1) if not shapes[i].own]
    own = [i for i in range(1, last + 1) if shapes[i].own]
    sources = {i: program.nodes[i - 1].inputs for i in shared + own}
    kept = {number for i in own for number in sources[i] if not shapes[number].own} | {last}
    peaks = [0, 0]
    for packed in (0, 1):
        size = [_bytes(shape, bool(packed)) for shape in shapes]
        for numbers, alive in ((shared, {0}), (own, kept - {last})):
            final = {number: i for i in numbers for number in sources[i]}  # its last reader
            total = sum(size[number] for number in alive)
            for i in numbers:
                total += size[i]
                peaks[packed] = max(peaks[packed], total)
                gone = {number for number in (*sources[i], i) if final.get(number, i) == i}
                total -= sum(size[number] for number in gone - kept)
    return peaks[1], peaks[0]


def _bytes(shape: Shape, packed: bool) -> int:
    count = int(np.prod(shape.dims))
    if not packed:
        return 4 * count
    if shape.kind == "bits":
        return count // shape.dims[-1] * -(-shape.dims[-1] // 8)
    return count if shape.kind == "u8" else 4 * count
