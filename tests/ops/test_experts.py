"""The experts' products: every back end equals the loop over experts, output and every gradient."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from moekit.ops import reference
from moekit.ops.experts import swiglu_experts

COUNTS = {
    "odd sizes": [3, 5, 1, 7],
    "an expert is empty": [4, 0, 6, 1],
    "first and last are empty": [0, 3, 9, 0],
    "one row": [0, 1, 0, 0],
    "no row": [0, 0, 0, 0],
    "all in one": [0, 0, 13, 0],
    "more than a block": [64, 65, 1, 130],
}


def weights(device: torch.device, dtype: torch.dtype, dim: int = 5, ff: int = 3) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(4, 2 * ff, dim, dtype=dtype, device=device, requires_grad=True)
    down = torch.randn(4, dim, ff, dtype=dtype, device=device, requires_grad=True)
    return gate_up, down


def loop(rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """Returns the reference, expert by expert; rows behind the last expert's are zero."""
    starts = [0, *accumulate(counts)]
    parts = [reference.swiglu(rows[starts[e] : starts[e + 1]], gate_up[e], down[e]) for e in range(len(counts))]
    return torch.cat((*parts, torch.zeros_like(rows[starts[-1] :])))


def compare(
    rows: Tensor, gate_up: Tensor, down: Tensor, counts: list[int], backend: str | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Returns (ours, reference in float64) for the output and the gradients of rows, gate_up and down."""
    probe = torch.randn_like(rows)
    y = swiglu_experts(rows, gate_up, down, torch.tensor(counts, device=rows.device), backend)
    ours = (y, *torch.autograd.grad(y, (rows, gate_up, down), probe))
    exact = [t.detach().double().requires_grad_() for t in (rows, gate_up, down)]
    z = loop(*exact, counts)
    return list(zip(ours, (z, *torch.autograd.grad(z, exact, probe.double())), strict=True))


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the largest error relative to the largest value of each tensor."""
    errors = [(a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9) for a, b in pairs if a.numel()]
    return float(torch.stack(errors).max().detach())  # a NaN stays one


@pytest.mark.parametrize("dropped", [0, 4])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_experts_equal_the_loop_in_float64(device: torch.device, counts: list[int], dropped: int) -> None:
    rows = torch.randn(sum(counts) + dropped, 5, dtype=torch.float64, device=device, requires_grad=True)
    for ours, expected in compare(rows, *weights(device, torch.float64), counts):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropped", [0, 4])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # measured worst over these cases and five seeds: 6e-7 and 9e-3
    [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)],
    ids=["float32", "bfloat16 with rounded group sizes"],
)
def test_experts_stay_within_rounding_of_the_loop(
    device: torch.device, counts: list[int], dropped: int, dtype: torch.dtype, bound: float
) -> None:
    rows = torch.randn(sum(counts) + dropped, 16, dtype=dtype, device=device, requires_grad=True)
    pairs = compare(rows, *weights(device, dtype, dim=16, ff=8), counts)
    assert all(ours.dtype == dtype for ours, _ in pairs)
    assert worst(pairs) < bound


@pytest.mark.parametrize("dropped", [0, 4])
@pytest.mark.parametrize("counts", [c for c in COUNTS.values() if sum(c)], ids=[n for n, c in COUNTS.items() if sum(c)])
def test_grouped_back_end_equals_the_loop(device: torch.device, counts: list[int], dropped: int) -> None:
    rows = torch.randn(sum(counts) + dropped, 16, dtype=torch.bfloat16, device=device, requires_grad=True)
    pairs = compare(rows, *weights(device, torch.bfloat16, dim=16, ff=8), counts, "grouped")
    assert worst(pairs) < 3e-2  # measured 9e-3
    assert (pairs[0][0][sum(counts) :] == 0).all()
    assert (pairs[1][0][sum(counts) :] == 0).all()


def test_gradcheck_with_an_empty_expert_and_dropped_rows(device: torch.device) -> None:
    rows = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    counts = torch.tensor([2, 0, 1, 2], device=device)
    assert torch.autograd.gradcheck(
        lambda *args: swiglu_experts(*args, counts), (rows, *weights(device, torch.float64)), atol=1e-6
    )


def test_non_contiguous_inputs_and_gradients_change_nothing(device: torch.device) -> None:
    counts = torch.tensor([3, 0, 2, 1], device=device)
    rows = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    gate_up = torch.randn(4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    down = torch.randn(4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    probe = torch.randn(5, 6, dtype=torch.float64, device=device)

    def run(copy: bool) -> tuple[Tensor, ...]:
        args = [rows.T, gate_up.transpose(1, 2), down.transpose(1, 2)]
        y = swiglu_experts(*([a.contiguous() for a in args] if copy else args), counts)
        return (y, *torch.autograd.grad(y, (rows, gate_up, down), probe.T))

    for a, b in zip(run(copy=False), run(copy=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_to_the_bit(device: torch.device, dtype: torch.dtype) -> None:
    rows = torch.randn(70, 16, dtype=dtype, device=device, requires_grad=True)
    gate_up, down = weights(device, dtype, dim=16, ff=8)
    counts = torch.tensor([30, 0, 33, 5], device=device)

    def run() -> tuple[Tensor, ...]:
        y = swiglu_experts(rows, gate_up, down, counts)
        return (y, *torch.autograd.grad(y.float().square().sum(), (rows, gate_up, down)))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_row_depends_on_no_other_row(device: torch.device) -> None:
    gate_up, down = (w.detach() for w in weights(device, torch.float64))
    rows = torch.randn(6, 5, dtype=torch.float64, device=device)
    counts = torch.tensor([2, 0, 3, 1], device=device)
    before = swiglu_experts(rows, gate_up, down, counts)
    rows[3] += 1
    changed = (swiglu_experts(rows, gate_up, down, counts) != before).any(1)
    assert changed.tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize("frozen", ["gate_up", "down"])
def test_a_frozen_weight_gets_no_gradient_and_changes_no_other(device: torch.device, frozen: str) -> None:
    gate_up, down = weights(device, torch.float64)
    rows = torch.randn(16, 5, dtype=torch.float64, device=device, requires_grad=True)
    counts = torch.tensor(COUNTS["odd sizes"], device=device)
    trained = {"gate_up": gate_up, "down": down}
    full = torch.autograd.grad(swiglu_experts(rows, gate_up, down, counts).sum(), (rows, gate_up, down))
    expected = dict(zip(("rows", "gate_up", "down"), full, strict=True))
    trained[frozen].requires_grad_(False)
    swiglu_experts(rows, gate_up, down, counts).sum().backward()
    assert trained[frozen].grad is None
    for name, tensor in {"rows": rows, **trained}.items():
        assert name == frozen or torch.equal(tensor.grad, expected[name])
