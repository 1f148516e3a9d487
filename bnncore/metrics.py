"""What is measured of predictions, in numpy: accuracy, calibration, likelihood, disagreement.

Legend: `B` images, `C` classes, `m` members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mean_curve(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
    """One training curve of several jobs' curves: means by epoch, of what all of them have."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for history in histories.values():
        for row in history:
            found.setdefault(int(row["epoch"]), []).append(row)
    return [
        {k: sum(r[k] for r in rows) / len(rows) for k in rows[0] if all(k in r for r in rows)}
        for rows in found.values()
    ]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of (B,) predictions that equal the labels."""
    _same(predictions.shape, labels.shape)
    return float((predictions == labels).mean())


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a fraction measured on so many images (Wilson 1927)."""
    z = 1.959964
    centre = accuracy + z * z / (2 * images)
    half = z * math.sqrt(accuracy * (1 - accuracy) / images + z * z / (4 * images * images))
    scale = 1 + z * z / images
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def confusion(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How many images of each class were taken for which: int64 (C,C), a row a true class."""
    _same(predictions.shape, labels.shape)
    pairs = labels * classes + predictions
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def calibration_error(
    probabilities: np.ndarray, predicted: np.ndarray, labels: np.ndarray, bins: int = 15
) -> float:
    """Expected calibration error: ``sum_b |b| / B * |accuracy(b) - confidence(b)|``.

    Over `bins` equal bins (low, high] of the predicted class's probability (Guo et al., "On
    Calibration of Modern Neural Networks", 2017, eq. 3). `predicted` says the classes (B,), because
    several can be the most probable, as in a vote.
    """
    _same(probabilities.shape[:1], predicted.shape)
    _same(predicted.shape, labels.shape)
    confidence = probabilities[np.arange(len(labels)), predicted].astype(np.float64)
    right = (predicted == labels).astype(np.float64)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(index, right - confidence, bins)
    return float(np.abs(gap).sum() / len(labels))


def nll(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats; probabilities below 1e-12 count as 1e-12."""
    _same(probabilities.shape[:1], labels.shape)
    picked = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(picked, 1e-12)).mean())


def disagreement(predictions: np.ndarray) -> float:
    """Of (m,B) predictions: how often two members differ, mean over images and pairs of members.

    0 for a single member.
    """
    m = len(predictions)
    pairs = [(i, j) for i in range(m) for j in range(i)]
    if not pairs:
        return 0.0
    return float(np.mean([(predictions[i] != predictions[j]).mean() for i, j in pairs]))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (bytes, accuracy) points that no other beats, by bytes.

    A point is beaten by one that is no larger and no less accurate, and better in one of the two;
    of equal points the first is listed.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _same(got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected or not got or got[0] == 0:
        raise ValueError(f"expected one or more labels of the shape of the predictions, "
                         f"got {expected} for {got}")  # fmt: skip
