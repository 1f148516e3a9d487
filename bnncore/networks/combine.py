"""How members' outputs join to scores, and in which order floats are added.

Legend: `B` images, `C` classes.
"""

from __future__ import annotations

from torch import Tensor, nn


def tree_sum(values: list[Tensor]) -> Tensor:
    """Sum in the order of a balanced binary tree, the same for every equal list.

    An aligned block of 2^k members sums to the same bits wherever it is summed, so that members
    spread over actors in such blocks give bitwise what one process gives.
    """
    while len(values) > 1:
        pairs = [a + b for a, b in zip(values[::2], values[1::2], strict=False)]
        values = pairs + values[len(pairs) * 2 :]
    return values[0]


class TreeSum:
    """`tree_sum` of values that come one by one: the same bits, log2 of them kept."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, Tensor]] = []  # (number of values, their sum)

    def add(self, value: Tensor) -> None:
        count = 1
        while self._blocks and self._blocks[-1][0] == count:
            value = self._blocks.pop()[1] + value
            count *= 2
        self._blocks.append((count, value))

    def value(self) -> Tensor:
        total = self._blocks[-1][1]
        for _, block in reversed(self._blocks[:-1]):
            total = block + total
        return total


def combine(how: str, outputs: list[Tensor], weights: Tensor, bias: Tensor | None) -> Tensor:
    """Join member outputs z_i (B, C) to scores (B, C), as `program` defines; differentiable for
    ``mean``, ``sum`` and ``soft_vote``."""
    if how == "mean":
        return tree_sum(outputs) / len(outputs)
    if how == "sum":
        total = tree_sum([w * z for w, z in zip(weights, outputs, strict=True)])
        return total if bias is None else total + bias
    if how == "soft_vote":
        votes = [w * z.softmax(1) for w, z in zip(weights, outputs, strict=True)]
        return tree_sum(votes) / weights.sum()
    votes = [
        w * nn.functional.one_hot(z.argmax(1), z.shape[1]).to(z.dtype)
        for w, z in zip(weights, outputs, strict=True)
    ]
    return tree_sum(votes)


def winners(how: str, outputs: list[Tensor], scores: Tensor) -> Tensor:
    """Predicted classes (B,): the largest score; a hard vote's ties go to the larger sum of
    probabilities, then to the lower class."""
    if how != "hard_vote":
        return scores.argmax(1)
    best = scores == scores.max(1, keepdim=True).values
    doubt = tree_sum([z.double().softmax(1) for z in outputs])
    return doubt.masked_fill(~best, -1).argmax(1)
