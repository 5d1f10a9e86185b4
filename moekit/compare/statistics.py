"""Means, spreads and paired differences of a few seeds. Pure functions; no value here is a probability of anything."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """One architecture over its seeds. `sd` is the sample standard deviation, None for one seed."""

    seeds: int
    mean: float
    sd: float | None
    min: float
    max: float


class Difference(NamedTuple):
    """One architecture less another, seed by seed: both saw the same batches. One seed has no error and no interval."""

    seeds: int
    mean: float
    standard_error: float | None
    low: float | None
    high: float | None
    """Of the 95% confidence interval by Student's t."""

    @property
    def verdict(self) -> str:
        """What can be said, and no more."""
        if self.low is None or self.high is None:
            return "one seed, no interval"
        if self.low <= 0 <= self.high:
            return f"not told apart by {self.seeds} seeds"
        return "the interval excludes 0"

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of 0, else 0."""
        return 0 if self.low is None or self.high is None else (self.low > 0) - (self.high < 0)

    def document(self) -> dict[str, Any]:
        return {**self._asdict(), "verdict": self.verdict}


def summarize(values: Sequence[float]) -> Summary:
    """Returns the summary of at least one value."""
    return Summary(len(values), fmean(values), stdev(values) if len(values) > 1 else None, min(values), max(values))


def difference(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Difference | None:
    """Returns ours less theirs over the seeds that both have; None if there are none."""
    pairs = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    if not pairs:
        return None
    mean, n = fmean(pairs), len(pairs)
    if n == 1:
        return Difference(1, mean, None, None, None)
    error = stdev(pairs) / math.sqrt(n)
    reach = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * error
    return Difference(n, mean, error, mean - reach, mean + reach)


def t_quantile(probability: float, freedom: int) -> float:
    """Returns the t that Student's distribution stays below with this probability, 0.5 to 1 (both excluded)."""
    high = 1.0
    while t_inside(high, freedom) < 2 * probability - 1:
        high *= 2
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_inside(middle, freedom) < 2 * probability - 1 else (low, middle)
    return high


def t_inside(t: float, freedom: int) -> float:
    """Returns the probability that |T| < t: the finite sums for whole degrees of freedom (A & S 26.7.3 and 26.7.4).

    With a = atan(t / sqrt(n)), n even: sin a (1 + 1/2 cos^2 a + 1*3/(2*4) cos^4 a + ... up to cos^(n-2) a);
    n odd: 2/pi (a + sin a (cos a + 2/3 cos^3 a + 2*4/(3*5) cos^5 a + ... up to cos^(n-2) a)).
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
