"""What fewer members would do: accuracy and cost over their number, thresholds for early exits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bnncore import metrics
from bnncore.packed import costs, execute, votes


def curve(
    model: execute.Model, images: np.ndarray, labels: np.ndarray, outputs: np.ndarray | None = None
) -> list[dict[str, float]]:
    """Accuracy and cost over the number of members used.

    Args:
        outputs: `execute.Model.outputs` of these images, where they are there already.

    Returns:
        For each m of 1..M ``{members, accuracy, binary_macs, float_macs}``: a fraction, and
        multiply-accumulates an image.
    """
    outputs = model.outputs(images) if outputs is None else outputs
    rows = []
    for m in range(1, len(outputs) + 1):
        accuracy = metrics.accuracy(votes.combine(model.program, outputs[:m])[1], labels)
        binary, floats = costs.cost(model.program, m)
        rows.append(
            {"members": m, "accuracy": accuracy, "binary_macs": binary, "float_macs": floats}
        )
    return rows


def exit_curve(
    model: execute.Model,
    images: np.ndarray,
    labels: np.ndarray,
    thresholds: Sequence[float | None],
    outputs: np.ndarray | None = None,
) -> list[dict[str, float | None]]:
    """What `execute.Model.anytime` reaches: ``{threshold, accuracy, mean_members}`` for each.

    Args:
        outputs: `execute.Model.outputs` of these images, where they are there already.
    """
    outputs = model.outputs(images) if outputs is None else outputs
    rows: list[dict[str, float | None]] = []
    for threshold in thresholds:
        predicted, used = votes.exits(model.program, outputs, threshold)
        accuracy = metrics.accuracy(predicted, labels)
        rows.append(
            {"threshold": threshold, "accuracy": accuracy, "mean_members": float(used.mean())}
        )
    return rows


def choose_threshold(
    model: execute.Model,
    images: np.ndarray,
    labels: np.ndarray,
    loss: float = 0.0,
    steps: int = 200,
    outputs: np.ndarray | None = None,
) -> float:
    """The smallest threshold for `execute.Model.anytime` that costs at most `loss` of accuracy.

    Args:
        images, labels: validation data; on the test set the choice would be a peek.
        loss: fraction of the images, against all members without a threshold.
        steps: how many quantiles of the margins that occur are tried.
        outputs: `execute.Model.outputs` of these images, where they are there already.

    Returns:
        The threshold; infinity if no other holds the accuracy.
    """
    outputs = model.outputs(images) if outputs is None else outputs
    prefixes = range(1, len(outputs) + 1)
    margins = np.concatenate(
        [votes.margin(votes.combine(model.program, outputs[:m])[0]) for m in prefixes]
    )
    least = metrics.accuracy(votes.combine(model.program, outputs)[1], labels) - loss
    finite = margins[np.isfinite(margins)]
    candidates = np.unique(np.quantile(finite, np.linspace(0, 1, steps))) if len(finite) else ()
    for threshold in map(float, candidates):
        if metrics.accuracy(votes.exits(model.program, outputs, threshold)[0], labels) >= least:
            return threshold
    return float("inf")
