"""Rows of an embedding, whose gradient on a CPU lies in memory that is kept."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.kernels.addresses import readable
from moekit.ops.kernels.memory import LEAST, empty


def embedding(ids: Int[Tensor, "*batch"], weight: Float[Tensor, "vocab dim"]) -> Float[Tensor, "*batch dim"]:
    """Returns a row of the weight for each id."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.embedding(ids, weight)
    if weight.device.type != "cpu" or not readable(weight) or weight.nbytes < LEAST:
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
    def backward(ctx: Any, d_rows: Tensor) -> tuple[None, Tensor]:
        (ids,), (shape, dtype) = ctx.saved_tensors, ctx.of
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            return None, torch.ops.aten.embedding_dense_backward(d_rows, ids, shape[0], -1, False)
        rows = d_rows.reshape(-1, shape[1])
        return None, empty(shape, dtype).zero_().index_add_(0, ids.flatten(), rows)
