"""Rows of an embedding, whose gradient on a CPU lies in memory that is kept."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moekit.ops.kernels.memory import empty


def embedding(ids: Int[Tensor, "*batch"], weight: Float[Tensor, "vocab dim"]) -> Float[Tensor, "*batch dim"]:
    """Returns a row of the weight for each id."""
    ours = weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter) and torch.is_grad_enabled()
    if not ours or torch.compiler.is_compiling():
        return F.embedding(ids, weight)
    rows: Tensor = _Embedding.apply(ids, weight)
    return rows


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.of = weight.shape, weight.dtype
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, empty(*ctx.of).zero_().index_add_(0, ids.flatten(), d_rows.flatten(0, -2))
