"""Dispatch: every pair reaches its expert's rows and comes back, values and gradients."""

import pytest
import torch
from torch import Tensor

from moekit.ops import dispatch
from moekit.ops.routing import DROPPED

SHAPES = {
    "odd": (11, 7, 3),
    "one token": (1, 7, 3),
    "no token": (0, 7, 3),
    "k is all": (5, 4, 4),
    "one expert": (6, 1, 1),
}


def choices(device: torch.device, tokens: int, experts: int, k: int) -> Tensor:
    return torch.rand(tokens, experts, device=device).argsort(1)[:, :k]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rows_are_sorted_by_expert_and_stable_within_one(device: torch.device, shape: tuple[int, int, int]) -> None:
    tokens, experts, k = shape
    ids = choices(device, *shape)
    plan = dispatch.plan(ids, experts)
    pairs = [(e, t * k + n) for t, row in enumerate(ids.tolist()) for n, e in enumerate(row)]
    assert plan.order.tolist() == [pair for _, pair in sorted(pairs)]
    assert plan.order[plan.inverse].tolist() == list(range(tokens * k))
    assert plan.tokens_per_expert.tolist() == [sum(e == i for e, _ in pairs) for i in range(experts)]


def test_dropped_pairs_lie_behind_all_experts_and_are_not_counted(device: torch.device) -> None:
    ids = torch.tensor([[DROPPED, 1], [0, DROPPED], [1, 0]], device=device)
    plan = dispatch.plan(ids, 3)
    assert plan.order.tolist() == [2, 5, 1, 4, 0, 3]
    assert plan.tokens_per_expert.tolist() == [2, 2, 0]


@pytest.mark.parametrize("id_", [-2, 4])
def test_an_id_of_no_expert_is_an_error(id_: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match=r"-1 to 2|out of bounds"):
        dispatch.plan(torch.tensor([[0, 1], [2, id_]]), 3)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gather_and_combine_equal_plain_indexing_with_every_gradient(
    device: torch.device, shape: tuple[int, int, int]
) -> None:
    tokens, experts, k = shape
    plan = dispatch.plan(choices(device, *shape), experts)
    x = torch.randn(tokens, 5, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(tokens, k, dtype=torch.float64, device=device, requires_grad=True)
    scale = torch.randn(tokens * k, 5, dtype=torch.float64, device=device)  # stands for the experts
    probe = torch.randn(tokens, 5, dtype=torch.float64, device=device)

    rows = dispatch.gather(x, plan, k)
    y = dispatch.combine(rows * scale, weights, plan)
    gradients = torch.autograd.grad((y * probe).sum(), (x, weights))

    expected_rows = x.repeat_interleave(k, dim=0)[plan.order]
    expected = ((expected_rows * scale)[plan.inverse].view(tokens, k, 5) * weights.unsqueeze(-1)).sum(1)
    expected_gradients = torch.autograd.grad((expected * probe).sum(), (x, weights))
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-12)


def test_gradcheck_of_gather_and_combine_with_dropped_pairs(device: torch.device) -> None:
    ids = choices(device, 5, 4, 2)
    ids[1, 0] = ids[3] = DROPPED
    plan = dispatch.plan(ids, 4)
    x = torch.randn(5, 3, dtype=torch.float64, device=device, requires_grad=True)
    rows = torch.randn(10, 3, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dispatch.gather(x, plan, 2), (x,))
    assert torch.autograd.gradcheck(lambda rows, weights: dispatch.combine(rows, weights, plan), (rows, weights))


def test_non_contiguous_inputs_and_gradients_change_nothing(device: torch.device) -> None:
    plan = dispatch.plan(choices(device, 6, 4, 2), 4)
    x = torch.randn(3, 6, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(2, 6, dtype=torch.float64, device=device, requires_grad=True)
    probe = torch.randn(3, 6, dtype=torch.float64, device=device)

    def run(copy: bool) -> tuple[Tensor, ...]:
        a, w = (x.T.contiguous(), weights.T.contiguous()) if copy else (x.T, weights.T)
        y = dispatch.combine(dispatch.gather(a, plan, 2), w, plan)
        return (y, *torch.autograd.grad(y, (x, weights), probe.T))

    for a, b in zip(run(copy=False), run(copy=True), strict=True):
        assert torch.equal(a, b)


def test_two_runs_are_equal_to_the_bit(device: torch.device) -> None:
    plan = dispatch.plan(choices(device, 64, 8, 4), 8)
    x = torch.randn(64, 32, device=device, requires_grad=True)
    weights = torch.rand(64, 4, device=device, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        y = dispatch.combine(dispatch.gather(x, plan, 4).sin(), weights, plan)
        return (y, *torch.autograd.grad(y.square().sum(), (x, weights)))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_backward_leaves_the_incoming_gradient_alone(device: torch.device) -> None:
    plan = dispatch.plan(choices(device, 6, 4, 2), 4)
    rows = torch.randn(12, 3, device=device, requires_grad=True)
    weights = torch.rand(6, 2, device=device, requires_grad=True)
    probe = torch.randn(6, 3, device=device)
    kept = probe.clone()
    torch.autograd.grad(dispatch.combine(rows, weights, plan), (rows, weights), probe)
    assert torch.equal(probe, kept)


def test_bf16_combine_is_within_rounding_of_float32(device: torch.device) -> None:
    plan = dispatch.plan(choices(device, 50, 8, 6), 8)
    rows, weights = torch.randn(300, 16, device=device).bfloat16(), torch.rand(50, 6, device=device)
    low, high = dispatch.combine(rows, weights, plan), dispatch.combine(rows.float(), weights, plan)
    assert low.dtype == torch.bfloat16
    assert (low.float() - high).abs().max() < 0.04  # measured 0.024, with outputs up to 6.8
