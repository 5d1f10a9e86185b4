"""Entmax-1.5: like softmax, but exactly zero for whoever is far behind (Peters et al., arXiv 1905.05702)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moekit.ops.autocast import autocast_off
from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import transformed


def entmax15(logits: Float[Tensor, "*units experts"]) -> Float[Tensor, "*units experts"]:
    """Returns p with p_i = max(z_i / 2 - tau, 0)^2 and tau such that p sums to 1, exact and in float32 or better.

    Equal logits give equal shares; one that is 2 or more below the largest has none. At a zero its gradient is zero.
    """
    with autocast_off(logits):
        logits = logits if logits.dtype == torch.float64 else logits.float()
        p: Tensor = _exact(logits) if transformed() else _Entmax15.apply(logits)
        return p


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        p = _exact(logits)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> Tensor:
        """The paper's Jacobian, for alpha 1.5, is diag(s) - s s^T / sum(s), s the square root of p."""
        (p,) = ctx.saved_tensors
        s = p.sqrt()
        scaled = dp * s
        d_logits: Tensor = scaled - s * (scaled.sum(-1, keepdim=True) / s.sum(-1, keepdim=True))
        return d_logits


def _exact(logits: Tensor) -> Tensor:
    """The exact algorithm for alpha 1.5: with the k largest as support, tau follows from their mean and spread."""
    if logits.numel() == 0:
        return torch.zeros_like(logits)
    # tau is at least -1 below the largest, so whatever lies lower has no share: clamped, no sum can grow large
    z = ((logits - logits.amax(-1, keepdim=True)) / 2).clamp(min=-1)
    ordered = z.sort(-1, descending=True).values
    with torch.no_grad():
        k = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        mean = ordered.cumsum(-1) / k
        spread = ordered.square().cumsum(-1) - k * mean.square()
        taus = mean - ((1 - spread) / k).clamp(min=0).sqrt()
        support = (taus <= ordered).sum(-1, keepdim=True)
        tau = taus.gather(-1, support - 1)
    # Newton, twice: in float32 the root, where it is near zero, has cost half of the digits. From a tau that is held
    # fixed two steps are right to the third derivative, one would be to the first
    for _ in range(2):
        above = (ordered - tau).clamp(min=0)
        tau = tau + (above.square().sum(-1, keepdim=True) - 1) / (2 * above.sum(-1, keepdim=True))
    return (z - tau).clamp(min=0).square()
