"""RMSNorm: the compiled one equals the formula, output and every gradient."""

import pytest
import torch

from moekit.nn.norm import RMSNorm


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 16), (3, 50, 37), (1, 0, 16)])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "bound"),
    [
        (torch.float64, torch.float64, 1e-12),  # measured worst: 7e-16, 6e-7, 5e-3, 5e-3
        (torch.float32, torch.float32, 5e-6),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.bfloat16, torch.float32, 2e-2),
    ],
)
def test_norm_equals_the_formula(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, bound: float
) -> None:
    norm = RMSNorm(shape[-1], 1e-5).to(device, weight_dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., ::2].requires_grad_()  # not contiguous
    y = norm(x)
    probe = torch.randn_like(y)
    exact = [value.detach().double().requires_grad_() for value in (x, norm.weight)]
    z = formula(exact[0], exact[1], 1e-5)
    ours = (y, *torch.autograd.grad(y, (x, norm.weight), probe))
    theirs = (z, *torch.autograd.grad(z, exact, probe.double()))
    assert [a.dtype for a in ours] == [dtype, dtype, weight_dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert not b.numel() or (a.double() - b).abs().max() <= bound * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("dtype", "delta_dtype", "bound"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 5e-6),
        (torch.float32, torch.bfloat16, 5e-6),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.float32, None, 5e-6),
    ],
)
def test_sum_and_norm_in_one_pass_equal_the_formula(
    device: torch.device, autocast: bool, exact: bool, dtype: torch.dtype, delta_dtype: torch.dtype | None, bound: float
) -> None:
    norm = RMSNorm(37, 1e-5).to(device, dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 50, 2 * 37, device=device).to(dtype)[..., ::2].requires_grad_()
    delta = None if delta_dtype is None else torch.randn(3, 50, 37, device=device).to(delta_dtype).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        stream, y, low = norm.add(x, delta, exact)
    wide = dtype if delta is None else torch.promote_types(dtype, delta.dtype)
    assert stream.dtype == wide
    assert low.dtype == (torch.bfloat16 if autocast else wide)
    assert y.dtype == wide or (y is low and not exact)
    assert torch.equal(low, y.to(low.dtype))
    inputs = [value for value in (x, norm.weight, delta) if value is not None]
    outputs = [stream, low] if y is low else [stream, y, low]
    probes = [torch.randn_like(value) for value in outputs]
    ours = torch.autograd.grad(outputs, inputs, probes)
    values = [value.detach().double().requires_grad_() for value in inputs]
    total = values[0] if delta is None else values[0] + values[2]
    normed = formula(total, values[1], 1e-5)
    theirs = torch.autograd.grad([total, *[normed] * (len(outputs) - 1)], values, [probe.double() for probe in probes])
    loose = 2e-2 if torch.bfloat16 in (low.dtype, delta_dtype) else bound
    assert (stream.double() - total).abs().max() <= bound * total.abs().max()
    assert (low.double() - normed).abs().max() <= loose * normed.abs().max()
    assert (y.double() - normed).abs().max() <= (loose if y is low else bound) * normed.abs().max()
    for a, b, value in zip(ours, theirs, inputs, strict=True):
        assert a.dtype == value.dtype
        assert (a.double() - b).abs().max() <= loose * b.abs().max()


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_an_output_that_nothing_follows_gives_no_gradient(device: torch.device, left_out: int) -> None:
    norm = RMSNorm(16, 1e-5).to(device)
    x, delta = (torch.randn(5, 16, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device.type, torch.bfloat16):
        outputs = [value for place, value in enumerate(norm.add(x, delta, True)) if place != left_out]
    ours = torch.autograd.grad(sum(value.float().pow(3).sum() for value in outputs), (x, delta))
    total = (x + delta).detach().requires_grad_()
    normed = formula(total, norm.weight, 1e-5)
    wanted = [value for place, value in enumerate((total, normed, normed)) if place != left_out]
    (theirs,) = torch.autograd.grad(sum(value.pow(3).sum() for value in wanted), total)
    assert all((a - theirs).abs().max() <= 2e-2 * theirs.abs().max() for a in ours)
