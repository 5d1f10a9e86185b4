"""Kinds of tokens and positions: lifts against a recount, information against its definition."""

from collections.abc import Callable

import numpy as np
import pytest

from moekit.config import ModelConfig
from moekit.inspect.collect import collect
from moekit.inspect.kinds import entropy_bits, group_bits, kinds, lift, positions
from moekit.inspect.vocabulary import KINDS
from moekit.nn.model import Model

from .conftest import random_windows


def test_lift_is_the_ratio_of_shares() -> None:
    counts = np.array([[[6, 2, 0], [2, 6, 0]], [[1, 0, 0], [0, 0, 3]]])
    found = lift(counts)
    assert found[0, 0].tolist()[:2] == [1.5, 0.5]
    assert np.isnan(found[0, :, 2]).all()
    assert found[1, 0, 0] == pytest.approx(4)
    assert group_bits(counts)[1] == pytest.approx(entropy_bits(np.array([1, 3])))


def test_an_expert_of_one_kind_is_found_and_others_have_no_preference(sorted_by_domain: Model) -> None:
    kind_of = np.where(np.arange(61) < 30, KINDS.index("digits"), KINDS.index("CJK"))
    stats = collect(sorted_by_domain, random_windows([10, 10, 10], ["a", "b", "b"]), kind_of, 10)
    found = kinds(stats)
    columns = found.tables["experts"].columns
    told = {(row[1], row[2]): dict(zip(columns, row, strict=True)) for row in found.tables["experts"].rows}
    assert told["digits", 0]["lift"] == pytest.approx(3)
    assert told["digits", 1]["lift"] == 0
    assert told["CJK", 1]["choices"] == 20
    assert told["CJK", 2]["lift"] is None
    assert found.tables["text"].rows == [("CJK", 20, 0.66667), ("digits", 10, 0.33333)]
    assert found.tables["layers"].rows[0][1] == pytest.approx(entropy_bits(np.array([1, 2])), rel=1e-4)


def test_positions_are_counted_in_ranges_of_powers_of_two(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config()).eval()
    windows = random_windows([13, 4, 9], ["a", "b", "a"])
    stats = collect(model, windows, np.zeros(61, dtype=np.int64), 13)
    found = positions(stats)
    assert found.tables["text"].rows == [
        ("0", 3, 0.11538),
        ("1", 3, 0.11538),
        ("2-3", 6, 0.23077),
        ("4-7", 8, 0.30769),
        ("8-12", 6, 0.23077),
    ]
    rows = [row for row in found.tables["experts"].rows if row[0] == 1 and row[1] == "4-7"]
    assert [row[3] for row in rows] == stats.by_position[1, 4:8].sum(0).tolist()


def test_positions_that_no_window_reaches_are_left_out(tiny_config: Callable[..., ModelConfig]) -> None:
    stats = collect(Model(tiny_config()).eval(), random_windows([3], ["a"]), np.zeros(61, dtype=np.int64), 32)
    assert [row[0] for row in positions(stats).tables["text"].rows] == ["0", "1", "2-3"]
