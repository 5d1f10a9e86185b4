"""Merging: the same numbers as mixing outputs, in any number of pieces, and never more memory than allowed."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekit.ops import reference
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


def test_two_runs_are_equal_to_the_bit(device: torch.device) -> None:
    inputs = operands(device, units=9, tokens=5)
    first, second = (differentiated(merged_linear(*inputs), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_mixing_puts_each_weight_at_its_expert_and_nothing_where_a_unit_is_padding(device: torch.device) -> None:
    logits = torch.randn(4, EXPERTS, device=device)
    routing = route(logits, 2, mask=torch.tensor([True, True, False, True], device=device))
    mix = mixing(routing, EXPERTS)
    for unit in range(4):
        expected = {} if unit == 2 else dict(zip(routing.expert_ids[unit].tolist(), routing.weights[unit], strict=True))
        assert [float(w) for w in mix[unit]] == [float(expected.get(e, 0)) for e in range(EXPERTS)]
