"""The measures of sentence tasks, against values worked out by hand and against their definitions."""

import math

import numpy as np
import pytest

from moekit.train.scores import accuracy, f1, matthews, measure, pearson, spearman

FOUND = np.array([1.0, 1, 1, 0, 0, 0, 0, 1])
WANTED = np.array([1.0, 1, 0, 0, 0, 1, 0, 1])  # 3 true and 1 false positives, 3 true and 1 false negatives


def test_labels() -> None:
    assert accuracy(FOUND, WANTED) == 0.75
    assert f1(FOUND, WANTED) == 0.75
    assert matthews(FOUND, WANTED) == pytest.approx((3 * 3 - 1 * 1) / 16)
    skewed = np.array([1.0, 1, 1, 1, 1, 1, 1, 0])
    tp, fp, fn, tn = 3, 4, 1, 0
    assert f1(skewed, WANTED) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(skewed, WANTED) == pytest.approx((tp * tn - fp * fn) / spread)
    three = matthews(np.array([0.0, 1, 2, 2]), np.array([0.0, 1, 2, 1]))
    # Gorodkin's R_K of the confusion matrix: c s - sum of products of the margins, over the two spreads
    assert three == pytest.approx((3 * 4 - (1 + 2 + 2)) / math.sqrt((16 - 6) * (16 - 6)))


def test_numbers() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 10])
    assert pearson(x, y) == pytest.approx(13 / math.sqrt(5 * 50))
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    tied = np.array([1.0, 5, 5, 9])  # ranks 1, 2.5, 2.5, 4
    assert spearman(x, tied) == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert pearson(x, -3 * x) == pytest.approx(-1)


def test_what_is_not_defined_is_zero() -> None:
    same, mixed = np.ones(4), np.array([0.0, 1, 0, 1])
    assert matthews(same, mixed) == pearson(same, mixed) == spearman(mixed, same) == 0
    assert f1(np.zeros(4), np.zeros(4)) == 0


def test_scores_become_labels_or_numbers() -> None:
    logits = np.array([[0.1, 0.9], [2, 1], [0, 3]], dtype=np.float32)
    assert measure(("accuracy", "f1"), logits, np.array([1, 0, 0], dtype=np.float32)) == {
        "accuracy": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
    }
    assert measure(("pearson",), np.array([[1.0], [2], [4]]), np.array([2.0, 4, 8]))["pearson"] == pytest.approx(1)
