"""From the outputs of members to a prediction: votes, and when enough members have been asked.

Legend as in `packed.program`; m of the M members are in use.
"""

from __future__ import annotations

import numpy as np

from bnncore.packed.program import Program


def combine(program: Program, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join the outputs of the first m members as `Program.combine` says.

    Sums run over the members in order, in float64. A hard vote's ties go to the larger sum of
    unweighted softmax probabilities, then to the lower class.

    Args:
        outputs: (m, B, classes), from `execute.Model.outputs` or from anywhere else.

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
        scores = (weight[:, None, None] * probable(program, z)).sum(0) / weight.sum()
    else:
        votes = np.zeros(z.shape[1:])
        rows = np.arange(z.shape[1])
        for member, winner in enumerate(z.argmax(2)):
            votes[rows, winner] += weight[member]
        best = votes == votes.max(1, keepdims=True)
        doubt = np.where(best, probable(program, z).sum(0), -1.0)
        return votes.astype(np.float32), doubt.argmax(1)
    return scores.astype(np.float32), scores.astype(np.float32).argmax(1)


def probable(program: Program, z: np.ndarray) -> np.ndarray:
    """The softmax that votes take of outputs z, float64 (..., C)."""
    last = program.nodes[-1]
    return table_softmax(z, int(last.attrs["fraction"])) if last.op == "fixed" else softmax(z)


def table_softmax(z: np.ndarray, fraction: int) -> np.ndarray:
    """Softmax by integers alone, of whole multiples of ``2**-fraction``: (..., C) the same.

    Powers of two, of a table for each 256th of an exponent; all is rounded down, to 2**-14.
    """
    x = np.ldexp(z, fraction).astype(np.int64)
    steps = (x.max(-1, keepdims=True) - x) * STEPS_OF_E >> (fraction + 4)
    e = TABLE[steps & 255] >> np.minimum(steps >> 8, 31)
    return (e << 14) // e.sum(-1, keepdims=True) / 2.0**14


# 2**-(k / 256) of 16 bits; and 256 log2(e) 2**4.
TABLE = np.rint(65535 * 2.0 ** (-np.arange(256) / 256)).astype(np.int64)
STEPS_OF_E = 5909


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


def probabilities(program: Program, scores: np.ndarray) -> np.ndarray:
    """Scores as probabilities (B, classes): softmax of logits, shares of votes."""
    if program.combine in ("mean", "sum"):
        return softmax(scores)
    # By a table, all classes of very many may round down to 0.
    return scores / np.maximum(scores.sum(1, keepdims=True), np.finfo(scores.dtype).tiny)


def stop(
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


def exits(
    program: Program, outputs: np.ndarray, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """`execute.Model.anytime` from outputs that are all there already."""
    count, size = outputs.shape[:2]
    labels, used = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for m in range(1, count + 1):
        predicted, done = stop(program, outputs[:m], count, threshold)
        now = done & (used == 0)
        labels[now], used[now] = predicted[now], m
    return labels, used
