"""Tokens to rows sorted by expert, and back: two gathers with gathers as their gradients, no atomics, no sort twice."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import transformed
from moekit.ops.kernels.choice import has_choice, sort_pairs
from moekit.ops.routing import DROPPED


class Plan(NamedTuple):
    """Where each (token, choice) pair goes. Dropped pairs sort behind all experts, where no expert computes them."""

    order: Int[Tensor, " rows"]
    """Row -> pair, a pair being token * k + choice."""
    inverse: Int[Tensor, " rows"]
    """Pair -> row."""
    tokens_per_expert: Int[Tensor, " experts"]
    """Rows of each expert; their sum is smaller than the number of rows where pairs were dropped."""


def plan(expert_ids: Int[Tensor, "tokens k"], n_experts: int) -> Plan:
    """Returns the stable sort of all (token, choice) pairs by expert."""
    if has_choice(expert_ids):
        return Plan(*sort_pairs(expert_ids, n_experts))
    pairs = torch.where(expert_ids == DROPPED, n_experts, expert_ids).flatten()
    order = pairs.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    # not bincount: on CUDA it would wait for the largest id
    counts = pairs.new_zeros(n_experts + 1).scatter_add_(0, pairs, torch.ones_like(pairs))
    return Plan(order, inverse, counts[:n_experts])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, inverse)
        chosen = rows.index_select(0, inverse).unflatten(0, weights.shape)
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), chosen).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, inverse = ctx.saved_tensors
        k = weights.shape[1]
        by_row = grad.index_select(0, order // k)
        d_weights = (by_row * rows).sum(-1, dtype=weights.dtype).index_select(0, inverse).view(weights.shape)
        d_rows = by_row.mul_(weights.to(rows.dtype).flatten().index_select(0, order).unsqueeze(-1))
        return d_rows, d_weights, None, None


def gather(x: Float[Tensor, "tokens dim"], plan: Plan, k: int) -> Float[Tensor, "rows dim"]:
    """Returns one row per (token, choice) pair, sorted by expert; rows = tokens * k."""
    if transformed():
        return x.index_select(0, plan.order // k)
    rows: Tensor = _Gather.apply(x, plan.order, plan.inverse, k)
    return rows


def combine(
    rows: Float[Tensor, "rows dim"], weights: Float[Tensor, "tokens k"], plan: Plan
) -> Float[Tensor, "tokens dim"]:
    """Returns sum over choices of weight * row for each token (DeepSeekMoE, Eq. 9). Dropped rows must be finite."""
    y: Tensor
    if transformed():
        chosen = rows.index_select(0, plan.inverse).unflatten(0, weights.shape)
        y = (weights.to(rows.dtype).unsqueeze(-1) * chosen).sum(1)
        return y
    y = _Combine.apply(rows, weights, plan.order, plan.inverse)
    return y
