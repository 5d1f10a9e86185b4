"""Experts merged into one: weights are mixed by a routing result, then applied once (MEO, arXiv 2310.09832, Eq. 4).

y = (sum over the chosen of w_i W_i) x + sum of w_i b_i. A unit is whatever was routed: a task, a sequence, a segment;
its tokens share one merged matrix. For a linear map this equals mixing the experts' outputs; for a network with an
activation it does not.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moekit.config.variants.variant import MERGED_BYTES
from moekit.ops.autocast import autocast_off, cast_once
from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels import merge as kernel
from moekit.ops.kernels.addresses import transformed
from moekit.ops.routing import DROPPED, Routing


def mixing(routing: Routing, n_experts: int) -> Float[Tensor, "units experts"]:
    """Returns the weight of every expert for each unit: 0 where it was not chosen."""
    ids = torch.where(routing.expert_ids == DROPPED, n_experts, routing.expert_ids)
    return routing.weights.new_zeros(len(ids), n_experts + 1).scatter_add(1, ids, routing.weights)[:, :-1]


def merged_linear(
    x: Float[Tensor, "units tokens dim"],
    mix: Float[Tensor, "units experts"],
    weight: Float[Tensor, "experts out dim"],
    bias: Float[Tensor, "experts out"] | None = None,
    max_bytes: int = MERGED_BYTES,
) -> Float[Tensor, "units tokens out"]:
    """Returns x through each unit's merged matrix, with gradients to x, mix, weight and bias.

    No more than `max_bytes` of merged matrices exist at once, at least one, and none where our kernels run; none is
    kept for the backward pass, which merges again (in a transform of `torch.func` all exist). Under autocast x is
    cast, the mixing coefficients are not, and weights only where torch multiplies.
    """
    x = cast_once(x)
    ours = kernel.has_kernel(x, weight)
    weight = weight if ours else cast_once(weight)
    with autocast_off(x):
        y: Tensor
        if transformed():
            y = torch.bmm(x, _merged(mix, weight).transpose(1, 2))
        else:
            y = kernel.merged_linear(x, mix, weight) if ours else _MergedLinear.apply(x, mix, weight, max_bytes)
        return y if bias is None else y + (mix @ bias.to(mix.dtype)).unsqueeze(1).to(y.dtype)


def merged(mix: Float[Tensor, "units experts"], weight: Float[Tensor, "experts ..."]) -> Float[Tensor, "units ..."]:
    """Returns each unit's merged weight itself, all at once, in autocast's dtype: for what is applied often."""
    weight = cast_once(weight)
    with autocast_off(weight):
        return _merged(mix, weight)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: Tensor, weight: Tensor, max_bytes: int) -> Tensor:
        ctx.save_for_backward(x, mix, weight)
        ctx.units = max(1, max_bytes // max(weight[:1].nbytes, 1))
        y = x.new_empty(*x.shape[:2], weight.shape[1])
        for some in _chunks(len(x), ctx.units):
            torch.bmm(x[some], _merged(mix[some], weight).transpose(1, 2), out=y[some])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mix, weight = ctx.saved_tensors
        wants_x, wants_mix, wants_weight, _ = ctx.needs_input_grad
        dx = torch.empty_like(x) if wants_x else None
        d_mix = torch.empty_like(mix) if wants_mix else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        flat = weight.flatten(1)
        for some in _chunks(len(x), ctx.units):
            if dx is not None:
                torch.bmm(dy[some], _merged(mix[some], weight), out=dx[some])
            if d_mix is not None or d_weight is not None:
                d_merged = torch.bmm(dy[some].transpose(1, 2), x[some]).flatten(1)
                if d_mix is not None:
                    d_mix[some] = (d_merged @ flat.T).to(mix.dtype)
                if d_weight is not None:
                    d_weight.flatten(1).addmm_(mix[some].T.to(d_merged.dtype), d_merged)
        return dx, d_mix, d_weight, None


def _chunks(units: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, units, size)]


def _merged(mix: Tensor, weight: Tensor) -> Tensor:
    merged: Tensor = (mix.to(weight.dtype) @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    return merged
