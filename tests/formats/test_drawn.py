"""A matrix of independent numbers is told from one that has learnt, and blamed only where the others have learnt."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moekit.formats.drawn import CLEAR, LEAST, drawn, highest, reach

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w.normal_(0, 0.006),
    "uniform": lambda w: w.uniform_(-0.05, 0.05),
    "truncated": lambda w: torch.nn.init.trunc_normal_(w, std=0.02, a=-0.04, b=0.04),
    "kaiming": lambda w: torch.nn.init.kaiming_uniform_(w, a=5**0.5),
    "signs": lambda w: w.normal_().sign_(),
    "orthogonal": lambda w: torch.nn.init.orthogonal_(w),
}


@pytest.mark.parametrize("shape", [(16, 16), (64, 96), (300, 40), (24, 500)])
@pytest.mark.parametrize("kind", DRAWS)
def test_whatever_an_initialiser_draws_stays_below_the_highest(kind: str, shape: tuple[int, int]) -> None:
    for _ in range(20):
        found = reach(DRAWS[kind](torch.empty(shape)))
        assert found is not None
        assert found < highest(*shape)
    assert found == pytest.approx(1, abs=0.2) or kind == "orthogonal"


def test_the_edge_is_that_of_marchenko_and_pastur() -> None:
    w = torch.randn(400, 700)
    exact = float(torch.linalg.svdvals(w)[0]) / (400**0.5 + 700**0.5) / float(w.square().mean().sqrt())
    assert exact == pytest.approx(1, abs=0.03)
    assert 0.95 * exact < float(reach(w) or 0) <= exact + 1e-4  # the subspace iteration comes from below


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e37])
def test_a_direction_is_seen_at_any_size_of_the_numbers(scale: float) -> None:
    w = torch.randn(64, 96) + 4 * torch.outer(torch.randn(64), torch.randn(96)) / 8
    assert float(reach(w * scale) or 0) == pytest.approx(
        float(torch.linalg.svdvals(w)[0]) / float(w.square().mean().sqrt()) / (8 + 96**0.5), rel=1e-4
    )
    assert reach(w * scale) == pytest.approx(reach(w), rel=1e-4)
    assert float(reach(w) or 0) > CLEAR


def test_of_small_empty_and_zero_matrices_nothing_is_said() -> None:
    assert reach(torch.randn(LEAST - 1, 500)) is None
    assert reach(torch.zeros(20, 20)) is None
    assert reach(torch.empty(0, 20)) is None


SHAPE = (64, 96)
EXPERTS = [f"layers.{layer}.experts.{e}.up_proj" for layer in range(2) for e in range(8)]
NAMES = [*EXPERTS, *(f"layers.{layer}.{name}" for layer in range(2) for name in ("q", "k", "v", "o")), "head"]


def blamed(reaches: dict[str, float]) -> set[str]:
    return set(drawn(reaches, dict.fromkeys(reaches, SHAPE)))


def test_a_drawn_matrix_among_learnt_ones_is_blamed_alone_or_with_all_of_its_kind() -> None:
    learnt = dict.fromkeys(NAMES, 2.0)
    assert blamed(learnt) == set()
    for wrong in ([EXPERTS[3]], EXPERTS[::2], EXPERTS, ["head"], ["layers.1.q"], ["layers.0.v", "layers.1.v"]):
        assert blamed(learnt | dict.fromkeys(wrong, 0.96)) == set(wrong)


def test_nothing_is_blamed_in_a_fresh_model_nor_in_one_that_has_just_begun() -> None:
    fresh = dict.fromkeys(NAMES, 0.96)
    assert blamed(fresh) == set()
    assert blamed(fresh | {"head": 3.0}) == set()
    assert blamed(fresh | {"head": 3.0, "layers.0.q": 2.0, "layers.1.q": 2.0}) == set()
    beginning = {name: 0.96 + 0.06 * i for i, name in enumerate(NAMES)}  # some more than others, no gap
    assert blamed(beginning) == set()
    assert blamed(dict.fromkeys(NAMES, 2.0) | {EXPERTS[0]: 0.96, EXPERTS[1]: 1.15}) == set()
