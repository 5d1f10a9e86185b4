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
