"""What sentence tasks are measured by, from predictions and labels. A measure that is not defined is 0, as in GLUE."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float


def accuracy(found: Float[np.ndarray, " examples"], wanted: Float[np.ndarray, " examples"]) -> float:
    """Returns the share of equal labels."""
    return float((found == wanted).mean())


def f1(found: Float[np.ndarray, " examples"], wanted: Float[np.ndarray, " examples"]) -> float:
    """Returns the harmonic mean of precision and recall of label 1."""
    both, either = float(((found == 1) & (wanted == 1)).sum()), float((found == 1).sum() + (wanted == 1).sum())
    return 2 * both / either if either else 0.0


def matthews(found: Float[np.ndarray, " examples"], wanted: Float[np.ndarray, " examples"]) -> float:
    """Returns the Matthews correlation, of any number of labels (Gorodkin 2004): 0 where either side is constant."""
    labels = np.unique(np.concatenate((found, wanted)))
    return _correlation((found[:, None] == labels).astype(float), (wanted[:, None] == labels).astype(float))


def pearson(found: Float[np.ndarray, " examples"], wanted: Float[np.ndarray, " examples"]) -> float:
    """Returns the linear correlation; 0 where either side is constant."""
    return _correlation(found[:, None], wanted[:, None])


def spearman(found: Float[np.ndarray, " examples"], wanted: Float[np.ndarray, " examples"]) -> float:
    """Returns the correlation of ranks, equal values sharing their mean rank."""
    return pearson(_ranks(found), _ranks(wanted))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def measure(
    metrics: Sequence[str], scores: Float[np.ndarray, "examples labels"], wanted: Float[np.ndarray, " examples"]
) -> dict[str, float]:
    """Returns the metrics by name, of the likeliest labels or, where there is one score, of the numbers."""
    found = scores[:, 0].astype(float) if scores.shape[1] == 1 else scores.argmax(1).astype(float)
    return {metric: METRICS[metric](found, wanted.astype(float)) for metric in metrics}


def _correlation(x: Float[np.ndarray, "examples columns"], y: Float[np.ndarray, "examples columns"]) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    spread = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / spread if spread > 1e-12 * max(1, x.size) else 0.0


def _ranks(values: Float[np.ndarray, " examples"]) -> Float[np.ndarray, " examples"]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    ranks: np.ndarray = (ends - (counts - 1) / 2)[place]
    return ranks
