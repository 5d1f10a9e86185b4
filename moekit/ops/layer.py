"""Attention, SwiGLU, a block and all blocks as one call each, where our kernels multiply."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moekit.ops.attention import Seen
from moekit.ops.kernels.block import Whole, learning_block, whole_blocks
from moekit.ops.kernels.layer import Attending, Heads, attention_layer, feed_forward
from moekit.ops.kernels.linear import has_linears
from moekit.ops.scaled import Matrix

__all__ = [
    "Attending",
    "Heads",
    "Whole",
    "attention_layer",
    "feed_forward",
    "has_layer",
    "learning_block",
    "whole_blocks",
]


def has_layer(
    x: Tensor,
    weights: Sequence[Matrix],
    seen: Seen | None = None,
    cache: Float[Tensor, "sequences keys entry"] | None = None,
) -> bool:
    """Returns whether these functions can run on these tensors, and gain by it (`has_linears`)."""
    if cache is not None and (torch.is_grad_enabled() or not _fillable(cache)):
        return False
    if seen is not None and not (seen.mask is None and seen.offsets is None):
        return False
    if not has_linears(x, weights, mixed=torch.is_autocast_enabled("cpu")):
        return False
    learns = torch.is_grad_enabled() and x.requires_grad
    return all(w.is_contiguous() if isinstance(w, Tensor) else not learns for w in weights)


def _fillable(cache: Tensor) -> bool:
    return cache.device.type == "cpu" and cache.dtype in (torch.float32, torch.bfloat16) and cache.is_contiguous()
