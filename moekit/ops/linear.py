"""The product with one matrix, whatever its weights are kept in."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.ops.kernels import native
from moekit.ops.product import is_wide, product
from moekit.ops.quantize import Quantized, dequantize, refuse_gradients
from moekit.ops.scaled import Scaled


def linear(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "out dim"] | Quantized | Scaled
) -> Float[Tensor, "*batch out"]:
    """Returns x W^T in x's dtype.

    On a CPU codes, and for a few rows without a gradient weights of any kind, are read as they lie; float32 is
    multiplied as `product` does. 8-bit floating point becomes numbers for this product.
    """
    refuse_gradients(weight, x)
    if isinstance(weight, Scaled):
        weight = weight.to(x.device).numbers().to(x.dtype)
    if not torch.is_autocast_enabled("cpu"):
        if native.has_linear(x, weight):
            y: Tensor = native.linear(x, weight)
            return y
        if isinstance(weight, Tensor) and is_wide(x, weight, x.numel() * len(weight)):
            wide: Tensor = _Wide.apply(x.reshape(-1, x.shape[-1]), weight)
            return wide.view(*x.shape[:-1], -1)
    return F.linear(x, dequantize(weight, x.dtype) if isinstance(weight, Quantized) else weight)


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            product(dy, weight) if ctx.needs_input_grad[0] else None,
            product(dy.T, x) if ctx.needs_input_grad[1] else None,
        )
