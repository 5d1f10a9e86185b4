"""The paper's probes: which numbers of experts, identities that need no reference, and what cannot be asked."""

import re
from collections.abc import Callable
from html import unescape
from typing import Any

import numpy as np
import pytest
import torch

from moekit.config import ModelConfig
from moekit.data import Batch
from moekit.errors import ConfigError, UnsupportedError
from moekit.inspect.losses import Batches
from moekit.inspect.probes import disable_top, fewer_active, probes, whole, without_shared
from moekit.inspect.result import Analysis
from moekit.nn.model import Model

Make = Callable[..., ModelConfig]
MEAN, DOMAINS = "mean over domains", "by domain"


def text() -> Batches:
    """Two domains of three random windows each."""
    draw = np.random.default_rng(0)
    for domain in ("prose", "verse"):
        tokens = draw.integers(0, 61, (3, 11))
        yield domain, Batch(tokens[:, :-1], tokens[:, 1:], np.zeros((3, 10), dtype=np.int64))


def rows(analysis: Analysis, table: str = MEAN) -> list[dict[str, Any]]:
    columns, found = analysis.tables[table]
    return [dict(zip(columns, row, strict=True)) for row in found]


def column(analysis: Analysis, name: str, table: str = MEAN) -> list[Any]:
    return [row[name] for row in rows(analysis, table)]


@pytest.fixture
def build(tiny_config: Make) -> Callable[..., Model]:
    return lambda **ffn: Model(tiny_config(ffn=ffn)).double()


Build = Callable[..., Model]


def test_a_fraction_of_63_and_of_16_is_the_nearest_whole_number() -> None:
    assert [whole(n / 16, 63) for n in range(5)] == [0, 4, 8, 12, 16]
    assert [whole(n / 16, 16) for n in range(5)] == [0, 1, 2, 3, 4]
    assert (whole(0.5, 5), whole(1 / 16, 7), whole(1, 7)) == (3, 0, 7)


def test_rows_are_the_points_of_the_paper_with_the_numbers_that_they_come_to(build: Build) -> None:
    found = disable_top(build(n_routed_experts=63, num_experts_per_tok=7), text())
    expected = [0, 4, 8, 12, 16, 4, 8, 12, 16]
    assert column(found, "masked") == expected
    assert column(found, "softmax") == ["over all"] * 5 + ["over the rest"] * 4
    assert column(found, "fraction")[:5] == [0, 1 / 16, 1 / 8, 3 / 16, 1 / 4]
    assert column(found, "domain", DOMAINS) == ["prose", "verse"] * 9
    assert column(found, "windows") == [6] * 9
    assert rows(found)[0]["ratio"] == 1
    assert all(row["difference"] != 0 for row in rows(found)[1:])
    paper = found.tables["in the paper"].rows
    assert paper[1] == ("DeepSeekMoE", 1 / 16, 7.468, 7.468 / 1.808)
    fewer = fewer_active(build(n_routed_experts=63, num_experts_per_tok=7), text())
    assert column(fewer, "routed") == [3, 4, 5, 6, 7]
    shared = without_shared(build(n_shared_experts=2, num_experts_per_tok=3), text())
    assert [(row["shared"], row["routed"]) for row in rows(shared)] == [(2, 3), (0, 5), (0, 3)]


@torch.no_grad()
def test_experts_that_are_all_alike_and_weigh_one_together_can_replace_each_other(build: Build) -> None:
    model = build(n_routed_experts=16, num_experts_per_tok=3, norm_topk_prob=True)
    for layer in model.moe_layers:
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight))
    for found in (disable_top(model, text()), fewer_active(model, text(), range(1, 17))):
        assert max(abs(off) for off in column(found, "difference")) < 1e-10
    assert column(disable_top(model, text()), "softmax") == ["over all"] * 5  # over the rest would be the same
    raw = build(n_routed_experts=16, num_experts_per_tok=3)
    assert abs(rows(disable_top(raw, text()))[-1]["difference"]) > 1e-6


@torch.no_grad()
def test_shared_experts_that_say_nothing_are_not_missed(build: Build) -> None:
    model = build(n_shared_experts=2)
    for layer in model.moe_layers:
        layer.shared_experts.down_proj.weight.zero_()
    unaltered, replaced, plain = rows(without_shared(model, text()))
    assert plain["difference"] == 0
    more = rows(fewer_active(model, text(), [5]))[-1]
    assert replaced["loss"] == more["loss"] != unaltered["loss"]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_k_experts_are_those_of_a_model_that_was_made_with_k(build: Build, k: int) -> None:
    model, made = build(), build(num_experts_per_tok=k)
    made.load_state_dict(model.state_dict())
    (found,) = (row for row in rows(fewer_active(model, text(), [k])) if row["routed"] == k)
    assert found["loss"] == rows(fewer_active(made, text(), [1, 2]))[[1, 2, 5].index(k)]["loss"]


def test_two_models_stand_in_one_table_as_each_stands_alone(build: Build) -> None:
    model, other = build(), build(n_routed_experts=5, num_experts_per_tok=2, n_shared_experts=0)
    found = disable_top(model, text(), other=other, names=("fine", "coarse"))
    for name, one in (("fine", model), ("coarse", other)):
        alone = disable_top(one, text(), names=(name, "none"))
        assert [row for row in found.tables[MEAN].rows if row[0] == name] == alone.tables[MEAN].rows
    for picture in list(found.pictures.values())[:2]:
        shown = unescape(re.sub("<[^>]*>", "", picture))
        assert all(name in shown for name in ("fine", "coarse", "fine, softmax over the rest"))


def test_who_has_no_shared_experts_has_no_loss_without_them_and_says_why(build: Build) -> None:
    bare = build(n_shared_experts=0)
    found = rows(without_shared(build(), text(), bare))
    assert [row["loss"] is None for row in found] == [False] * 4 + [True] * 2
    assert found[-1]["note"] == "probe.shared is false but n_shared_experts is 0: there is nothing to take away"
    with pytest.raises(ConfigError, match="n_shared_experts is 0"):
        without_shared(bare, text())
    assert [one.name for one in probes(bare, text())] == ["disable_top", "fewer_active"]


def test_more_than_is_left_is_a_row_without_a_loss(build: Build) -> None:
    model = build(num_experts_per_tok=6)
    found = rows(disable_top(model, text()))[:5]
    assert [(row["masked"], row["loss"] is None) for row in found] == [
        (0, False), (0, False), (1, False), (1, False), (2, True),
    ]  # fmt: skip
    assert found[-1]["note"].startswith("num_experts_per_tok is 6 but 5 of the 7 routed experts are left")
    with pytest.raises(ConfigError, match="num_experts_per_tok is 6 but 2 of the 7 routed experts are left"):
        disable_top(model, text(), [0.75])


def test_what_has_no_scores_or_no_experts_cannot_be_asked(build: Build) -> None:
    hashed = build(topk_method="hash")
    assert [one.name for one in probes(hashed, text())] == ["without_shared"]
    for ask in (disable_top, fewer_active):
        with pytest.raises(UnsupportedError, match="topk_method is hash"):
            ask(hashed, text())
    dense = build(kind="dense")
    with pytest.raises(ConfigError, match=r"model has no routed experts to probe: its ffn\.kind is dense"):
        probes(dense, text())
    with pytest.raises(ConfigError, match="other has no routed experts"):
        probes(build(), text(), dense)
    with pytest.raises(ConfigError, match="nothing would be altered"):
        disable_top(build(), text(), [0])
    with pytest.raises(ConfigError, match="the two models are both called 'a'"):
        probes(build(), text(), build(), names=("a", "a"))


def test_all_three_of_one_pass_are_the_three_alone_and_leave_the_model_as_it_was(build: Build) -> None:
    model = build(n_routed_experts=16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    together = probes(model, text())
    alone = [disable_top(model, text()), without_shared(model, text()), fewer_active(model, text())]
    assert together == alone
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for analysis in together:
        assert analysis.reading.count(".") >= 3
        assert len(analysis.pictures) == 3
        for table in analysis.tables.values():
            assert all(len(row) == len(table.columns) for row in table.rows)
