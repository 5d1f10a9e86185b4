"""Statistics of a few seeds, held against values worked out by hand and against tables of Student's t."""

import math

import pytest

from moekit.compare.statistics import difference, summarize, t_inside, t_quantile


@pytest.mark.parametrize(
    ("freedom", "known"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, known: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(known, abs=5e-5)


def test_t_quantiles_of_one_and_two_degrees_are_their_closed_forms() -> None:
    for p in (0.6, 0.9, 0.975, 0.9995):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-12)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-12)


def test_t_tends_to_the_normal_distribution() -> None:
    assert t_inside(1.0, 100_000) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-5)


def test_a_summary_is_mean_sample_deviation_and_extremes() -> None:
    assert summarize([2.0, 4.0, 9.0]) == (3, 5.0, pytest.approx(math.sqrt(13)), 2.0, 9.0)
    assert summarize([2.0]) == (1, 2.0, None, 2.0, 2.0)


def test_a_difference_is_paired_by_seed() -> None:
    ours, theirs = {"0": 1.0, "1": 2.0, "2": 4.0}, {"2": 3.0, "1": 2.5, "0": 1.6, "7": 100.0}
    # -0.6, -0.5, +1.0: mean -1/30, sample variance 0.805 + ... = 0.8033, standard error sqrt(0.8033 / 3)
    found = difference(ours, theirs)
    assert found is not None
    assert found.seeds == 3
    assert found.mean == pytest.approx(-1 / 30)
    error = math.sqrt(((-0.6 + 1 / 30) ** 2 + (-0.5 + 1 / 30) ** 2 + (1 + 1 / 30) ** 2) / 2 / 3)
    assert found.standard_error == pytest.approx(error)
    assert found.low == pytest.approx(-1 / 30 - 4.30265273 * error)
    assert found.high == pytest.approx(-1 / 30 + 4.30265273 * error)
    assert (found.verdict, found.sign) == ("not told apart by 3 seeds", 0)


def test_a_difference_that_every_seed_shows_alike_excludes_0() -> None:
    found = difference({"0": 1.0, "1": 2.0}, {"0": 1.5, "1": 2.51})
    assert found is not None
    assert (found.verdict, found.sign) == ("the interval excludes 0", -1)


def test_one_seed_has_a_difference_but_no_interval() -> None:
    found = difference({"0": 1.0}, {"0": 1.5, "1": 3.0})
    assert found == (1, -0.5, None, None, None)
    assert (found.verdict, found.sign) == ("one seed, no interval", 0)


def test_architectures_without_a_common_seed_have_no_difference() -> None:
    assert difference({"0": 1.0}, {"1": 1.5}) is None
