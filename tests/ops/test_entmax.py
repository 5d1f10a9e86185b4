"""Entmax-1.5 against bisection, and what it promises: a distribution with exact zeros."""

import pytest
import torch

from moekit.ops import reference
from moekit.ops.entmax import entmax15

TIGHT = {"rtol": 0, "atol": 1e-12}  # measured: 3e-16 of values, 4e-16 of gradients


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 300.0])
@pytest.mark.parametrize("experts", [1, 2, 7, 64])
def test_values_and_gradients_equal_bisection(device: torch.device, experts: int, scale: float) -> None:
    logits = (scale * torch.randn(3, 5, experts, dtype=torch.float64, device=device)).requires_grad_()
    weights = torch.randn(3, 5, experts, dtype=torch.float64, device=device)
    found, expected = entmax15(logits), reference.entmax15(logits)
    torch.testing.assert_close(found, expected, **TIGHT)
    gradients = [torch.autograd.grad((p * weights).sum(), logits)[0] for p in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], **TIGHT)


def test_the_values_that_its_authors_print(device: torch.device) -> None:
    """The example on the page of their package, entmax 1.2."""
    p = entmax15(torch.tensor([-2, 0, 0.5], device=device))
    assert [round(value, 4) for value in p.tolist()] == [0, 0.3260, 0.6740]


def test_the_gradient_is_that_of_finite_differences(device: torch.device) -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)
    assert bool((entmax15(logits) == 0).any())
    assert torch.autograd.gradcheck(entmax15, (logits,))


def test_transforms_of_torch_func_differentiate_it_twice(device: torch.device) -> None:
    logits = 2 * torch.randn(4, 6, dtype=torch.float64, device=device)
    weights, direction = torch.randn(2, *logits.shape, dtype=torch.float64, device=device)

    def f(logits: torch.Tensor) -> torch.Tensor:
        return (entmax15(logits) * weights).square().sum()

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    assert bool((entmax15(logits) == 0).any())
    torch.testing.assert_close(torch.func.grad(f)(logits), gradient(logits), rtol=0, atol=1e-12)
    along = torch.func.jvp(torch.func.grad(f), (logits,), (direction,))[1]
    step = 1e-6
    numeric = (gradient(logits + step * direction) - gradient(logits - step * direction)) / (2 * step)
    torch.testing.assert_close(along, numeric, rtol=0, atol=1e-7)


def test_it_is_a_distribution_with_exact_zeros(device: torch.device) -> None:
    p = entmax15(3 * torch.randn(200, 256, device=device))
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(200, device=device), rtol=0, atol=1e-6)  # measured: 2e-7
    assert 0 < float((p > 0).float().mean()) < 0.1
    near, far = entmax15(torch.tensor([[0.0, -1.99], [0.0, -2.0]], device=device))
    assert near[1] > 0
    assert far.tolist() == [1, 0]


@pytest.mark.parametrize("experts", [2, 3, 64, 256, 1000])
def test_equal_logits_give_equal_shares(device: torch.device, experts: int) -> None:
    p = entmax15(torch.full((2, experts), -7.0, device=device))
    assert len(p.unique()) == 1
    torch.testing.assert_close(p, torch.full_like(p, 1 / experts), rtol=1e-5, atol=0)  # measured: 9e-7


def test_a_shift_changes_nothing_and_an_order_only_the_order(device: torch.device) -> None:
    logits = torch.randn(8, 9, dtype=torch.float64, device=device)
    order = torch.randperm(9, device=device)
    torch.testing.assert_close(entmax15(logits + 1e3), entmax15(logits), **TIGHT)
    assert torch.equal(entmax15(logits[:, order]), entmax15(logits)[:, order])


def test_two_runs_agree_to_the_bit(device: torch.device) -> None:
    logits = torch.randn(64, 33, device=device, requires_grad=True)
    runs = [(p := entmax15(logits), torch.autograd.grad(p.square().sum(), logits)[0]) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_it_is_float32_whatever_comes_in(device: torch.device, low: torch.dtype) -> None:
    logits = torch.randn(4, 6, device=device).to(low)
    with torch.autocast(device.type, torch.bfloat16):
        p = entmax15(logits.requires_grad_())
    assert p.dtype == torch.float32
    assert torch.equal(p, entmax15(logits.float()))
    assert torch.autograd.grad(p[0, 0], logits)[0].dtype == low


def test_no_unit_is_fine(device: torch.device) -> None:
    logits = torch.zeros(0, 5, device=device, requires_grad=True)
    entmax15(logits).sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)
