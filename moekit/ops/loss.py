"""Next-token cross-entropy from hidden states, in chunks: the full logits are never held."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moekit.errors import ConfigError
from moekit.ops.autocast import autocast_off, cast_once
from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels import linear, step
from moekit.ops.kernels.addresses import readable, transformed
from moekit.ops.kernels.memory import empty
from moekit.ops.product import product

IGNORED = -100
"""The target of a position that is not predicted (the convention of torch and transformers)."""

CHUNK_BYTES = 1 << 26
"""Memory of the logits that are held at once."""

ROWS = 256
"""Of a multiple of this many rows logits are formed, where only some tokens are predicted."""


class TokenLoss(NamedTuple):
    """A sum in nats and the number of predicted tokens, so that means over ranks and micro-batches are exact."""

    total: Float[Tensor, ""]
    tokens: Int[Tensor, ""]


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is formed beside the loss, while the chunk's logits are at hand; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, low: torch.dtype, gradients: bool) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden = hidden.to(low)
        wanted = [gradients and needed for needed in ctx.needs_input_grad[:2]]
        total = hidden.new_zeros((), dtype=torch.float64 if low == torch.float64 else torch.float32)
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = None
        fused = step.has_rest(hidden, weight) and hidden.shape[1] == weight.shape[1]
        ours = fused and linear.has_linears(hidden, (weight,), mixed=True)  # which casts weights while it reads them
        weight = weight if ours else weight.to(low)
        size = max(1, CHUNK_BYTES // (len(weight) * (low if fused else total.dtype).itemsize))
        for start in range(0, len(hidden), size):
            chunk, target = hidden[start : start + size], targets[start : start + size]
            logits = linear.linears(chunk, (weight,))[0] if ours else product(chunk, weight.T)
            if fused:
                d_logits = logits
                total += step.cross_entropy_(d_logits, target, any(wanted)).sum()
            else:
                losses, d_logits = _cross_entropy(logits.to(total.dtype), target, any(wanted))
                total += losses
                d_logits = d_logits.to(low)
            if d_hidden is not None:
                back = linear.backward((d_logits,), (weight,)) if ours else product(d_logits, weight)
                d_hidden[start : start + size] = back
            if wanted[1]:
                if ours:
                    (part,) = linear.gradients(chunk, (d_logits,), total.dtype)
                else:
                    part = product(d_logits.T, chunk)
                d_weight = part if d_weight is None else d_weight.to(total.dtype).add_(part)
        if wanted[1] and d_weight is None:
            d_weight = torch.zeros(weight.shape, dtype=total.dtype, device=weight.device)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # scaled in the precision of the loss: 1 / targets itself would be rounded in bf16, and vanish in fp16
        d_hidden, d_weight = (
            None if d is None else _scaled(d, grad).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return d_hidden, d_weight, None, None, None


def _scaled(d: Tensor, grad: Tensor) -> Tensor:
    """Returns d times grad, in memory that is kept where it is large and of one dtype."""
    by = grad.view(1)  # of one dimension: then it is grad's dtype that counts
    if d.device.type == "cpu" and d.dtype == grad.dtype:
        return torch.mul(d, by, out=empty(d.shape, d.dtype))
    return d * by


def _cross_entropy(logits: Tensor, targets: Tensor, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Returns the sum of the losses, and the gradient of the logits."""
    real = targets != IGNORED
    safe = targets.where(real, 0).unsqueeze(-1)
    lse = logits.logsumexp(-1, keepdim=True)
    total = ((lse - logits.gather(1, safe)).squeeze(-1) * real).sum()
    if differentiate:
        # the logits stay as they are: selective checkpointing may keep the product that gave them
        logits = (logits - lse).exp_().scatter_add_(1, safe, torch.full_like(safe, -1, dtype=logits.dtype))
        logits.mul_(real.unsqueeze(-1))
    return total, logits


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens dim"], weight: Float[Tensor, "vocab dim"], targets: Int[Tensor, " tokens"]
) -> TokenLoss:
    """Returns the summed cross-entropy of softmax(weight @ hidden) in nats over the targets that are not -100.

    On a CPU, where few tokens are predicted (masked ones, answers), no logits of the others are formed; ConfigError for
    a target that is no token.
    """
    hidden, targets = _predicted(hidden, _checked(targets, len(hidden), len(weight)))
    low = cast_once(hidden.new_empty(0)).dtype
    with autocast_off(hidden):
        if transformed():
            return cross_entropy(hidden.to(low) @ weight.to(low).T, targets)
        # inside the function gradients are always off, so whether they are wanted is asked here
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, low, torch.is_grad_enabled())
    return TokenLoss(total, (targets != IGNORED).sum())


def _checked(targets: Tensor, tokens: int, vocab: int) -> Tensor:
    """Returns the targets in 64 bits; ConfigError for what is no target. On another device than a CPU, asking for the
    numbers would wait for them."""
    if targets.shape != (tokens,) or targets.is_floating_point() or targets.dtype == torch.bool:
        found = f"targets are {tuple(targets.shape)} in {targets.dtype}"
        raise ConfigError(f"{found} but must be ({tokens},), one for each token, in integers")
    targets = targets.long()
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and readable(targets):
        wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= vocab)
        if wrong.any():
            raise ConfigError(f"a target is {int(targets[wrong][0])} but must be {IGNORED} or 0 to {vocab - 1}")
    return targets


def cross_entropy(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> TokenLoss:
    """Returns the same of logits that are there."""
    exact = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="sum")
    return TokenLoss(total, (targets != IGNORED).sum())


def _predicted(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows that are predicted and some of the others, a multiple of `ROWS`; all where that spares little.

    On another device than a CPU, asking for their number would wait for it. Products of few sizes: see `kernels.loop`.
    """
    if hidden.device.type != "cpu" or torch.compiler.is_compiling() or not readable(targets):
        return hidden, targets
    wanted = targets != IGNORED
    rows = -(-int(wanted.sum()) // ROWS) * ROWS
    if rows > len(targets) // 2:
        return hidden, targets
    kept = wanted.int().argsort(descending=True, stable=True)[:rows]
    return hidden.index_select(0, kept), targets.index_select(0, kept)
