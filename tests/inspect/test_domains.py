"""Domains: mutual information of known routing, and none where there is chance alone."""

import numpy as np
import pytest

from moekit.inspect.collect import BLOCKS, collect
from moekit.inspect.domains import by_favourite, domain_bits, domains, mutual_information, shares
from moekit.nn.model import Model

from .conftest import random_windows


def counts(probabilities: np.ndarray, windows: int, tokens: int, seed: int) -> np.ndarray:
    """Returns (1, domains, blocks, experts) of independent draws: `tokens` a window, dealt to blocks."""
    draw = np.random.default_rng(seed)
    found = np.zeros((1, len(probabilities), BLOCKS, probabilities.shape[1]), dtype=np.int64)
    for domain, row in enumerate(probabilities):
        for window in range(windows):
            found[0, domain, window % BLOCKS] += draw.multinomial(tokens, row)
    return found


def test_a_router_that_sorts_by_domain_tells_one_bit(sorted_by_domain: Model) -> None:
    windows = random_windows([9, 9, 9, 4, 9, 2], ["a", "b", "a", "b", "b", "a"])
    stats = collect(sorted_by_domain, windows, np.zeros(61, dtype=np.int64), 9)
    bits = domain_bits(stats.by_domain, stats.windows)
    assert bits.plain.tolist() == pytest.approx([1.0])
    assert bits.corrected.tolist() == pytest.approx([1.0])
    assert bits.error.tolist() == pytest.approx([0.0])
    found = domains(stats)
    assert "1.00 bits of 1.0 possible" in found.findings[0]
    columns = found.tables["experts"].columns
    by_expert = [dict(zip(columns, row, strict=True)) for row in found.tables["experts"].rows]
    assert [row["favourite"] for row in by_expert] == ["a", "b", None, None]
    assert [row["share_of_its_work"] for row in by_expert] == [1, 1, 0, 0]


def test_mutual_information_is_that_of_the_joint_distribution() -> None:
    share = np.random.default_rng(0).dirichlet(np.ones(5), (3, 2))  # domains, layers
    for layer in range(2):
        joint = share[:, layer] / 3
        product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        assert mutual_information(share)[layer] == pytest.approx((joint * np.log2(joint / product)).sum())


def test_chance_is_taken_off_and_a_real_difference_stays() -> None:
    uniform = np.full((4, 64), 1 / 64)
    found = [domain_bits(counts(uniform, 16, 40, seed), np.full(4, 16)) for seed in range(20)]
    plain, corrected = (np.mean([getattr(bits, name)[0] for bits in found]) for name in ("plain", "corrected"))
    assert plain > 0.05  # 640 draws of 64 experts a domain: (3 x 63) / (2 ln 2 x 2560) = 0.053 bits
    assert corrected < 0.2 * plain
    real = np.random.default_rng(1).dirichlet(np.ones(64), 4)
    truth = mutual_information(real[:, None])[0]
    found = [domain_bits(counts(real, 16, 40, seed), np.full(4, 16)) for seed in range(20)]
    assert np.mean([bits.corrected[0] for bits in found]) == pytest.approx(truth, rel=0.03)
    assert np.mean([bits.plain[0] for bits in found]) > 1.04 * truth
    spread = np.std([bits.corrected[0] for bits in found])
    assert 0.5 * spread < np.mean([bits.error[0] for bits in found]) < 2 * spread


def test_two_windows_of_a_domain_are_needed_to_tell_chance() -> None:
    one = counts(np.full((2, 8), 1 / 8), 1, 40, 0)
    bits = domain_bits(one, np.array([1, 1]))
    assert np.isnan(bits.corrected).all()
    assert np.isnan(bits.error).all()
    assert (bits.plain > 0).all()
    two = domain_bits(counts(np.full((2, 8), 1 / 8), 2, 40, 0), np.array([2, 2]))
    assert np.isfinite(two.error).all()


def test_a_domain_without_choices_has_no_share() -> None:
    found = shares(np.array([[[2, 6]], [[0, 0]]]))
    assert found.tolist() == [[[0.25, 0.75]], [[0, 0]]]


def test_experts_stand_by_favourite_domain_and_idle_ones_last() -> None:
    share = np.array([[0.0, 0.1, 0.6, 0.3], [0.0, 0.7, 0.1, 0.2]])
    order, starts = by_favourite(share)
    assert order.tolist() == [2, 3, 1, 0]
    assert starts.tolist() == [2, 3]


def test_one_domain_is_said_to_be_one(sorted_by_domain: Model) -> None:
    stats = collect(sorted_by_domain, random_windows([9, 9], ["a", "a"]), np.zeros(61, dtype=np.int64), 9)
    assert domains(stats).findings == ("there is one domain only (a), so no expert can be a specialist",)
