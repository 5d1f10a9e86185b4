"""The fused loss equals the plain one, output and every gradient, chunked or not."""

import pytest
import torch
from torch import Tensor

from moekit.ops import loss, reference
from moekit.ops.loss import IGNORED, linear_cross_entropy


def inputs(
    device: torch.device, dtype: torch.dtype = torch.float64, tokens: int = 13, vocab: int = 11
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, 6, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(vocab, 6, dtype=dtype, device=device, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,), device=device)
    targets[::3] = IGNORED
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    h, w = hidden.detach().double().cpu().requires_grad_(), weight.detach().double().cpu().requires_grad_()
    total = reference.cross_entropy(h @ w.T, targets.cpu())
    return (total, *torch.autograd.grad(3 * total, (h, w)))


@pytest.mark.parametrize("rows_at_once", [1, 5, 13, 1000])
def test_sum_and_gradients_equal_the_reference_in_chunks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 8 * 11 * rows_at_once)
    hidden, weight, targets = inputs(device)
    total, tokens = linear_cross_entropy(hidden, weight, targets)
    ours = (total, *torch.autograd.grad(3 * total, (hidden, weight)))
    for a, b in zip(ours, plain(hidden, weight, targets), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-11)
    assert tokens == 8


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)],  # measured, relative: 4e-7 and 7e-3
)
@pytest.mark.parametrize("vocab", [11, 70])
def test_working_precisions_stay_within_rounding(
    device: torch.device, dtype: torch.dtype, bound: float, vocab: int
) -> None:
    hidden, weight, targets = inputs(device, dtype, tokens=100, vocab=vocab)
    total = linear_cross_entropy(hidden, weight, targets).total
    assert total.dtype == torch.float32
    ours = (total, *torch.autograd.grad(3 * total, (hidden, weight)))
    for a, b in zip(ours, plain(hidden, weight, targets), strict=True):
        assert (a.double().cpu() - b).abs().max() < bound * b.abs().max()


def test_gradcheck(device: torch.device) -> None:
    hidden, weight, targets = inputs(device, tokens=4)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets).total, (hidden, weight))


def test_only_the_wanted_gradient_and_non_contiguous_inputs(device: torch.device) -> None:
    hidden, weight, targets = inputs(device)
    expected = plain(hidden, weight, targets)
    frozen = linear_cross_entropy(hidden, weight.detach(), targets).total
    torch.testing.assert_close(torch.autograd.grad(3 * frozen, hidden)[0].cpu(), expected[1], rtol=0, atol=1e-11)
    h, w = hidden.detach().T.contiguous().T.requires_grad_(), weight.detach().T.contiguous().T.requires_grad_()
    total = linear_cross_entropy(h, w, targets).total
    torch.testing.assert_close(torch.autograd.grad(3 * total, w)[0].cpu(), expected[2], rtol=0, atol=1e-11)


def test_no_gradient_is_formed_under_no_grad(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(device)
    expected = linear_cross_entropy(hidden, weight, targets).total
    products: list[str] = []
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append("mm"))
    with torch.no_grad():
        total = linear_cross_entropy(hidden, weight, targets).total
    assert torch.equal(total, expected)
    assert not total.requires_grad
    assert not products


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_predict_is_zero_over_zero_tokens_with_zero_gradients(device: torch.device, tokens: int) -> None:
    hidden, weight, _ = inputs(device, tokens=tokens)
    total, count = linear_cross_entropy(hidden, weight, torch.full((tokens,), IGNORED, device=device))
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert total == 0
    assert count == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    hidden, weight, targets = inputs(device, torch.float32)
    total = linear_cross_entropy(1e4 * hidden, weight, targets).total
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_autocast_multiplies_in_bf16_and_sums_in_float32(device: torch.device) -> None:
    hidden, weight, targets = inputs(device, torch.float32, tokens=100)
    with torch.autocast(device.type, torch.bfloat16):
        total = linear_cross_entropy(hidden, weight, targets).total
    gradients = torch.autograd.grad(total, (hidden, weight))
    expected = linear_cross_entropy(hidden, weight, targets).total
    assert total.dtype == gradients[0].dtype == gradients[1].dtype == torch.float32
    assert total != expected
    torch.testing.assert_close(total, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_changes_not_the_other(device: torch.device, frozen: int) -> None:
    hidden, weight, targets = inputs(device)
    sides = (hidden, weight)
    expected = torch.autograd.grad(linear_cross_entropy(*sides, targets).total, sides)[1 - frozen]
    sides[frozen].requires_grad_(False)
    linear_cross_entropy(*sides, targets).total.backward()
    assert sides[frozen].grad is None
    assert torch.equal(sides[1 - frozen].grad, expected)


def test_the_mean_over_many_targets_is_not_rounded_to_bf16(device: torch.device) -> None:
    hidden, weight, targets = inputs(device, torch.bfloat16)
    total = linear_cross_entropy(hidden, weight, targets).total
    whole = torch.autograd.grad(total, weight, retain_graph=True)[0].double()
    part = torch.autograd.grad(total / 4095, weight)[0].double()  # 1 / 4095 is no bf16 number
    large = whole.abs() > whole.abs().max() / 2
    # each entry is rounded by itself, up or down; a rounded factor would move them all by the same 0.2%
    assert abs(float((part * 4095 / whole)[large].mean()) - 1) < 1.2e-3


@pytest.mark.parametrize("predicted", [1, 256, 300, 700])
def test_few_predicted_tokens_among_many_have_the_same_loss_and_gradients_and_few_logits(
    device: torch.device, predicted: int
) -> None:
    hidden, weight, targets = inputs(device, tokens=1100)
    targets = targets.where(targets != IGNORED, 0)
    targets[torch.randperm(1100, device=device)[predicted:]] = IGNORED
    rows = len(loss._predicted(hidden, targets)[0])
    if device.type == "cpu":
        assert rows == {1: 256, 256: 256, 300: 512, 700: 1100}[predicted]
    total, tokens = linear_cross_entropy(hidden, weight, targets)
    assert tokens == predicted
    ours = (total, *torch.autograd.grad(3 * total, (hidden, weight)))
    for a, b in zip(ours, plain(hidden, weight, targets), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-10)
