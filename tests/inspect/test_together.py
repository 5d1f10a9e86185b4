"""Pairs: independent choices give ratios of 1 whatever the loads, partners are found."""

from collections.abc import Callable

import numpy as np
import torch

from moekit.config import ModelConfig
from moekit.inspect.collect import collect
from moekit.inspect.together import expected_pairs, together
from moekit.nn.model import Model

from .conftest import random_windows


def pairs_of(chosen: np.ndarray) -> np.ndarray:
    return np.asarray(chosen.T @ chosen)


def test_expected_pairs_keep_the_partners_of_each_expert() -> None:
    draw = np.random.default_rng(0)
    chosen = np.zeros((500, 9), dtype=np.int64)
    for row in chosen:
        row[draw.choice(9, 3, replace=False, p=np.arange(1, 10) / 45)] = 1
    counts = pairs_of(chosen)
    expected = expected_pairs(counts)
    np.fill_diagonal(counts, 0)
    assert np.allclose(expected.sum(1), counts.sum(1), rtol=1e-6)
    assert np.allclose(expected, expected.T)
    assert (np.diag(expected) == 0).all()


def test_choices_without_preference_have_ratios_of_one_even_with_a_busy_expert() -> None:
    draw = np.random.default_rng(0)
    chosen = np.zeros((40_000, 8), dtype=np.int64)
    chosen[:, 0] = 1  # everyone's first choice
    chosen[np.arange(40_000), draw.integers(1, 8, 40_000)] = 1
    expected = expected_pairs(pairs_of(chosen))
    ratio = pairs_of(chosen)[0, 1:] / expected[0, 1:]
    assert np.abs(ratio - 1).max() < 0.01  # a limit of the model: fitted to half a per cent
    assert expected[1:, 1:].max() < 40  # pairs that cannot be, of about 5,700 each


def test_an_expert_that_was_never_chosen_has_no_pairs() -> None:
    counts = np.array([[5, 5, 0], [5, 5, 0], [0, 0, 0]])
    assert np.allclose(expected_pairs(counts), [[0, 5, 0], [5, 0, 0], [0, 0, 0]], atol=1e-6)
    assert (expected_pairs(np.zeros((3, 3), dtype=np.int64)) == 0).all()


def test_experts_that_work_as_one_are_the_closest_pair(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config(ffn={"topk_method": "hash"})).eval()
    for layer in model.moe_layers:
        table = layer.router.table.clone()
        table[:, 0] = torch.randint(2, (61,))  # 0 or 1, then 2, 3 or 4
        table[:, 1], table[:, 2] = 2, 3
        table[table[:, 0] == 1, 1], table[table[:, 0] == 1, 2] = 4, 5
        layer.router.fill(table)
    stats = collect(model, random_windows([50] * 4, ["a", "b", "b", "a"]), np.zeros(61, dtype=np.int64), 50)
    found = together(stats)
    listed = {row[1:3] for row in found.tables["pairs"].rows if row[0] == 0 and row[5] > 1.5}
    assert listed == {(0, 2), (0, 3), (2, 3), (1, 4), (1, 5), (4, 5)}
    never = found.tables["layers"].columns.index("never")
    assert [row[never] for row in found.tables["layers"].rows] == [9, 9]


def test_one_choice_makes_no_pairs(sorted_by_domain: Model) -> None:
    stats = collect(sorted_by_domain, random_windows([9, 9], ["a", "b"]), np.zeros(61, dtype=np.int64), 9)
    assert together(stats).tables == {}
