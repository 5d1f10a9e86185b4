"""Merging: the same numbers as mixing outputs, in any number of pieces, and never more memory than allowed."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.ops import reference
from moekit.ops.kernels import merge as kernel
from moekit.ops.merge import merged_linear, mixing
from moekit.ops.routing import route, route_noisy

DIM, OUT, EXPERTS = 11, 7, 5


def operands(device: torch.device, units: int = 6, tokens: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x, mix, weight and bias, all with gradients."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    x = torch.randn(units, tokens, DIM, **options)
    mix = mixing(route_noisy(torch.randn(units, EXPERTS, **options), 2), EXPERTS)
    weight, bias = torch.randn(EXPERTS, OUT, DIM, **options), torch.randn(EXPERTS, OUT, **options)
    return tuple(t.detach().requires_grad_() for t in (x, mix, weight, bias))  # type: ignore[return-value]


def differentiated(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(9)
    return y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), inputs)


@pytest.mark.parametrize("matrices", [1, 4, 100])
def test_merging_a_linear_map_equals_mixing_outputs_in_values_and_gradients(
    device: torch.device, matrices: int
) -> None:
    x, mix, weight, bias = operands(device)
    merged = merged_linear(x, mix, weight, bias, max_bytes=matrices * weight[0].nbytes)
    of_token = mix.repeat_interleave(x.shape[1], 0)
    mixed = reference.mixed_linear(x.flatten(0, 1), of_token, weight, bias).view_as(merged)
    inputs = (x, mix, weight, bias)
    torch.testing.assert_close(differentiated(merged, inputs), differentiated(mixed, inputs))


@pytest.mark.parametrize(
    ("rows", "weights", "bound"),
    # measured worst over five seeds: 1.1e-6 and 6.3e-3 by our kernels, 2.4e-6 and 7.4e-3 by torch's
    [
        (torch.float32, torch.float32, 3e-6),
        (torch.bfloat16, torch.float32, 3e-2),
        (torch.bfloat16, torch.bfloat16, 3e-2),
    ],
    ids=["float32", "mixed", "bfloat16"],
)
@pytest.mark.parametrize(
    ("units", "tokens", "experts", "out", "dim"),
    [(6, 3, 5, 7, 11), (1, 40, 2, 33, 64), (5, 70, 3, 129, 160), (9, 1, 20, 31, 300)],
)
def test_working_dtypes_stay_within_rounding_of_float64(
    device: torch.device,
    rows: torch.dtype,
    weights: torch.dtype,
    bound: float,
    units: int,
    tokens: int,
    experts: int,
    out: int,
    dim: int,
) -> None:
    x, weight = torch.randn(units, tokens, dim, device=device), torch.randn(experts, out, dim, device=device)
    mix = torch.rand(units, experts, device=device) * (torch.rand(units, experts, device=device) < 0.5)
    inputs = [t.to(dtype).requires_grad_() for t, dtype in ((x, rows), (mix, torch.float32), (weight, weights))]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with torch.autocast(device.type, rows, enabled=rows != weights):
        found = differentiated(merged_linear(*inputs), inputs)
    merged = torch.einsum("utd,ue,eod->uto", *exact)
    torch.manual_seed(9)
    probe = torch.randn_like(found[0])
    expected = (merged, *torch.autograd.grad(merged, exact, probe.double()))
    assert [t.dtype for t in found] == [rows, rows, torch.float32, weights]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max()


def test_gradients_agree_with_finite_differences(device: torch.device) -> None:
    assert torch.autograd.gradcheck(merged_linear, operands(device, units=3, tokens=2))


def test_one_hot_weights_are_that_expert(device: torch.device) -> None:
    x, _, weight, bias = operands(device, units=EXPERTS)
    y = merged_linear(x, torch.eye(EXPERTS, dtype=x.dtype, device=device), weight, bias)
    for expert in range(EXPERTS):
        torch.testing.assert_close(y[expert], x[expert] @ weight[expert].T + bias[expert])


@pytest.mark.parametrize(("units", "tokens"), [(0, 3), (2, 0), (1, 1)])
def test_nothing_and_one_token_are_fine(device: torch.device, units: int, tokens: int) -> None:
    inputs = operands(device, units, tokens)
    y, *gradients = differentiated(merged_linear(*inputs), inputs)
    assert y.shape == (units, tokens, OUT)
    assert [g.shape for g in gradients] == [t.shape for t in inputs]


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(device: torch.device) -> None:
    x, mix, weight, bias = operands(device)
    _, *expected = differentiated(merged_linear(x, mix, weight, bias), (x, mix))
    frozen = merged_linear(x, mix, weight.detach(), bias.detach())
    torch.testing.assert_close(differentiated(frozen, (x, mix))[1:], tuple(expected))


def test_coefficients_stay_float32_under_autocast(device: torch.device) -> None:
    x, mix, weight, bias = (t.detach().float().requires_grad_() for t in operands(device))
    with torch.autocast(device.type, torch.bfloat16):
        y = merged_linear(x, mix, weight, bias)
    assert y.dtype == torch.bfloat16
    exact = merged_linear(x, mix, weight, bias)
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.1)
    gradients = torch.autograd.grad(y.float().square().sum(), (x, mix, weight, bias))
    assert [g.dtype for g in gradients] == [torch.float32] * 4


class _Largest(TorchDispatchMode):
    """Remembers the largest result with one merged matrix a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        product = func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        if product and result.shape[1:].numel() == DIM * OUT:
            self.matrices = max(self.matrices, len(result))
        return result


@pytest.mark.parametrize("matrices", [1, 3])
def test_no_more_merged_matrices_exist_at_once_than_the_bound_holds(device: torch.device, matrices: int) -> None:
    x, mix, weight, bias = operands(device, units=8)
    with _Largest() as largest:
        y = merged_linear(x, mix, weight, bias, max_bytes=matrices * weight[0].nbytes)
        torch.autograd.grad(y.sum(), (x, mix))
    assert largest.matrices == matrices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_to_the_bit_and_ours_whatever_the_threads(device: torch.device, dtype: torch.dtype) -> None:
    x, mix = torch.randn(9, 40, 300, device=device), torch.rand(9, EXPERTS, device=device)
    inputs = [t.to(dtype).requires_grad_() for t in (x, mix, torch.randn(EXPERTS, 150, 300, device=device))]
    threads, runs = torch.get_num_threads(), []
    others = [3, 1] if kernel.has_kernel(inputs[0], inputs[2]) else []
    for n in (threads, threads, *others):
        torch.set_num_threads(n)
        runs.append(differentiated(merged_linear(*inputs), inputs))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_mixing_puts_each_weight_at_its_expert_and_nothing_where_a_unit_is_padding(device: torch.device) -> None:
    logits = torch.randn(4, EXPERTS, device=device)
    routing = route(logits, 2, mask=torch.tensor([True, True, False, True], device=device))
    mix = mixing(routing, EXPERTS)
    for unit in range(4):
        expected = {} if unit == 2 else dict(zip(routing.expert_ids[unit].tolist(), routing.weights[unit], strict=True))
        assert [float(w) for w in mix[unit]] == [float(expected.get(e, 0)) for e in range(EXPERTS)]
