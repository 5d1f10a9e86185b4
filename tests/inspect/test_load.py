"""Load: what is known of a model whose routing is known."""

from collections.abc import Callable

import numpy as np
import pytest

from moekit.config import ModelConfig
from moekit.inspect.collect import collect
from moekit.inspect.load import load, measure
from moekit.nn.model import Model

from .conftest import random_windows

KIND = np.zeros(61, dtype=np.int64)


def test_dead_and_dominant_experts_are_found_where_they_are(sorted_by_domain: Model) -> None:
    stats = collect(sorted_by_domain, random_windows([10, 10, 10, 10], ["a", "b", "a", "a"]), KIND, 10)
    found = load(stats)
    measured = measure(stats)
    assert stats.load.tolist() == [[30, 10, 0, 0]]
    assert measured["dead"].tolist() == [2]
    assert measured["dominant"].tolist() == [0]
    assert measured["max_load"][0] == pytest.approx(3)
    bits = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert measured["entropy"][0] == pytest.approx(bits / 2)
    assert found.findings[0] == "2 dead experts (2 in layer 0)"
    assert "expert 0 of layer 0, with 3.0 times" in found.findings[1]
    experts = found.tables["experts"]
    assert [row[experts.columns.index("load")] for row in experts.rows] == [3, 1, 0, 0]
    assert experts.rows[2][experts.columns.index("mean_weight")] is None


def test_entropy_and_margin_are_those_of_the_scores(sorted_by_domain: Model) -> None:
    stats = collect(sorted_by_domain, random_windows([8, 8], ["a", "b"]), KIND, 8)
    scale = 18**0.5  # RMSNorm of a vector of one 1 among 18
    scores = np.exp([3 * scale, 0, 0, 0]) / np.exp([3 * scale, 0, 0, 0]).sum()
    measured = measure(stats)
    assert measured["token_entropy"][0] == pytest.approx(-(scores * np.log2(scores)).sum(), rel=1e-3)
    assert measured["margin_p50"][0] == pytest.approx(scores[0] - scores[1], rel=0.1)
    assert measured["weight_sum"][0] == pytest.approx(scores[0], rel=1e-5)


def test_a_hash_router_has_no_entropy_and_no_margin(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config(ffn={"topk_method": "hash"})).eval()
    found = load(collect(model, random_windows([8, 8], ["a", "b"]), KIND, 8))
    row = dict(zip(found.tables["layers"].columns, found.tables["layers"].rows[0], strict=True))
    assert row["token_entropy"] is row["margin_p50"] is None
    assert row["weight_sum"] == pytest.approx(1)
    assert any("no scores" in finding for finding in found.findings)
    percentiles = {row[0]: row[1:] for row in found.tables["percentiles"].rows}
    assert percentiles["margin_p50"] == (None, None, None)
    assert percentiles["weight_sum"] == (1.0, 1.0, 1.0)
