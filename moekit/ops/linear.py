"""Products with matrices, whatever their weights are kept in."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.ops.autocast import cast_once
from moekit.ops.kernels import linear as kernels
from moekit.ops.product import is_wide, product
from moekit.ops.quantize import Quantized, dequantize, refuse_gradients
from moekit.ops.scaled import Scaled


def linear(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "out dim"] | Quantized | Scaled
) -> Float[Tensor, "*batch out"]:
    """Returns x W^T in x's dtype, or in autocast's; see `linears`."""
    return linears(x, weight)[0]


def linears(
    x: Float[Tensor, "*batch dim"], *weights: Float[Tensor, "_ dim"] | Quantized | Scaled
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """Returns x W^T in x's dtype, or in autocast's, for each W: as one product where ours run.

    On a CPU codes, and for a few rows without a gradient weights of any kind, are read as they lie; bfloat16 is
    multiplied by our kernels, float32 as `product` does. 8-bit floating point becomes numbers for this product.
    """
    for weight in weights:
        refuse_gradients(weight, x)
    ready = [w.to(x.device).numbers().to(x.dtype) if isinstance(w, Scaled) else w for w in weights]
    cast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    low = cast_once(x)
    if kernels.has_linears(low, ready, cast):
        return kernels.linears(low, ready)
    return tuple(_by_torch(x, weight, cast) for weight in ready)


def _by_torch(x: Tensor, weight: Tensor | Quantized, cast: bool) -> Tensor:
    if not cast and isinstance(weight, Tensor) and is_wide(x, weight, x.numel() * len(weight)):
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
