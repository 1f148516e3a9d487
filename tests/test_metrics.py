"""Metrics against cases that can be worked out by hand."""

import numpy as np
import pytest

from bnncore import metrics


def test_accuracy():
    assert metrics.accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 0])) == 0.5
    with pytest.raises(ValueError, match="labels"):
        metrics.accuracy(np.array([1, 2]), np.array([1]))
    with pytest.raises(ValueError, match="labels"):
        metrics.accuracy(np.array([]), np.array([]))


def test_confusion_by_hand():
    found = metrics.confusion(np.array([0, 2, 2, 1]), np.array([0, 2, 1, 1]), 3)
    assert found.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]


def test_calibration_error_by_hand():
    # Bin (0.8, 0.9]: two images of confidence 0.85, one right; bin (0.6, 0.7]: one of 0.65, right.
    probabilities = np.array([[0.85, 0.15], [0.85, 0.15], [0.35, 0.65]])
    labels = np.array([0, 1, 1])
    expected = 2 / 3 * abs(1 / 2 - 0.85) + 1 / 3 * abs(1 - 0.65)
    predicted = np.array([0, 0, 1])
    error = metrics.calibration_error(probabilities, predicted, labels, bins=10)
    assert error == pytest.approx(expected)
    said = np.array([0, 1, 0])
    assert metrics.calibration_error(np.eye(2)[said], said, said) == 0
    assert metrics.calibration_error(np.eye(2)[said], said, 1 - said) == 1


def test_calibration_error_is_of_the_class_that_was_said():
    even, labels = np.full((2, 2), 0.5), np.array([1, 1])
    assert metrics.calibration_error(even, np.array([1, 1]), labels) == 0.5
    assert metrics.calibration_error(even, np.array([0, 1]), labels) == 0


def test_nll_by_hand():
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75]])
    expected = -(np.log(0.5) + np.log(0.25)) / 2
    assert metrics.nll(probabilities, np.array([1, 0])) == pytest.approx(expected)
    assert metrics.nll(np.eye(2), np.array([1, 0])) == pytest.approx(-np.log(1e-12))


def test_disagreement_by_hand():
    predictions = np.array([[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]])
    assert metrics.disagreement(predictions) == pytest.approx((1 + 3 + 2) / 4 / 3)
    assert metrics.disagreement(predictions[:1]) == 0


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(3, 5)], [0]),
        ([(9, 8), (2, 7), (1, 5), (3, 6)], [2, 1, 0]),
        ([(2, 7), (2, 8), (1, 8)], [2]),  # no larger and no less accurate
        ([(1, 5), (1, 5), (2, 5)], [0]),  # of equal points the first
    ],
)
def test_pareto_front_by_hand(points, front):
    assert metrics.pareto_front(points) == front
