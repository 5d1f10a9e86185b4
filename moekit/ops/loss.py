"""Next-token cross-entropy from hidden states, in chunks: the full logits are never held."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The target of a position that is not predicted (the convention of torch and transformers)."""

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB in float32."""


class TokenLoss(NamedTuple):
    """A sum in nats and the number of predicted tokens, so that means over ranks and micro-batches are exact."""

    total: Float[Tensor, ""]
    tokens: Int[Tensor, ""]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is formed beside the loss, while the chunk's logits are at hand; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, training: bool) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        d_hidden = torch.empty_like(hidden) if training else None
        d_weight = torch.zeros(weight.shape, dtype=total.dtype, device=weight.device) if training else None
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, len(hidden), size):
            chunk, target = hidden[start : start + size], targets[start : start + size]
            real = target != IGNORED
            safe = target.where(real, 0).unsqueeze(-1)
            logits = (chunk @ weight.T).to(total.dtype)
            lse = logits.logsumexp(-1, keepdim=True)
            total += ((lse - logits.gather(1, safe)).squeeze(-1) * real).sum()
            if d_hidden is not None and d_weight is not None:
                d_logits = logits.sub_(lse).exp_()
                d_logits.scatter_add_(1, safe, torch.full_like(safe, -1, dtype=total.dtype))
                d_logits = d_logits.mul_(real.unsqueeze(-1)).to(hidden.dtype)
                torch.mm(d_logits, weight, out=d_hidden[start : start + size])
                d_weight += d_logits.T @ chunk
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), d_weight * grad.to(d_weight.dtype), None, None


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens dim"], weight: Float[Tensor, "vocab dim"], targets: Int[Tensor, " tokens"]
) -> TokenLoss:
    """Returns the summed cross-entropy of softmax(weight @ hidden) in nats over the targets that are not -100."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        # inside the function gradients are always off, so whether one is wanted is asked here
        training = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, training)
    return TokenLoss(total, (targets != IGNORED).sum())
